# The compiled core as csrc/bindings.cpp declares it: addresses, sizes and strides in elements, dtype codes of
# `tiles.DTYPES`. tests/test_types.py holds the two against each other.

class TileArgs:
    keep_alive: tuple[object, ...]  # owns the memory behind the addresses

    def __init__(
        self,
        *,
        tile: int,
        dtype: int,
        n_rows: int,
        n_cols: int,
        tile_stride: int,
        labels: int,
        vocab_start: int,
        ignore_index: int,
        state: int,
        state_stride: int,
        logit_scale: float,
        softcap: float,
        temperature: float,
        row_temperature: int,
        bias: int,
        keep: int,
        keep_stride: int,
        threads: int,
    ) -> None: ...

class StatsArgs:
    def __init__(
        self,
        *,
        state: int,
        state_stride: int,
        n_rows: int,
        is_double: bool,
        logps: int,
        entropy: int,
        lse: int,
        is_top1: int,
        mean_logit: int,
        log_sum_sq_probs: int,
    ) -> None: ...

def fold(args: TileArgs, level: int, first: bool, isa: str = "") -> None: ...
def stats(args: StatsArgs, isa: str = "") -> None: ...
def grad(
    args: TileArgs, g_logp: int, g_entropy: int, out: int, out_dtype: int, out_stride: int, isa: str = ""
) -> None: ...

# Only in a build with CUDA.
def cuda_fold_workspace(args: TileArgs, device: int) -> int: ...
def cuda_fold(args: TileArgs, level: int, first: bool, workspace: int, device: int, stream: int) -> None: ...
def cuda_stats(args: StatsArgs, device: int, stream: int) -> None: ...
def cuda_grad(
    args: TileArgs,
    g_logp: int,
    g_entropy: int,
    out: int,
    out_dtype: int,
    out_stride: int,
    device: int,
    stream: int,
) -> None: ...
def is_amd() -> bool: ...
def gemm_supported(dtype: int) -> bool: ...
def gemm(
    *,
    a: int,
    b: int,
    out: int,
    dtype: int,
    m: int,
    n: int,
    k: int,
    a_stride: int,
    b_stride: int,
    out_stride: int,
    a_transposed: bool,
    b_transposed: bool,
    accumulate: bool,
    threads: int,
    scaled: int = 0,
    scaled_stride: int = 0,
    factor: float = 1.0,
) -> None: ...
def cpu_isas() -> list[str]: ...
def build_info() -> dict[str, str | int | None]: ...

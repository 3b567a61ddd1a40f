"""The tile interface: two functions, and the one table that says which backend serves which device.

Everything above this layer is these two and a matrix product:

* `fold_` reads a tile of logits [n, v] once and accumulates the row state (`entropy_po.types.new_state`);
* `grad_` reads it once more and overwrites it with d loss / d tile.

Between them `stats` turns the complete state of rows into their outputs: a few numbers a row, in one launch.
"""

from __future__ import annotations

import importlib
import os
import warnings
from enum import Enum
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from entropy_po import dispatch, reference
from entropy_po.types import Level, TokenStats, Transform, stats_from_state

if TYPE_CHECKING:
    from entropy_po._C import TileArgs

BackendName = Literal["cpp", "triton", "cuda", "torch"]  # the values of Backend


class Backend(str, Enum):
    """What computes a tile."""

    CPP = "cpp"  # csrc/ through entropy_po._C
    TRITON = "triton"  # kernels/
    CUDA = "cuda"  # csrc/cuda/ through entropy_po._C
    TORCH = "torch"  # reference.py


# Preferred first. `torch` serves all and is never chosen silently where a faster backend should have been there.
# Where both of CUDA's are usable and none is named, each tile has its own (dispatch.py).
BACKENDS_BY_DEVICE = {
    "cpu": (Backend.CPP, Backend.TORCH),
    "cuda": (Backend.TRITON, Backend.CUDA, Backend.TORCH),  # AMD's GPUs, too
    "xpu": (Backend.TRITON, Backend.TORCH),  # Intel's
}
# Names the backend that goes first on the devices it serves: for comparing backends, and for when one of them fails. A
# result changes by rounding only, and a call's own `backend=` comes before it.
OVERRIDE, WITHOUT = "ENTROPY_PO_BACKEND", "ENTROPY_PO_WITHOUT"  # the backend to put first, and those to leave out
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # codes of csrc/tile_args.h


@cache
def compiled_core() -> ModuleType | Any:
    """`entropy_po._C`, or None when the package was installed without a C++ compiler."""
    try:
        return importlib.import_module("entropy_po._C")
    except ModuleNotFoundError as error:
        if error.name != "entropy_po._C":
            raise
        return None


@cache
def triton_kernels() -> ModuleType | Any:
    """`entropy_po.kernels`, or None where Triton is not installed."""
    try:
        return importlib.import_module("entropy_po.kernels.launch")
    except ModuleNotFoundError:
        return None


@cache
def unavailable_reason(backend: Backend) -> str | None:
    """Why a backend cannot run in this process, or None if it can."""
    if backend in left_out():
        return f"{WITHOUT} names it"
    if backend is Backend.CPP and compiled_core() is None:
        return "the C++ core was not built; install a C++ compiler and reinstall entropy_po"
    if backend is Backend.TRITON and triton_kernels() is None:
        return "Triton is not installed; pip install triton"
    if backend is Backend.CUDA:
        if compiled_core() is None:
            return unavailable_reason(Backend.CPP)
        build = compiled_core().build_info()
        if build["cuda"] is None:
            return f"the C++ core was built without CUDA ({build['no_cuda']}); install nvcc and reinstall entropy_po"
    return None


def left_out() -> tuple[Backend, ...]:
    """The tile backends that the environment leaves out, separated by commas: one that crashes on a GPU takes the others along.

    Raises:
        ValueError: it names something else, or torch, which is what remains.
    """
    names = [name for name in os.environ.get(WITHOUT, "").split(",") if name]
    able = [b.value for b in Backend if b is not Backend.TORCH]
    for name in names:
        if name not in able:
            raise ValueError(f"{WITHOUT}={','.join(names)!r}: {name!r} is not one of {able}.")
    return tuple(map(Backend, names))


def backend_override() -> Backend | None:
    """The backend that the environment puts first, if it names one.

    Raises:
        ValueError: it names something else.
    """
    name = os.environ.get(OVERRIDE)
    if not name:
        return None
    names = [b.value for b in Backend]
    if name not in names:
        raise ValueError(f"{OVERRIDE}={name!r} is not one of {names}.")
    return Backend(name)


def candidates_for(device_type: str) -> tuple[Backend, ...]:
    """The backends that serve a device, usable here or not, preferred first."""
    table = BACKENDS_BY_DEVICE.get(device_type, (Backend.TORCH,))
    return tuple(sorted(table, key=lambda b: b is not backend_override()))


@cache
def default_backend(device_type: str) -> Backend:
    """The backend for a device when the caller names none; warns once if that is torch for want of a faster one.

    Raises:
        ValueError: the environment variable names no backend.
        NotImplementedError: it names one that serves this device and is not usable here.
    """
    candidates = candidates_for(device_type)
    reason = unavailable_reason(candidates[0])
    if reason and candidates[0] is backend_override():
        raise NotImplementedError(f"{OVERRIDE}={candidates[0].value!r} cannot be used: {reason}.")
    chosen = next(b for b in candidates if unavailable_reason(b) is None)
    if chosen is Backend.TORCH and reason:
        warnings.warn(
            f"entropy_po runs on plain torch on {device_type!r}, many times slower: {reason}.",
            stacklevel=2,
        )
    return chosen


@cache
def chosen_by_tile(device_type: str) -> bool:
    """Whether a tile's shape decides between two backends of a device: both are usable, and the environment names neither."""
    usable = [b for b in candidates_for(device_type) if unavailable_reason(b) is None]
    return {Backend.TRITON, Backend.CUDA} <= {*usable} and backend_override() not in usable


def resolve_backend(backend: str | None, device: torch.device) -> Backend | None:
    """The backend that will run, None for each tile's own (`chosen_by_tile`), or an error that lists what could.

    Raises:
        ValueError: `backend` is not a name this package knows.
        NotImplementedError: it is, but it cannot serve this device or is not installed. Nothing falls back.
    """
    if backend is None or backend == "":
        return None if chosen_by_tile(device.type) else default_backend(device.type)
    names = [b.value for b in Backend]
    if backend not in names:
        raise ValueError(f"backend={backend!r} is not one of {names}; leave it out to let the device decide.")
    wanted = Backend(backend)
    serving = available_backends()[device.type] if device.type in BACKENDS_BY_DEVICE else ["torch"]
    if wanted.value not in serving:
        served = wanted in BACKENDS_BY_DEVICE.get(device.type, ())
        reason = unavailable_reason(wanted) if served else f"it does not serve device {device.type!r}"
        raise NotImplementedError(
            f"backend={backend!r} cannot be used: {reason}. Usable on {device.type!r}: {serving}."
        )
    return wanted


def available_backends() -> dict[str, list[str]]:
    """Usable backends per device type, preferred first.

    >>> "torch" in available_backends()["cpu"]
    True
    """
    return {
        device: [b.value for b in candidates_for(device) if unavailable_reason(b) is None]
        for device in BACKENDS_BY_DEVICE
    }


def fold_(
    tile: Tensor,  # [n, v], fp32 / bf16 / fp16 / fp64, last dimension contiguous
    labels: Tensor,  # [n] int64, ids in the whole vocabulary
    vocab_start: int,  # id of column 0
    state: Tensor,  # [5 or 8, n], updated
    transform: Transform,  # of this tile (Transform.tile)
    *,
    level: Level,
    first: bool = False,  # of these rows' tiles: `state` may hold anything, and an ignored row's becomes `types.IGNORED`
    ignore_index: int = -100,
    backend: Backend | None = Backend.TORCH,  # None: the tile's own
    isa: str = "",
) -> None:
    """Accumulate a tile into the row state, in one read. Tiles of a row may come in any order and any widths, none of them
    empty if it is the first."""
    if backend is None:
        backend = Backend.CUDA if dispatch.cuda_goes_first("fold", tile) else Backend.TRITON
    if backend is Backend.CPP:
        args = _tile_args(tile, labels, vocab_start, state, transform, ignore_index)
        compiled_core().fold(args, int(level), first, isa)
    elif backend is Backend.CUDA:
        args = _tile_args(tile, labels, vocab_start, state, transform, ignore_index)
        device, stream = _cuda_stream(tile)
        workspace = tile.new_empty(compiled_core().cuda_fold_workspace(args, device), dtype=torch.uint8)
        with dispatch.on_device(tile):
            compiled_core().cuda_fold(args, int(level), first, workspace.data_ptr(), device, stream)
    else:
        fold = triton_kernels().fold_ if backend is Backend.TRITON else reference.fold_
        fold(tile, labels, vocab_start, state, transform, level=level, ignore_index=ignore_index, first=first)


def stats(
    state: Tensor,  # [5 or 8, n], complete
    outputs: tuple[str, ...],
    *,
    backend: Backend | None = Backend.TORCH,  # None: the one that needs no compiler at its first launch
    isa: str = "",
) -> TokenStats:
    """What the state says of its rows, [n] each; differences are taken in fp64."""
    backend = backend or Backend.CUDA
    if backend is Backend.TORCH:
        return stats_from_state(state, outputs)
    made = TokenStats(
        *(
            state.new_empty(state.shape[1], dtype=torch.bool if name == "is_top1" else state.dtype)
            if name in outputs
            else None
            for name in TokenStats._fields
        )
    )
    if backend is Backend.TRITON:
        triton_kernels().stats_(state, made)
        return made
    args = compiled_core().StatsArgs(
        state=state.data_ptr(),
        state_stride=state.stride(0),
        n_rows=state.shape[1],
        is_double=state.dtype == torch.float64,
        **{name: _address(made_of) for name, made_of in made._asdict().items()},
    )
    if backend is Backend.CPP:
        compiled_core().stats(args, isa)
    else:
        with dispatch.on_device(state):
            compiled_core().cuda_stats(args, *_cuda_stream(state))
    return made


def grad_(
    tile: Tensor,  # as in fold_; overwritten unless `out` is given
    labels: Tensor,
    vocab_start: int,
    state: Tensor,  # m, s and t of every tile of the row, or of those so far (ops/linear_token_stats.py)
    g_logp: Tensor | None,  # [n] in the state's dtype; None: no gradient, and no work for it
    g_ent: Tensor | None,
    transform: Transform,
    *,
    ignore_index: int = -100,
    out: Tensor | None = None,  # [n, v]: the tile itself, its `bf16_overlay`, or a tensor of the tile's dtype
    backend: Backend | None = Backend.TORCH,  # None: the tile's own
    isa: str = "",
) -> None:
    """Write g_logp * d logp / d tile + g_ent * d entropy / d tile, chained through the transform."""
    out = tile if out is None else out
    if backend is None:
        backend = Backend.CUDA if dispatch.cuda_goes_first("grad", tile, out) else Backend.TRITON
    if backend in (Backend.CPP, Backend.CUDA):
        g_logp = g_logp.contiguous() if g_logp is not None else None
        g_ent = g_ent.contiguous() if g_ent is not None else None
        _check_last_dim_contiguous("out", out)
        args = _tile_args(tile, labels, vocab_start, state, transform, ignore_index)
        rest = (_address(g_logp), _address(g_ent), out.data_ptr(), DTYPES[out.dtype], out.stride(0))
        if backend is Backend.CPP:
            compiled_core().grad(args, *rest, isa)
        else:
            with dispatch.on_device(tile):
                compiled_core().cuda_grad(args, *rest, *_cuda_stream(tile))
    elif backend is Backend.TRITON:
        triton_kernels().grad_(
            tile, labels, vocab_start, state, g_logp, g_ent, transform, ignore_index=ignore_index, out=out
        )
    else:
        reference.grad_(tile, labels, vocab_start, state, g_logp, g_ent, transform, ignore_index=ignore_index, out=out)


def bf16_overlay(tile: Tensor) -> Tensor:
    """A bf16 [n, v] view in the memory of an fp32 tile, each row at its row's start: `grad_` may narrow into it."""
    return tile.view(torch.bfloat16)[:, : tile.shape[1]]


def _cuda_stream(tile: Tensor) -> tuple[int, int]:
    """The tile's device, and the handle of torch's current stream there."""
    return tile.device.index, torch.cuda.current_stream(tile.device).cuda_stream


def _check_last_dim_contiguous(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its last dimension must be contiguous: {name}.contiguous()."
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tile_args(
    tile: Tensor, labels: Tensor, vocab_start: int, state: Tensor, transform: Transform, ignore_index: int
) -> TileArgs:
    _check_last_dim_contiguous("tile", tile)
    labels = labels.contiguous()
    keep = transform.keep_mask
    if keep is not None:
        keep = keep.expand(tile.shape)
        if tile.shape[1] > 1 and keep.stride(1) != 1:
            keep = keep.contiguous()
    args: TileArgs = compiled_core().TileArgs(
        tile=tile.data_ptr(),
        dtype=DTYPES[tile.dtype],
        n_rows=tile.shape[0],
        n_cols=tile.shape[1],
        tile_stride=tile.stride(0),
        labels=labels.data_ptr(),
        vocab_start=vocab_start,
        ignore_index=ignore_index,
        state=state.data_ptr(),
        state_stride=state.stride(0),
        logit_scale=transform.logit_scale,
        softcap=transform.softcap or 0.0,
        temperature=transform.temperature,
        row_temperature=_address(transform.row_temperature),
        bias=_address(transform.bias),
        keep=_address(keep),
        keep_stride=0 if keep is None else keep.stride(0),
        threads=torch.get_num_threads(),
    )
    args.keep_alive = (labels, keep, transform)  # the struct holds addresses; these own the memory
    return args

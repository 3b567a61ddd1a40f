"""The compiled core's products beside torch's: `python -m benchmarks.gemm` writes benchmarks/results/cpu/gemm.md.

fp32 against the matrix library that torch brings; bf16 with fp32 results against torch's bf16 product, which rounds its results to
bf16 and so is no product that a tile could be made with. `entropy_po.ops.gemm.compiled_fp32` says where the core's is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.report import RESULTS, machine
from entropy_po.bench.timing import give_back_memory, keep_freed_memory, ratio, time_interleaved
from entropy_po.ops.gemm import _compiled_product

# rows, hidden size, words: tiles of a pair's loss and of linear_token_stats, and a head of 7B's size
SHAPES = [(342, 576, 151936), (1024, 576, 49152), (171, 576, 49152), (512, 1024, 32768), (512, 4096, 32768)]
PRODUCTS = ("logits", "dH", "dW")


def candidates(n: int, d: int, v: int, dtype: torch.dtype) -> dict[str, tuple]:
    """Of each product, (the core's, torch's)."""
    hidden, weight, tile = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype), torch.randn(n, v).to(dtype)
    operands = {"logits": (hidden, weight.t()), "dH": (tile, weight), "dW": (tile.t(), hidden)}

    def both(left: Tensor, right: Tensor) -> tuple:
        made = torch.empty(left.shape[0], right.shape[1])
        narrow = made if dtype == torch.float32 else made.to(dtype)
        return (
            lambda: _compiled_product(left, right, made, accumulate=False),
            lambda: torch.mm(left, right, out=narrow),
        )

    return {name: both(*pair) for name, pair in operands.items()}


def row(n: int, d: int, v: int, dtype: torch.dtype, rounds: int) -> str:
    give_back_memory()
    pairs = candidates(n, d, v, dtype)
    runs = {f"{name} {whose}": run for name, pair in pairs.items() for whose, run in zip("ot", pair, strict=True)}
    seconds = time_interleaved(runs, rounds)
    ours, theirs = ([seconds[f"{name} {whose}"] for name in PRODUCTS] for whose in "ot")
    rates = [2e-9 * n * d * v / sorted(values)[len(values) // 2] for values in ours]
    ratios = [ratio(b, a) for a, b in zip(ours, theirs, strict=True)]
    ratios.append(ratio(*([sum(x) for x in zip(*times, strict=True)] for times in (theirs, ours))))
    name = f"N {n}, D {d}, V {v}, {str(dtype).removeprefix('torch.')}"
    return (
        f"| {name} | " + " | ".join(f"{x:.0f}" for x in rates) + " | " + " | ".join(f"{x:.2f}" for x in ratios) + " |"
    )


def main(rounds: int = 7) -> None:
    keep_freed_memory()
    facts = machine("cpu")
    where = f"{facts['processor']}, {facts['instruction_set']}, {facts['threads']} threads, torch {torch.__version__}"
    lines = [
        "# Matrix products of the compiled core",
        "",
        f"`python -m benchmarks.gemm`: {where}; medians of {rounds} interleaved rounds.",
        "",
        "GFLOP/s of the core, and how many times as long torch takes: in fp32 for the same product, in bf16 for one whose results",
        "are rounded to bf16.",
        "",
        "| case | logits | dH | dW | torch / core: logits | dH | dW | all three |",
        "|---|" + "---:|" * 7,
    ]
    for dtype in (torch.float32, torch.bfloat16):
        lines += [row(*shape, dtype, rounds) for shape in SHAPES]
    text = "\n".join(lines) + "\n"
    (RESULTS / "cpu" / "gemm.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

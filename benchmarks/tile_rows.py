"""What the height of a tile costs: `python -m benchmarks.tile_rows` writes benchmarks/results/cpu/tile_rows.md.

Four questions. How many rows of logits must a deferred tile have to beat computing the logits twice? MIN_TILE_ROWS of
entropy_po.plan is the answer. What do the bare products cost when they are cut into tiles of whole rows, as a budget cuts
them? No method that keeps whole rows in the budget is faster than that. How large should a tile of any shape be?
DEFAULT_CPU_WORKSPACE. And what does it save that a CPU's workspace is not fresh from the system at every call
(entropy_po.pages)?
"""

from __future__ import annotations

import math
from functools import partial
from unittest import mock

import torch

from benchmarks.report import RESULTS
from entropy_po import pages
from entropy_po.bench.implementations import OURS, implementations, pair_loss
from entropy_po.bench.problem import Case, Problem
from entropy_po.bench.timing import keep_freed_memory, ratio, time_interleaved
from entropy_po.ops import linear_token_stats
from entropy_po.plan import DEFAULT_CPU_SEQUENCE_WORKSPACE, DEFAULT_CPU_WORKSPACE, MIN_TILE_ROWS, slices

DTYPES = ("float32", "bfloat16")


def deferred_against_recompute(rounds: int) -> list[str]:
    enough = MIN_TILE_ROWS["cpu"]
    heights = (enough // 2, enough, 2 * enough)
    problem = Problem(Case("pair", 1024, 49152, 576))
    candidates = {"recompute": lambda: problem.run(lambda p: pair_loss(p, strategy="recompute"))}
    for n in heights:
        budget = n * 4 * (problem.case.v + 2 * problem.case.d)
        candidates[f"{n} rows"] = lambda budget=budget: problem.run(
            lambda p: pair_loss(p, strategy="deferred", workspace_bytes=budget)
        )
    return [*_header(list(candidates)[1:]), _row(problem.case, time_interleaved(candidates, rounds), "recompute")]


def sizes_of_the_workspace(rounds: int) -> list[str]:
    """Of tiles of any shape; a call on a CPU never uses more than DEFAULT_CPU_WORKSPACE for them, which is what varies here."""
    keep_freed_memory()
    sizes, default = (8, 16, 32, 64, 128, 256), DEFAULT_CPU_WORKSPACE >> 20
    lines = _header([f"{mib} MiB" for mib in sizes if mib != default])
    cases = [Case("hidden", 512, 32768, 1024, dtype) for dtype in DTYPES]
    cases += [
        Case("hidden", 4096, 32768, 576, "bfloat16"),
        Case("hidden", 1024, 49152, 576, "bfloat16", backward=False),
    ]
    cases += [Case("pair", 1024, 49152, 576, dtype, trained=False) for dtype in DTYPES]
    for case in cases:
        problem = Problem(case)

        def ours(mib, problem=problem):
            with mock.patch.object(linear_token_stats, "DEFAULT_CPU_WORKSPACE", mib << 20):
                problem.run(implementations(problem.case)[OURS])

        seconds = time_interleaved({f"{mib} MiB": partial(ours, mib) for mib in sizes}, rounds)
        lines.append(_row(case, seconds, f"{default} MiB"))
    return lines


def _header(names: list[str]) -> list[str]:
    return [f"| case | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]


def _row(case: Case, seconds: dict[str, list[float]], unit: str) -> str:
    """Of all candidates but one, their times as multiples of that one's."""
    ratios = [ratio(values, seconds[unit]) for name, values in seconds.items() if name != unit]
    return f"| {case.name} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |"


def bare_products_in_tiles(rounds: int, n: int = 1024, d: int = 576) -> list[str]:
    lines = ["| V | rows that the budget holds | rows of a tile | logits | dH | dW | all three |"]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|"]
    for v in (49152, 151936):
        held = DEFAULT_CPU_SEQUENCE_WORKSPACE // (4 * (v + 2 * d))
        rows = math.ceil(n / math.ceil(n / held))
        hidden, weight, tile = torch.randn(n, d), torch.randn(v, d), torch.randn(n, v)
        dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

        def logits(size, hidden=hidden, weight=weight, tile=tile):
            for part in slices(0, n, size):
                torch.mm(hidden[part], weight.t(), out=tile[: part.stop - part.start])

        def dh(size, weight=weight, tile=tile, dhidden=dhidden):
            for part in slices(0, n, size):
                torch.mm(tile[: part.stop - part.start], weight, out=dhidden[part])

        def dw(size, hidden=hidden, tile=tile, dweight=dweight):
            for part in slices(0, n, size):
                dweight.addmm_(tile[: part.stop - part.start].t(), hidden[part], beta=float(part.start > 0))

        candidates = {
            f"{product.__name__} {size}": lambda product=product, size=size: product(size)
            for product in (logits, dh, dw)
            for size in (n, rows)
        }
        seconds = time_interleaved(candidates, rounds)
        cut, whole = ([seconds[f"{name} {size}"] for name in ("logits", "dh", "dw")] for size in (rows, n))
        ratios = [ratio(a, b) for a, b in zip(cut, whole, strict=True)]
        ratios.append(ratio(*([sum(x) for x in zip(*times, strict=True)] for times in (cut, whole))))
        lines.append(f"| {v} | {held} | {rows} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |")
    return lines


def fresh_workspace(rounds: int) -> list[str]:
    lines = ["| case | fresh / kept |", "|---|---:|"]
    for dtype in DTYPES:
        problem = Problem(Case("pair", 1024, 49152, 576, dtype))

        def kept(problem=problem):
            problem.run(pair_loss)

        def fresh(kept=kept):
            with pages.from_torch():
                kept()

        seconds = time_interleaved({"kept": kept, "fresh": fresh}, rounds)
        lines.append(f"| {problem.case.name} | {ratio(seconds['fresh'], seconds['kept']):.2f} |")
    return lines


def main(rounds: int = 5) -> None:
    lines = [
        "# The height of a tile, on a CPU",
        "",
        f"`python -m benchmarks.tile_rows`: medians of {rounds} interleaved rounds, fp32, {torch.get_num_threads()} threads.",
        "",
        "The deferred strategy as a multiple of recompute's time; below 1 the tile wins.",
        "",
        *deferred_against_recompute(rounds),
        "",
        "The bare products of 1,024 rows, D 576, in tiles of as many whole rows as 256 MiB hold, as multiples of one product each.",
        "",
        *bare_products_in_tiles(rounds),
        "",
        "The loss of a pair, forward and backward, with a workspace fresh from the system at every call.",
        "",
        *fresh_workspace(rounds),
        "",
        f"Tiles of any shape, in a process that keeps freed memory: as multiples of the time with {DEFAULT_CPU_WORKSPACE >> 20} MiB.",
        "",
        *sizes_of_the_workspace(rounds),
    ]
    text = "\n".join(lines) + "\n"
    (RESULTS / "cpu" / "tile_rows.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""What the height of a tile costs: `python -m benchmarks.tile_rows` writes benchmarks/results/cpu/tile_rows.md.

Three questions. How many rows of logits must a deferred tile have to beat computing the logits twice? MIN_TILE_ROWS of
entropy_po.plan is the answer. And what do the bare products cost when they are cut into tiles of whole rows, as a budget cuts
them? No method that keeps whole rows in the budget is faster than that. And what
does it save that a CPU's workspace is not fresh from the system at every call (entropy_po.pages)?
"""

from __future__ import annotations

import math

import torch

from benchmarks.report import RESULTS
from entropy_po import pages
from entropy_po.bench.implementations import pair_loss
from entropy_po.bench.problem import Case, Problem
from entropy_po.bench.timing import ratio, time_interleaved
from entropy_po.plan import DEFAULT_CPU_SEQUENCE_WORKSPACE, MIN_TILE_ROWS, slices


def deferred_against_recompute(rounds: int) -> list[str]:
    enough = MIN_TILE_ROWS["cpu"]
    heights = (enough // 2, enough, 2 * enough)
    lines = ["| case | " + " | ".join(f"{n} rows" for n in heights) + " |", "|---|---:|---:|---:|"]
    for trained in (True, False):
        problem = Problem(Case("pair", 1024, 49152, 576, trained=trained))
        candidates = {"recompute": lambda p=problem: p.run(lambda p: pair_loss(p, strategy="recompute"))}
        for n in heights:
            budget = n * 4 * (problem.case.v + 2 * problem.case.d)
            candidates[str(n)] = lambda p=problem, budget=budget: p.run(
                lambda p: pair_loss(p, strategy="deferred", workspace_bytes=budget)
            )
        seconds = time_interleaved(candidates, rounds)
        ratios = [ratio(values, seconds["recompute"]) for name, values in seconds.items() if name != "recompute"]
        lines.append(f"| {problem.case.name} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |")
    return lines


def bare_products_in_tiles(rounds: int, n: int = 1024, d: int = 576) -> list[str]:
    lines = ["| V | rows that the budget holds | rows of a tile | logits | dH | dW | two products | three |"]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|---:|"]
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
        for count in (2, 3):
            totals = ([sum(x) for x in zip(*times[:count], strict=True)] for times in (cut, whole))
            ratios.append(ratio(*totals))
        lines.append(f"| {v} | {held} | {rows} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |")
    return lines


def fresh_workspace(rounds: int) -> list[str]:
    lines = ["| case | fresh / kept |", "|---|---:|"]
    for dtype in ("float32", "bfloat16"):
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
    ]
    text = "\n".join(lines) + "\n"
    (RESULTS / "cpu" / "tile_rows.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""How many rows of logits a deferred tile needs to beat computing the logits twice: `python -m benchmarks.tile_rows`.

MIN_TILE_ROWS of entropy_po.plan is chosen by this: times as multiples of the recompute strategy's, below 1 where the tile wins.
"""

from __future__ import annotations

from entropy_po.bench.implementations import pair_loss
from entropy_po.bench.problem import Case, Problem
from entropy_po.bench.timing import ratio, time_interleaved
from entropy_po.plan import MIN_TILE_ROWS


def main(rounds: int = 5) -> None:
    enough = MIN_TILE_ROWS["cpu"]
    print("| case | " + " | ".join(f"{n} rows" for n in (enough // 2, enough, 2 * enough)) + " |\n|---|---:|---:|---:|")
    for trained in (True, False):
        problem = Problem(Case("pair", 1024, 49152, 576, trained=trained))
        candidates = {"recompute": lambda p=problem: p.run(lambda p: pair_loss(p, strategy="recompute"))}
        for n in (enough // 2, enough, 2 * enough):
            budget = n * 4 * (problem.case.v + 2 * problem.case.d)
            candidates[str(n)] = lambda p=problem, budget=budget: p.run(
                lambda p: pair_loss(p, strategy="deferred", workspace_bytes=budget)
            )
        seconds = time_interleaved(candidates, rounds)
        ratios = [ratio(values, seconds["recompute"]) for name, values in seconds.items() if name != "recompute"]
        print(f"| {problem.case.name} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |", flush=True)


if __name__ == "__main__":
    main()

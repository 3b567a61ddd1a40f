"""Two ranks that split the vocabulary, one thread each, against one rank with one thread: forward and backward.

`python -m benchmarks.parallel` writes results/cpu/parallel.md. All are timed in the same processes, in turn; a rank that has
nothing to do waits at a barrier. Two strangers, each with half a vocabulary of its own, show what the machine gives to two
processes at once: what the two ranks take beyond them is what the exchange costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.report import RESULTS
from entropy_po import EntropyObjective, linear_preference_loss, linear_token_stats
from entropy_po.bench.timing import ratio, spread

N, D, V = 512, 1024, 32768
LIMIT = 1.25  # times half of the single rank's time
EXCHANGE = 1.1  # times what two strangers take


def statistics_of(hidden, weight, labels, group) -> None:
    stats = linear_token_stats(hidden, weight, labels, vocab_group=group)
    (stats.logps.sum() - 0.01 * stats.entropy.sum()).backward()


def preference(hidden, weight, labels, group) -> None:
    offsets = torch.linspace(0, len(labels), 9).long()
    objective = EntropyObjective.qempo(10.0)
    linear_preference_loss(hidden, weight, labels, offsets, objective=objective, vocab_group=group).loss.backward()


CASES: dict[str, Callable[..., None]] = {"linear_token_stats": statistics_of, "linear_preference_loss": preference}


def rank_main(rank: int, port: int, rounds: int, results) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden, weight = torch.randn(N, D).to(dtype), (torch.randn(V, D) * 0.02).to(dtype)
        labels = torch.randint(V, (N,))
        shard = weight.chunk(2)[rank].clone().requires_grad_()
        hidden.requires_grad_(), weight.requires_grad_()
        for name, case in CASES.items():
            seconds: dict[str, list[float]] = {"one rank": [], "two ranks": [], "two strangers": []}
            for _ in range(rounds + 1):
                for kind, inputs in (
                    ("one rank", (weight, labels, None)),
                    ("two ranks", (shard, labels, group)),
                    ("two strangers", (shard, labels % len(shard), None)),
                ):
                    hidden.grad = weight.grad = shard.grad = None
                    dist.barrier()
                    start = time.perf_counter()
                    if kind != "one rank" or rank == 0:
                        case(hidden, *inputs)
                    dist.barrier()
                    seconds[kind].append(time.perf_counter() - start)
            if rank == 0:
                results.put((name, str(dtype).removeprefix("torch."), {k: v[1:] for k, v in seconds.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results = mp.get_context("spawn").Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # finds a free port
    port = store.port
    del store
    context = mp.spawn(rank_main, (port, arguments.rounds, results), nprocs=2, join=False)
    lines = [
        "# A vocabulary split over two ranks on a CPU",
        "",
        f"`python -m benchmarks.parallel`: N {N}, D {D}, V {V}, one thread a rank, medians of {arguments.rounds} rounds.",
        f"Wanted: at most {LIMIT} times half of what one rank takes, and at most {EXCHANGE} times two strangers.",
        "",
        "| operator | dtype | one rank, ms | two ranks, ms | two strangers, ms | spread | two ranks / half of one | / strangers |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for _ in range(2 * len(CASES)):
        name, dtype, seconds = results.get()
        ms = [f"{1e3 * statistics.median(values):.0f}" for values in seconds.values()]
        two, one, strangers = (seconds[kind] for kind in ("two ranks", "one rank", "two strangers"))
        ratios = [f"{spread(two):.2f}", f"{2 * ratio(two, one):.2f}", f"{ratio(two, strangers):.2f}"]
        lines.append("| " + " | ".join([name, dtype, *ms, *ratios]) + " |")
        print(lines[-1], flush=True)
    context.join()
    (RESULTS / "cpu" / "parallel.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

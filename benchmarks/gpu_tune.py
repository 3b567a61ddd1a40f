"""Triton's blocks for this device, and which tiles are CUDA C++'s: `python -m benchmarks.gpu_tune` times some and writes what is
best into kernels/blocks.json and entropy_po/dispatch.json.

A block serves every width, so it is chosen over several shapes at once: the least geometric mean of time over bytes. So is the
number of rows up to which CUDA C++ goes first.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch
from triton import TritonError

from entropy_po import dispatch, tiles
from entropy_po.bench.timing import median_ms
from entropy_po.kernels.config import LaunchConfig
from entropy_po.kernels.launch import fold_, grad_
from entropy_po.tiles import bf16_overlay
from entropy_po.types import Level, Transform, new_state

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels" / "blocks.json"
RULE = ROOT / "entropy_po" / "dispatch.json"
SHAPES = [(8192, 32_768), (4096, 151_936), (512, 131_072)]
DTYPES = (torch.bfloat16, torch.float32)
BLOCKS = [
    LaunchConfig(block, warps, stages)
    for block, warps, stages in itertools.product((2048, 4096, 8192), (4, 8, 16), (2, 4))
    if 4 <= block // (32 * warps) <= 64
]


# of dispatch.json's entries: kernel, dtype, whether the gradient narrows
TILES = {
    "fold 2": ("fold", torch.bfloat16, False), "fold 4": ("fold", torch.float32, False),
    "grad 2": ("grad", torch.bfloat16, False), "grad 4": ("grad", torch.float32, False),
    "grad 4 into 2": ("grad", torch.float32, True),
}  # fmt: skip
ROWS, UNALIGNED_ROWS, COLUMNS = (32, 64, 128, 256, 512, 1024, 4096), (64, 1024), 131_072
DISPATCH_SECONDS = 30  # for all of them


def problem(n: int, v: int, dtype: torch.dtype, device: torch.device | str, aligned: bool = True) -> tuple:
    """(tile, labels, state, upstream gradient) that a launch takes."""
    tile = torch.randn(n, v if aligned else v + 1, device=device).to(dtype)[:, :v]
    labels = torch.randint(v, (n,), device=device)
    state = new_state(n, Level.ENTROPY, tile)
    fold_(tile, labels, 0, state, Transform(), level=Level.ENTROPY)
    return tile, labels, state, torch.full((n,), 1e-3, device=device)


def launch(kernel: str, config: LaunchConfig, tile, labels, state, upstream) -> tuple[partial, int]:
    """(the launch, the bytes that it moves)."""
    if kernel == "fold":
        run = partial(fold_, tile, labels, 0, state, Transform(), level=Level.ENTROPY, first=True, config=config)
        return run, tile.nbytes
    # as the hidden path has it: fp32 logits become a bf16 gradient in their own memory
    out = bf16_overlay(tile) if tile.dtype == torch.float32 else tile
    run = partial(grad_, tile, labels, 0, state, upstream, upstream, Transform(), out=out, config=config)
    return run, tile.nbytes + out.nbytes


def compile_one(kernel: str, dtype: torch.dtype, config: LaunchConfig) -> None:
    """Leaves the kernel in Triton's cache on disk. Neither rows nor width are part of what is compiled."""
    launch(kernel, config, *problem(16, SHAPES[0][1], dtype, "cuda"))[0]()


def compile_all(jobs: list[tuple[str, torch.dtype, LaunchConfig]], seconds: float) -> None:
    """A compilation takes seconds of one core, a timing less than one. What fails here, or is not reached, `timed` will meet."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = []
        with contextlib.suppress(BrokenProcessPool):  # one that dies takes the others along
            futures += (pool.submit(compile_one, *job) for job in jobs)
        done, _ = wait(futures, timeout=None if math.isinf(seconds) else max(seconds, 0))
        pool.shutdown(wait=False, cancel_futures=True)
    failed = sum(future.exception() is not None for future in done)
    print(f"{len(done)} blocks compiled, {failed} of them in vain, of {len(jobs)}", flush=True)


def timed(kernel: str, dtype: torch.dtype, config: LaunchConfig, problems: list) -> float:
    """Geometric mean over the shapes of the seconds per gigabyte; infinity where the device cannot launch it."""
    costs = []
    for found in problems:
        run, moved = launch(kernel, config, *found)
        try:
            costs.append(median_ms(run, rounds=5) / moved * 1e6)
        except (TritonError, RuntimeError) as error:  # out of shared memory or registers: not a block for this device
            print(f"  {kernel} {dtype} {config}: {type(error).__name__}: {error}")
            return math.inf
    return math.exp(sum(map(math.log, costs)) / len(costs))


def candidates(kernel: str, dtype: torch.dtype, old: LaunchConfig) -> list[LaunchConfig]:
    """Those to try, the present one first, the others in no order, so that any part of them is of all sizes. Stages mean nothing to
    a gradient that narrows."""
    narrows = kernel == "grad" and dtype == torch.float32
    blocks = [LaunchConfig(x.block_v, x.num_warps, old.num_stages) if narrows else x for x in BLOCKS]
    random.Random(0).shuffle(blocks)
    return list(dict.fromkeys([old, *blocks]))


def rows_of_cuda(costs: dict[int, tuple[float, float]]) -> int | None:
    """The number of rows up to which CUDA C++ goes first, None for any, from {rows: (its time, Triton's)}: the least geometric
    mean of what is then taken."""

    def cost(most: float) -> float:
        return sum(math.log(cuda if n <= most else triton) for n, (cuda, triton) in costs.items())

    most = min((0, *sorted(costs)[:-1], math.inf), key=cost)
    return None if math.isinf(most) else int(most)


def both_backends(name: str, n: int, aligned: bool, device: torch.device, blocks: dict) -> tuple[float, float]:
    """Milliseconds of a tile's launch in CUDA C++ and in Triton."""
    kernel, dtype, narrows = TILES[name]
    tile, labels, state, upstream = problem(n, COLUMNS, dtype, device, aligned)
    assert dispatch.aligned(tile) == aligned
    out = bf16_overlay(tile) if narrows else tile
    rest = (labels, 0, state, *((upstream, upstream) if kernel == "grad" else ()), Transform())
    options = {"out": out} if kernel == "grad" else {"level": Level.ENTROPY, "first": True}
    in_cuda, in_triton = (tiles.fold_, fold_) if kernel == "fold" else (tiles.grad_, grad_)
    config = LaunchConfig(*blocks[kernel][str(tile.itemsize)])
    return (
        median_ms(partial(in_cuda, tile, *rest, **options, backend=tiles.Backend.CUDA), rounds=3),
        median_ms(partial(in_triton, tile, *rest, **options, config=config), rounds=3),
    )


def tune_dispatch(device: torch.device, blocks: dict, end: float) -> None:
    """Writes the device's entry of dispatch.json, of which what is not reached by then stays as it was."""
    arch, table = dispatch.architecture(device), json.loads(RULE.read_text())
    found = dict(table.get(arch, table["default"]))
    for aligned in (True, False):
        for name in TILES:
            if time.monotonic() > end:
                print(f"{arch} {name}, {aligned=}: not measured, no time left")
                continue
            rows = ROWS if aligned else UNALIGNED_ROWS
            entry = name if aligned else f"{name} unaligned"
            try:
                costs = {n: both_backends(name, n, aligned, device, blocks) for n in rows}
            except (TritonError, RuntimeError) as error:  # the other entries are still worth having
                print(f"{arch} {entry}: {type(error).__name__}: {error}", flush=True)
                continue
            found[entry] = rows_of_cuda(costs)
            ratios = ", ".join(f"{n}: {cuda / triton:.2f}" for n, (cuda, triton) in costs.items())
            most = "any number of" if found[entry] is None else f"up to {found[entry]}"
            print(
                f"{arch} {entry}: CUDA C++ first at {most} rows (its time over Triton's, by rows: {ratios})", flush=True
            )
            write(RULE, {**table, arch: found})


def main() -> int:
    """The exit status: 1 where no block could be launched of one of the kernels."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tune", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of all kernels together, an even share for each"
    )
    arguments = parser.parse_args()
    end, left = time.monotonic() + arguments.seconds - DISPATCH_SECONDS, 2 * len(DTYPES)
    device = torch.device("cuda", torch.cuda.current_device())
    name, table = dispatch.architecture(device), json.loads(TABLE.read_text())
    before = table.get(name, table["default"])
    entry = {kernel: dict(before[kernel]) for kernel in ("fold", "grad")}
    configs = {
        (kernel, dtype): candidates(kernel, dtype, LaunchConfig(*before[kernel][str(dtype.itemsize)]))
        for dtype in DTYPES
        for kernel in entry
    }
    compile_all(
        [(*which, config) for which, found in configs.items() for config in found], (end - time.monotonic()) / 2
    )
    failed = False
    for dtype in DTYPES:
        problems = [problem(n, v, dtype, device) for n, v in (SHAPES[:1] if arguments.quick else SHAPES)]
        for kernel in entry:
            found, costs = configs[kernel, dtype], {}
            old = found[0]
            share, left = time.monotonic() + (end - time.monotonic()) / left, left - 1
            for config in found:
                if not costs or time.monotonic() < share:
                    costs[config] = timed(kernel, dtype, config, problems)
            best = min(costs, key=costs.get)
            if math.isinf(costs[best]):
                print(f"{kernel} {dtype}: none of {len(costs)} blocks could be launched; its entry is as it was.")
                failed = True
                continue
            entry[kernel][str(dtype.itemsize)] = [best.block_v, best.num_warps, best.num_stages]
            tried = f"{costs[old] / costs[best]:.3f} times as fast as {old}; {len(costs)} of {len(found)} tried"
            print(f"{name} {kernel} {dtype}: {best}, {tried}", flush=True)
            write(TABLE, {**table, name: entry})
    if tiles.unavailable_reason(tiles.Backend.CUDA) is None:
        tune_dispatch(device, entry, end + DISPATCH_SECONDS)
    return int(failed)


def write(path: Path, table: dict[str, dict]) -> None:
    """The whole table, an entry a line."""
    rows = [
        f'  "{arch}": {{\n' + ",\n".join(f'    "{k}": {json.dumps(v)}' for k, v in kernels.items()) + "\n  }"
        for arch, kernels in table.items()
    ]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())

"""Triton's blocks for this device: `python -m benchmarks.gpu_tune` times some and writes the best into kernels/blocks.json.

A block serves every width, so it is chosen over several shapes at once: the least geometric mean of time over bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from functools import partial
from pathlib import Path

import torch

from entropy_po.bench.timing import median_ms
from entropy_po.kernels.config import LaunchConfig, architecture
from entropy_po.kernels.launch import fold_, grad_
from entropy_po.tiles import bf16_overlay
from entropy_po.types import Level, Transform, new_state

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "blocks.json"
SHAPES = [(8192, 32_768), (4096, 151_936), (512, 131_072)]
DTYPES = (torch.bfloat16, torch.float32)
BLOCKS = [
    LaunchConfig(block, warps, stages)
    for block, warps, stages in itertools.product((2048, 4096, 8192), (4, 8, 16), (2, 4))
    if 4 <= block // (32 * warps) <= 64
]


def timed(kernel: str, dtype: torch.dtype, config: LaunchConfig, tiles: list) -> float:
    """Geometric mean over the shapes of the seconds per gigabyte; infinity where the device cannot launch it."""
    costs = []
    for tile, labels, state, upstream in tiles:
        if kernel == "fold":
            moved = tile.nbytes
            run = partial(fold_, tile, labels, 0, state, Transform(), level=Level.ENTROPY, config=config)
        else:
            # as the hidden path has it: fp32 logits become a bf16 gradient in their own memory
            out = bf16_overlay(tile) if dtype == torch.float32 else tile
            moved = tile.nbytes + out.nbytes
            run = partial(grad_, tile, labels, 0, state, upstream, upstream, Transform(), out=out, config=config)
        try:
            costs.append(median_ms(run, rounds=5) / moved * 1e6)
        except Exception as error:  # out of shared memory or registers: not a block for this device
            print(f"  {kernel} {dtype} {config}: {type(error).__name__}")
            return math.inf
    return math.exp(sum(map(math.log, costs)) / len(costs))


def candidates(kernel: str, dtype: torch.dtype, old: LaunchConfig) -> list[LaunchConfig]:
    """Those to try, the present one first. Stages mean nothing to a gradient that narrows."""
    narrows = kernel == "grad" and dtype == torch.float32
    blocks = [LaunchConfig(x.block_v, x.num_warps, old.num_stages) if narrows else x for x in BLOCKS]
    return list(dict.fromkeys([old, *blocks]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tune", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of all kernels together, an even share for each"
    )
    arguments = parser.parse_args()
    end, left = time.monotonic() + arguments.seconds, 2 * len(DTYPES)
    device = torch.device("cuda", torch.cuda.current_device())
    name, table = architecture(device), json.loads(TABLE.read_text())
    before = table.get(name, table["default"])
    entry = {kernel: dict(before[kernel]) for kernel in ("fold", "grad")}
    for dtype in DTYPES:
        tiles = []
        for n, v in SHAPES[:1] if arguments.quick else SHAPES:
            tile = torch.randn(n, v, device=device).to(dtype)
            labels = torch.randint(v, (n,), device=device)
            state = new_state(n, Level.ENTROPY, tile)
            fold_(tile, labels, 0, state, Transform(), level=Level.ENTROPY)
            tiles.append((tile, labels, state, torch.full((n,), 1e-3, device=device)))
        for kernel in ("fold", "grad"):
            old = LaunchConfig(*before[kernel][str(dtype.itemsize)])
            found, costs = candidates(kernel, dtype, old), {}
            share, left = time.monotonic() + (end - time.monotonic()) / left, left - 1
            for config in found:
                if not costs or time.monotonic() < share:
                    costs[config] = timed(kernel, dtype, config, tiles)
            best = min(costs, key=costs.get)
            entry[kernel][str(dtype.itemsize)] = [best.block_v, best.num_warps, best.num_stages]
            tried = f"{costs[old] / costs[best]:.3f} times as fast as {old}; {len(costs)} of {len(found)} tried"
            print(f"{name} {kernel} {dtype}: {best}, {tried}", flush=True)
            write({**table, name: entry})


def write(table: dict[str, dict]) -> None:
    """The whole table, a kernel a line."""
    rows = [
        f'  "{arch}": {{\n' + ",\n".join(f'    "{k}": {json.dumps(v)}' for k, v in kernels.items()) + "\n  }"
        for arch, kernels in table.items()
    ]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()

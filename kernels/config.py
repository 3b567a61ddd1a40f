"""What a launch needs besides the kernel: block, warps and lanes, and the transform's arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_po.dispatch import aligned, architecture
from entropy_po.types import Transform


@dataclass(frozen=True)
class LaunchConfig:
    """How a program walks its row."""

    block_v: int  # columns at a time; a power of two
    num_warps: int
    num_stages: int  # blocks on their way, the current one included

    def __post_init__(self) -> None:
        if self.block_v < 1 or self.block_v & (self.block_v - 1):
            raise ValueError(f"block_v={self.block_v} must be a power of two.")

    def lanes(self, tile: Tensor) -> tuple[int, int]:
        """(lanes, neighbours that a lane takes at once): 16 bytes to a thread, so that a lane is what one thread has."""
        width = min(16 // tile.itemsize, self.block_v)
        return min(self.num_warps * _threads_of_a_warp(tile.device), self.block_v // width), width


# Of blocks.json, by kernel and the bytes that are read per column, of a bias and a keep mask too, rounded up to 2, 4, 8 or 16;
# "default" serves what has no entry of its own. It takes 8 KiB of a row per block and four stages, so that 24 KiB are in
# flight while a block is summed (but not in a gradient that narrows: a barrier in a loop keeps Triton from fetching ahead,
# and other programs have to). A fold of bf16, which an H200 leaves 12 instructions per logit, takes 32 columns to a thread:
# what is done once per block weighs less. resources.json has the registers, memory and instructions of each.
# `python -m benchmarks.gpu_tune` times others and writes the entry of the device it runs on.
BLOCKS = Path(__file__).with_name("blocks.json")


@cache
def _block_table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(BLOCKS.read_text())


@cache
def _threads_of_a_warp(device: torch.device) -> int:
    return 32 if device.type != "cuda" else torch.cuda.get_device_properties(device).warp_size


def launch_config(kernel: str, tile: Tensor, transform: Transform) -> LaunchConfig:
    """The launch of "fold" or "grad" for a tile: the table's block, or one that just holds a narrower row."""
    table = _block_table()
    found = table.get(architecture(tile.device), table["default"])[kernel]
    read = (
        tile.itemsize + (0 if transform.bias is None else transform.bias.itemsize) + (transform.keep_mask is not None)
    )
    block_v, num_warps, num_stages = found[str(min(triton.next_power_of_2(read), 16))]
    fitting = min(triton.next_power_of_2(tile.shape[1]), block_v)
    return LaunchConfig(fitting, max(1, num_warps * fitting // block_v), num_stages)


def alignment(tile: Tensor, out: Tensor, keep: Tensor | None) -> dict[str, bool]:
    """What a kernel may take for granted of where rows begin and end; edges must be the same columns of the tile and the output."""
    rows = aligned(tile, out)
    alike = tile.itemsize == out.itemsize and (tile.stride(0) - out.stride(0)) * tile.itemsize % 16 == 0
    starts = rows or (alike and tile.data_ptr() % 16 == out.data_ptr() % 16 == 0)
    has_edges = starts and not (rows and tile.shape[1] % 16 == 0)
    return {"ALIGNED": starts, "HAS_EDGES": has_edges, "KEEP_ALIGNED": aligned(keep) and not has_edges}


def compiler_options(hip: bool = torch.version.hip is not None) -> dict[str, bool]:
    """Of every launch. A product and the sum it goes into are one instruction: Triton's default until 3.9, which warns of the next.
    And AMD's exponential is one, where five are taken for results below fp32's normal range, which are 0 here."""
    return {"enable_fp_fusion": True} | ({"allow_flush_denorm": True} if hip else {})


def transform_arguments(tile: Tensor, transform: Transform) -> dict[str, object]:
    """The kernel arguments that describe the transform."""
    temperature = 1.0 if transform.row_temperature is not None else transform.temperature
    slope_scale = transform.logit_scale / temperature
    scalars = {
        "k": slope_scale if transform.softcap is None else transform.softcap / temperature,
        "before_tanh": 0.0 if transform.softcap is None else transform.logit_scale / transform.softcap,
        "slope_scale": slope_scale,
    }
    if tile.dtype == torch.float64:  # a scalar argument is fp32 on the device; baked in, it keeps fp64's digits
        scalars = {name: tl.constexpr(value) for name, value in scalars.items()}
    keep = transform.keep_mask
    if keep is not None:
        keep = keep.expand(tile.shape)
        if tile.shape[1] > 1 and keep.stride(1) not in (0, 1):
            keep = keep.contiguous()
        keep = keep.view(torch.uint8)
    return {
        "bias_ptr": transform.bias,
        "keep_ptr": keep,
        "row_temperature_ptr": transform.row_temperature,
        "keep_stride": 0 if keep is None else keep.stride(0),
        **scalars,
        "HAS_SOFTCAP": transform.softcap is not None,
        "KEEP_STRIDE_V": 0 if keep is None or tile.shape[1] == 1 else keep.stride(1),
    }


def check_last_dim_contiguous(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its last dimension must be contiguous: {name}.contiguous()."
        )

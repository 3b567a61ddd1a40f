"""What a launch needs besides the kernel: block and warps, the transform's three scalars, alignment, the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_po.types import Transform


@dataclass(frozen=True)
class LaunchConfig:
    """How many columns of its row a program holds at a time, and on how many warps."""

    block_v: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.block_v < 1 or self.block_v & (self.block_v - 1):
            raise ValueError(f"block_v={self.block_v} must be a power of two.")


# Widest block by bytes per logit: at 32 columns a warp-step this is two or four 16-byte loads in flight per thread, and the
# accumulators of every level stay in registers (tests/test_kernels_triton.py compiles them all and counts spills).
WIDEST_BLOCK = {2: 8192, 4: 4096, 8: 1024}
COLUMNS_PER_WARP = {2: 512, 4: 512, 8: 128}


def launch_config(n_cols: int, dtype: torch.dtype) -> LaunchConfig:
    """The block for a tile of this width: one block where the row fits in one, else the widest."""
    block_v = min(triton.next_power_of_2(n_cols), WIDEST_BLOCK[dtype.itemsize])
    return LaunchConfig(block_v, num_warps=max(1, block_v // COLUMNS_PER_WARP[dtype.itemsize]))


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


def rows_aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these matrices starts on 16 bytes, which is what lets a lane load and store 16 at once."""
    return all(x is None or (x.data_ptr() | x.stride(0) * x.itemsize) % 16 == 0 for x in tensors)


def check_last_dim_contiguous(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous: {name}.contiguous().")


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return nullcontext() if tensor.device.type == "cpu" else torch.accelerator.device_index(tensor.device.index)

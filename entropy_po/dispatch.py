"""Which of the two GPU backends computes a tile where both are there: CUDA C++ or Triton, by kernel, dtype and shape.

The rule is dispatch.json, by architecture: up to how many rows of a tile CUDA C++ goes first, null for any number. It shares a row
among blocks where Triton has one program for each, and so leaves most of a GPU idle at few rows; and the edges of rows that begin
anywhere cost it less: Triton takes a block more for them, or reads element by element where the tensor itself begins so. "default"
follows from that alone, by counting; `python -m benchmarks.gpu_tune` measures, and writes the entry of the device it runs on.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("dispatch.json")
Rule = dict[str, int | None]


@cache
def architecture(device: torch.device) -> str:
    """The name a device goes by in the tables of measurements: sm_90, gfx942; "default" of what is no GPU."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:  # on NVIDIA's, gcnArchName is the name on the box
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Both launch on torch's current device, which need not be the tensor's."""
    return nullcontext() if tensor.device.type == "cpu" else torch.accelerator.device_index(tensor.device.index)


@cache
def rule(arch: str) -> Rule:
    """Of an architecture, or the default one."""
    table: dict[str, Rule] = json.loads(TABLE.read_text())
    return table.get(arch, table["default"])


def entry(kernel: Literal["fold", "grad"], tile: Tensor, out: Tensor | None = None) -> str:
    """What a tile's launch goes by in a rule: the kernel, the bytes of an element read and written, and whether rows are aligned."""
    name = f"{kernel} {tile.itemsize}"
    if out is not None and out.itemsize < tile.itemsize:
        name += f" into {out.itemsize}"
    return name if aligned(tile, out) else f"{name} unaligned"


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these matrices begins at a multiple of 16 bytes."""
    return all(x is None or (x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0) for x in tensors)


def cuda_goes_first(kernel: Literal["fold", "grad"], tile: Tensor, out: Tensor | None = None) -> bool:
    """Whether CUDA C++ rather than Triton computes a tile [n, v]."""
    most = rule(architecture(tile.device))[entry(kernel, tile, out)]
    return most is None or tile.shape[0] <= most

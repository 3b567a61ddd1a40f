"""The three matrix products of the hidden path, with tile values in fp32 whatever the operands are.

A bf16 product would round the logits to 8 bits (error 3e-2 at |z| = 10), which biases the entropy; so on CUDA the product
is asked for fp32 results, and on a CPU it multiplies fp32 copies of the operand tiles in the matrix unit's bf16 mode:
the inputs are exact, the sums and the result are fp32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from entropy_po.tiles import Backend, bf16_overlay
from entropy_po.types import state_dtype

_precision_lock = threading.Lock()


@contextmanager
def _bf16_matrix_unit(wanted: bool) -> Iterator[None]:
    """Multiply fp32 tiles in bf16, exactly what copies of bf16 operands hold. The setting is the process's, so it is held
    for one product under a lock, and other dtypes leave the user's own choice alone."""
    if not wanted:
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    with _precision_lock:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@cache
def native_bf16(device_type: str) -> bool:
    """Whether bf16 products run on bf16 hardware. Without it they are emulated, and fp32 is faster and more exact."""
    return device_type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def operand_copies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tiles of the operands are copied to fp32 before the product."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def operand(x: Tensor) -> Tensor:
    """`x` as `logits_tile` takes it."""
    return x.float() if operand_copies(x.dtype, x.device) else x


def logits_tile(hidden: Tensor, weight: Tensor, out: Tensor, model_dtype: torch.dtype) -> Tensor:
    """hidden [n, D] @ weight [v, D].T into `out` [n, v], fp32 (fp64 for fp64). Operands come from `operand`."""
    if hidden.dtype == out.dtype:
        with _bf16_matrix_unit(model_dtype == torch.bfloat16 and hidden.device.type == "cpu"):
            return torch.mm(hidden, weight.t(), out=out)
    return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)


def gradient_tile(tile: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """Where `grad_` writes: over the tile, narrowed to bf16 for bf16 operands, which are then multiplied natively."""
    narrow = dtype == torch.bfloat16 and backend is not Backend.TORCH and native_bf16(tile.device.type)
    return bf16_overlay(tile) if narrow else tile


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total (+)= left @ right. `total` of the operands' dtype takes one product; sums of several are kept in fp32.

    With half-precision operands each product is rounded once, as any half-precision GEMM's result is, before it is added.
    """
    if total.dtype == left.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif first:
        total.copy_(torch.mm(left, right))
    else:
        total += torch.mm(left, right)


def accumulator_dtype(dtype: torch.dtype, products: int) -> torch.dtype:
    """The dtype to sum `products` products in: fp32 as soon as there are two, so that chunking never costs digits."""
    return dtype if products == 1 else state_dtype(dtype)

"""What torch says of a GPU's matrix products where there is none: its rules for dtypes and shapes, on tensors without data."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from entropy_po.ops import gemm
from entropy_po.ops.lm_head import Operand
from entropy_po.types import state_dtype


@contextlib.contextmanager
def but_for_the_device():
    """Where torch was built without CUDA, what is no product asks for the device, and fails for that alone."""
    try:
        yield
    except RuntimeError as error:
        if "not linked with support for cuda" not in str(error):
            raise


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_torch_has_the_products_of_every_dtype(dtype, products, first):
    with FakeTensorMode():
        copied = torch.float32 if gemm.operand_copies(dtype, torch.device("cuda")) else dtype
        hidden, weight = (Operand(empty(n, 16, dtype=dtype), empty(n, 16, dtype=copied)) for n in (4, 7))
        # rows at a pitch, as the tiles of an odd vocabulary have them
        tile = empty(4, 8, dtype=state_dtype(dtype)).narrow(1, 0, 7)
        gemm.logits_tile(hidden.multiplied, weight.multiplied, tile, dtype, None)
        gradient = empty(4, 16, dtype=dtype).narrow(1, 0, 7) if dtype == torch.bfloat16 else tile
        for left, right in ((gradient, weight), (gradient.t(), hidden)):
            total = empty(left.shape[0], 16, dtype=gemm.accumulator_dtype(dtype, products))
            with but_for_the_device():
                gemm.add_product(
                    total, left, right.beside(gradient), first, lambda _, shape, dtype: empty(*shape, dtype=dtype)
                )

"""The C++ kernels of the CPU under the tests that the GPU's have to pass."""

import pytest
import torch
from tile_contract import *  # noqa: F403
from tile_contract import DEVICE, functions, test_the_least_number_may_stand_for_minus_inf

from entropy_po import tiles
from entropy_po.tiles import Backend

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the inputs of these tests are on a GPU here"),
    pytest.mark.skipif(tiles.unavailable_reason(Backend.CPP) is not None, reason="the C++ core was not built"),
]


@pytest.fixture
def kernels():
    return functions(Backend.CPP)


@pytest.mark.parametrize("order", [1, -1])
def test_the_least_number_is_no_trap_of_plain_torch_s_either(gen, order):
    test_the_least_number_may_stand_for_minus_inf(functions(Backend.TORCH), gen, torch.float32, order, 1.0)

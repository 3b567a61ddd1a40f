"""The C++ kernels of the CPU under the tests that the GPU's have to pass."""

import pytest
from tile_contract import *  # noqa: F403
from tile_contract import DEVICE, functions

from entropy_po import tiles
from entropy_po.tiles import Backend

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the inputs of these tests are on a GPU here"),
    pytest.mark.skipif(tiles.unavailable_reason(Backend.CPP) is not None, reason="the C++ core was not built"),
]


@pytest.fixture
def kernels():
    return functions(Backend.CPP)

"""Fixtures for all tests: fresh but reportable seeds, and NaN in every tensor the package leaves uninitialised."""

import os
import sys
from collections import Counter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that share two cores must not spin at their barriers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from entropy_po import pages

pytest.register_assert_rewrite("tile_contract")

PACKAGE = f"{os.sep}entropy_po{os.sep}"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def seed(request):
    """A new seed each run; a failure shows it, and ENTROPY_PO_TEST_SEED brings it back."""
    value = int(os.environ.get("ENTROPY_PO_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    print(f"ENTROPY_PO_TEST_SEED={value}")
    return value


@pytest.fixture
def operator_calls():
    """How often each operator of this package ran, by name: a fast path that is not taken shows as a missing name."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "entropy_po":
                calls[func.__name__.removesuffix(".default")] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        yield calls


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty, empty_like and new_empty give NaN when the package calls them: an element left unwritten shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def nan_filled(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            if PACKAGE in sys._getframe(1).f_code.co_filename and tensor.is_floating_point():
                tensor.fill_(torch.nan)
            return tensor

        monkeypatch.setattr(owner, name, nan_filled)
    monkeypatch.setattr(pages, "block", lambda: None)  # a workspace left by an earlier call is none of them

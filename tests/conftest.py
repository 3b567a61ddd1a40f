"""Fixtures for all tests: fresh but reportable seeds, and NaN in every tensor the package leaves uninitialised."""

import os
import sys
import zlib
from collections import Counter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that share two cores must not spin at their barriers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from entropy_po import pages

pytest.register_assert_rewrite("tile_contract")

PACKAGE = f"{os.sep}entropy_po{os.sep}"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """New inputs each run; ENTROPY_PO_TEST_SEED, inherited by the processes that tests start, brings a run's back."""
    run = os.environ.setdefault("ENTROPY_PO_TEST_SEED", str(int.from_bytes(os.urandom(4), "little")))
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = run


def pytest_report_header():
    return f"the inputs of this run again: ENTROPY_PO_TEST_SEED={os.environ['ENTROPY_PO_TEST_SEED']}"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(pytest_report_header())


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def seed(request):
    """Another number for each test and each run."""
    value = zlib.crc32(f"{os.environ['ENTROPY_PO_TEST_SEED']} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def gen(seed):
    """A generator of the test's own."""
    return torch.Generator().manual_seed(seed)


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

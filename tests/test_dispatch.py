"""Which of the two GPU backends computes a tile: the rule, and that every way to override it does."""

import itertools
import json

import pytest
import torch

from entropy_po import describe, dispatch, tiles
from entropy_po.types import Level, Transform, new_state


def tile(n, v=131_072, dtype=torch.bfloat16, pitch=None):
    return torch.empty_strided((n, v), (pitch or v, 1), dtype=dtype, device="meta")


def test_every_launch_has_an_entry():
    table = json.loads(dispatch.TABLE.read_text())
    made = set()
    for kernel, dtype, pitch in itertools.product(("fold", "grad"), tiles.DTYPES, (4096, 4097)):
        x = tile(4, 4096, dtype, pitch)
        made.add(dispatch.entry(kernel, x, x if kernel == "grad" else None))
    for pitch in (4096, 4097):
        x = tile(4, 4096, torch.float32, pitch)
        narrow = torch.empty_strided((4, 4096), (2 * pitch, 1), dtype=torch.bfloat16, device="meta")
        made.add(dispatch.entry("grad", x, narrow))
    for arch, rule in table.items():
        assert rule.keys() == made, arch
        assert all(most is None or most >= 0 for most in rule.values()), arch


def test_the_default_rule():
    assert dispatch.cuda_goes_first("fold", tile(256)) and not dispatch.cuda_goes_first("fold", tile(257))
    assert dispatch.cuda_goes_first("grad", tile(16_384, 50_257), tile(16_384, 50_257))  # rows not 16 bytes apart
    wide = tile(64, 4096, torch.float32)
    assert dispatch.cuda_goes_first("grad", wide, wide)
    narrow = torch.empty_strided((64, 4096), (8192, 1), dtype=torch.bfloat16, device="meta")
    assert not dispatch.cuda_goes_first("grad", wide, narrow)  # which no backend splits


@pytest.fixture
def usable(monkeypatch):
    """Sets which backends are, and what the environment names."""
    cached = (tiles.unavailable_reason, tiles.chosen_by_tile, tiles.default_backend)

    def clear():
        for function in cached[1:]:
            function.cache_clear()

    def choose(*names, override=None):
        monkeypatch.setattr(tiles, "unavailable_reason", lambda backend: None if backend.value in names else "no")
        if override:
            monkeypatch.setenv(tiles.OVERRIDE, override)
        else:
            monkeypatch.delenv(tiles.OVERRIDE, raising=False)
        clear()

    yield choose
    monkeypatch.undo()
    clear()


def test_a_tile_chooses_where_both_are_usable_and_nobody_names_one(usable):
    cuda = torch.device("cuda")
    usable("triton", "cuda", "torch")
    assert tiles.resolve_backend(None, cuda) is None and tiles.resolve_backend("", cuda) is None
    assert tiles.resolve_backend("triton", cuda) is tiles.Backend.TRITON
    usable("cpp", "triton", "cuda", "torch")
    assert tiles.resolve_backend(None, torch.device("cpu")) is tiles.Backend.CPP
    assert describe()["dispatch"] == {"default": dispatch.rule("default")}
    usable("triton", "cuda", "torch", override="cuda")
    assert tiles.resolve_backend(None, cuda) is tiles.Backend.CUDA and describe()["dispatch"] == {}
    usable("triton", "cuda", "cpp", "torch", override="cpp")  # which serves no GPU
    assert tiles.resolve_backend(None, cuda) is None
    usable("triton", "torch")
    assert tiles.resolve_backend(None, cuda) is tiles.Backend.TRITON and describe()["dispatch"] == {}
    usable("cuda", "torch")
    assert tiles.resolve_backend(None, cuda) is tiles.Backend.CUDA


@pytest.mark.parametrize("first", ["cuda", "triton"])
def test_fold_and_grad_ask_for_each_tile(monkeypatch, first):
    asked, ran = [], []

    def choice(kernel, tile, out=None):
        asked.append((kernel, tile.shape, out))
        return first == "cuda"

    class Core:
        def __getattr__(self, name):
            return lambda *args, **kwargs: ran.append("cuda") if name in ("cuda_fold", "cuda_grad") else 0

    class Kernels:
        def fold_(self, *args, **kwargs):
            ran.append("triton")

        grad_ = fold_

    monkeypatch.setattr(dispatch, "cuda_goes_first", choice)
    monkeypatch.setattr(tiles, "compiled_core", Core)
    monkeypatch.setattr(tiles, "triton_kernels", Kernels)
    monkeypatch.setattr(tiles, "_tile_args", lambda *args: None)
    monkeypatch.setattr(tiles, "_cuda_stream", lambda tile: (0, 0))
    x, labels = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    state, out = new_state(3, Level.ENTROPY, x), torch.empty(3, 5)
    tiles.fold_(x, labels, 0, state, Transform(), level=Level.ENTROPY, backend=None)
    tiles.grad_(x, labels, 0, state, None, None, Transform(), out=out, backend=None)
    assert ran == [first, first]
    assert [kernel for kernel, *_ in asked] == ["fold", "grad"] and asked[1][2] is out


def test_rows_are_aligned_by_where_they_begin_and_how_far_they_lie_apart():
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert dispatch.aligned(x, None, x[1:, 8:])
    assert not dispatch.aligned(x[:, 1:])  # two bytes in: nothing may be read there as a word
    assert not dispatch.aligned(x, x[:, :63].clone())

"""The tile plan: within its budget, every element once, and a refusal that says what would do."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_po.ops.sequences import default_workspace
from entropy_po.plan import (
    DEFAULT_GPU_WORKSPACE,
    MIN_TILE_SIDE,
    ROW_BLOCK,
    _largest,
    even_size,
    plan_sequences,
    plan_tiles,
    row_slices,
    tile_bytes,
)

SIZES = st.one_of(st.integers(0, 70), st.integers(0, 40_000))
VOCABULARIES = st.one_of(st.integers(1, 70), st.integers(1, 300_000), st.sampled_from([32_768, 50_257, 151_936]))
HIDDEN = st.sampled_from([0, 1, 7, 64, 576, 4096])
BUDGETS = st.integers(0, 1 << 30)


def planned_or_none(n, v, d, element, operand_copies, workspace_bytes):
    try:
        return plan_tiles(n, v, d, element=element, operand_copies=operand_copies, workspace_bytes=workspace_bytes)
    except ValueError:
        return None


@settings(max_examples=300, deadline=None)
@given(SIZES, VOCABULARIES, HIDDEN, st.sampled_from([4, 8]), st.booleans(), BUDGETS)
def test_a_plan_keeps_its_budget_and_covers_every_element_once(n, v, d, element, copies, budget):
    plan = planned_or_none(n, v, d, element, copies, budget)
    if plan is None:
        return
    assert 1 <= plan.rows <= max(n, 1) and 1 <= plan.cols <= v
    assert plan.workspace_bytes == tile_bytes(plan.rows, plan.cols, d, element=element, operand_copies=copies)
    assert plan.workspace_bytes <= budget
    for slices, size in ((plan.row_slices(), max(n, 1)), (plan.col_slices(), v)):
        end = 0
        for s in slices:
            assert s.start == end and s.stop > s.start and s.step is None
            end = s.stop
        assert end == size
    assert plan.one_row_tile == (len(list(plan.row_slices())) == 1)


@settings(max_examples=200, deadline=None)
@given(SIZES, VOCABULARIES, HIDDEN, st.sampled_from([4, 8]), st.booleans(), st.integers(0, 1 << 20))
def test_a_refusal_names_the_least_budget_that_is_accepted(n, v, d, element, copies, budget):
    try:
        plan_tiles(n, v, d, element=element, operand_copies=copies, workspace_bytes=budget)
    except ValueError as error:
        named, least = map(int, re.search(r"workspace_bytes=(\d+) .* at least (\d+) ", str(error)).groups())
        assert named == budget < least
        assert planned_or_none(n, v, d, element, copies, least) is not None
        assert planned_or_none(n, v, d, element, copies, least - 1) is None


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 100_000), st.sampled_from([16, 576]), st.integers(1 << 16, 1 << 28))
def test_a_bigger_budget_never_takes_more_passes(n, v, d, budget):
    def passes(b):
        plan = planned_or_none(n, v, d, 4, True, b)
        if plan is None:
            return math.inf
        return math.ceil(n / plan.rows) * math.ceil(v / plan.cols)

    # equal tiles in blocks of 64 columns cost at most one tile more along a side
    plan = planned_or_none(n, v, d, 4, True, budget)
    sides = 0 if plan is None else math.ceil(n / plan.rows) + math.ceil(v / plan.cols)
    assert passes(2 * budget) <= passes(budget) + sides


# n, v, d, budget -> rows, cols; fp32, no operand copies
TABLE = [
    (8, 100, 4, 1 << 20, 8, 100),  # all of it fits
    (4096, 32_768, 576, 1 << 40, 4096, 32_768),
    (0, 100, 4, 1 << 20, 1, 100),  # nothing to do still has a plan
    (1, 151_936, 64, 64 << 20, 1, 75_968),  # one row: columns alone are cut, in two, at a multiple of 64
    (5000, 32_768, 576, 64 << 20, 2508, 3328),  # two of whole blocks, and not of 2,500 rows
]


@pytest.mark.parametrize("n, v, d, budget, rows, cols", TABLE)
def test_table(n, v, d, budget, rows, cols):
    plan = plan_tiles(n, v, d, element=4, operand_copies=False, workspace_bytes=budget)
    assert (plan.rows, plan.cols) == (rows, cols)


def test_the_least_tile_is_16_by_16():
    need = tile_bytes(MIN_TILE_SIDE, MIN_TILE_SIDE, 8, element=4, operand_copies=True)
    assert need == 4 * (256 + 128 + 128 + 256)
    plan = plan_tiles(1000, 1000, 8, element=4, operand_copies=True, workspace_bytes=need)
    assert (plan.rows, plan.cols) == (MIN_TILE_SIDE, MIN_TILE_SIDE)
    with pytest.raises(ValueError, match=f"workspace_bytes={need - 1} holds no tile; give at least {need}"):
        plan_tiles(1000, 1000, 8, element=4, operand_copies=True, workspace_bytes=need - 1)


@given(st.integers(1, 100_000), st.integers(1, 3000), st.sampled_from([1, *ROW_BLOCK.values()]))
def test_even_pieces_are_the_fewest_and_in_whole_blocks_where_those_fit(length, most, block):
    size = even_size(length, most, block)
    fewest = math.ceil(length / most)
    assert size <= most and math.ceil(length / size) <= fewest
    assert size % block == 0 or size == most


def test_tiles_of_rows_are_whole_blocks_of_the_device():
    """2 x 512 tokens at V 151936, D 1024 in 256 MiB: 86 blocks of 12 rows, where three even tiles would take 87."""
    assert [part.stop - part.start for part in row_slices(0, 1024, 435, "cpu")] == [348, 348, 328]
    for gpu in ("cuda", "xpu"):
        assert [part.stop - part.start for part in row_slices(100, 1124, 435, gpu)] == [384, 384, 256]
    assert list(row_slices(7, 7, 435, "cpu")) == []


@given(st.integers(1, 1000), st.integers(0, 1200))
def test_the_bisection_finds_the_last_that_fits(upper, limit):
    assert _largest(lambda k: k <= limit, upper) == min(max(limit, 1), upper)


# --- losses over sequences


@pytest.mark.parametrize("device_type", ["cuda", "xpu"])
def test_a_gpu_s_default_is_a_share_of_what_is_free(device_type, monkeypatch):
    """Of what torch's allocator has in reserve, too; made-up numbers, by the functions that torch has for either kind."""
    module = torch.get_device_module(device_type)
    monkeypatch.setattr(module, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    monkeypatch.setattr(module, "memory_reserved", lambda device: 30 << 30)
    monkeypatch.setattr(module, "memory_allocated", lambda device: 10 << 30)
    device = torch.device(device_type, 0)
    assert default_workspace(device, any_shape=False) == 15 << 30
    assert default_workspace(device, any_shape=True) == DEFAULT_GPU_WORKSPACE


@given(
    st.lists(st.integers(0, 400), max_size=12).map(lambda x: x[: len(x) // 2 * 2]),
    st.sampled_from(["auto", "resident", "deferred", "recompute"]),
    st.integers(1_000, 3_000_000),
    st.booleans(),
    st.booleans(),
)
def test_every_sequence_is_in_one_group_and_tiles_keep_the_budget(lengths, strategy, workspace, trained, anchored):
    plan = plan_sequences(
        lengths, 1000, 16, coupled=2, element=4, trained=trained, workspace_bytes=workspace, strategy=strategy,
        can_defer=True, anchored=anchored,
    )  # fmt: skip
    choice = plan.choice
    assert choice.reason and (strategy == "auto" or choice.name == strategy)
    if choice.name == "recompute":
        assert plan.groups == ()
        return
    covered = sorted(i for group in plan.groups for i in range(group.start, group.stop))
    assert covered == list(range(len(lengths)))
    assert [group.deferred for group in plan.groups] == sorted((g.deferred for g in plan.groups), reverse=True)
    for group in plan.groups:
        rows = sum(lengths[group.start : group.stop])
        assert group.start % 2 == group.stop % 2 == 0
        if group.deferred:
            assert group.stop == group.start + 2
        else:
            assert rows <= choice.tile_rows
    if strategy == "auto":
        assert choice.tile_rows * 4 * (1000 + 32) + choice.extra_bytes <= workspace
        second_sum = sum(group.deferred for group in plan.groups) > 1 or (choice.name == "deferred" and anchored)
        assert (choice.extra_bytes > 0) == (trained and second_sum)


def test_the_choice_follows_lengths_budget_and_head():
    def chosen(lengths, budget, trained=True, **options):
        return plan_sequences(
            lengths, 50_000, 1000, coupled=2, element=4, trained=trained, workspace_bytes=budget, **options
        ).choice

    assert chosen([500] * 4, 256 << 20).name == "resident"
    assert chosen([5000] * 2, 256 << 20, can_defer=True).name == "deferred"
    assert chosen([5000] * 2, 256 << 20).name == "recompute"  # not one number per group
    two_long = chosen([5000] * 4, 220_000_000, can_defer=True)
    assert two_long.name == "recompute" and two_long.extra_bytes == 200_000_000 and "second sum" in two_long.reason
    assert chosen([5000] * 4, 220_000_000, trained=False, can_defer=True).name == "deferred"
    assert chosen([5000] * 4, 1 << 30, can_defer=True).name == "deferred"
    assert chosen([5000] * 2, 220_000_000, can_defer=True, anchored=True).name == "recompute"
    assert "no gradient" in chosen([500] * 4, 256 << 20, wanted=False).reason
    assert chosen([3, 3], 256 << 20).name == "resident"  # fewer rows than a long pair's tile wants, but all there are


def test_short_groups_share_tiles_of_even_size():
    plan = plan_sequences([50] * 20, 1000, 16, coupled=2, element=4, trained=True, workspace_bytes=600 * 4 * 1032)
    assert [group.stop - group.start for group in plan.groups] == [10, 10]

"""The tile plan: within its budget, every element once, and a refusal that says what would do."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_po.plan import MIN_TILE_SIDE, _largest, plan_tiles, tile_bytes

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
    assert plan.one_col_tile == (len(list(plan.col_slices())) == 1)


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


@given(st.integers(1, 1000), st.integers(0, 1200))
def test_the_bisection_finds_the_last_that_fits(upper, limit):
    assert _largest(lambda k: k <= limit, upper) == min(max(limit, 1), upper)

"""What must hold for any shape, stride, dtype, offset, order, cut and thread count; hypothesis looks for exceptions.

Equalities between two runs of the same code are exact wherever rows are independent and sums are in the same order.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import stats as exact_stats

from entropy_po import linear_token_stats, reference, tiles, token_stats
from entropy_po.testing import SCALES, assert_within_reference_error, make_head, make_labels, make_logits
from entropy_po.tiles import Backend
from entropy_po.types import Level, TokenStats, Transform, new_state, stats_from_state

ALL = TokenStats._fields
CORE = tiles.compiled_core()
VARIANTS = [(Backend.CPP, isa) for isa in (CORE.cpu_isas() if CORE else [])] + [(Backend.TORCH, "")]
NATS = 4e-6  # 2^-18: what two fp32 runs that sum in another order may differ by at log p near -10

QUICK = settings(max_examples=40, deadline=None)
ROWS = st.integers(0, 9)
VOCABULARIES = st.one_of(st.integers(1, 70), st.integers(1000, 1100), st.integers(2040, 2060))
SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Hundreds of small calls: on a busy machine a second thread would wait for a core at each barrier."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same_stats(ours, other, outputs=ALL):
    """Two fp32 runs that sum in another order. lse and mean_logit are sums relative to the maximum, and carry its size."""
    for name in outputs:
        a, b = getattr(ours, name), getattr(other, name)
        if a.dtype == torch.bool:
            assert torch.equal(a, b), name
            continue
        scale = (
            torch.ones_like(a) if other.lse is None else other.lse.abs() if name in ("lse", "mean_logit") else a.abs()
        )
        assert ((a - b).abs() <= NATS * (1 + scale)).all(), name


@QUICK
@given(SEEDS, ROWS, VOCABULARIES, DTYPES, st.sampled_from(SCALES), st.sampled_from(["cpp", "torch"]))
def test_any_shape_and_dtype_is_no_worse_than_torch(seed, n, v, dtype, scale, backend):
    generator = seeded(seed)
    logits = make_logits(scale, n, v, dtype, generator)
    labels = make_labels(logits, generator)
    g = torch.randn(2, n, generator=generator)
    results = []
    for x, function in (
        (logits.clone(), lambda x: token_stats(x, labels, backend=backend)),
        (logits.clone(), lambda x: reference.token_stats(x, labels, Transform())),
        (logits.double(), lambda x: exact_stats(x, labels)),
    ):
        stats = function(x.requires_grad_())
        (stats[0] @ g[0].to(stats[0].dtype) + stats[1] @ g[1].to(stats[1].dtype)).backward()
        results.append((stats[0].detach(), stats[1].detach(), x.grad))
    for i, unit in ((0, 1.0), (1, 1.0), (2, g.abs().max().item() / v if n else 0.0)):
        ours, theirs, exact = (r[i] for r in results)
        if dtype == torch.float64:  # the oracle rounds as well: both are within its own error of 1e4
            assert (ours - exact).abs().max().item() <= 1e-10 * (1 + exact.abs().max().item()) if n else True
        else:
            assert_within_reference_error(ours, theirs, exact, factor=4, unit=unit, name=("logps", "entropy", "d")[i])


@QUICK
@given(SEEDS, st.integers(1, 6), VOCABULARIES, st.integers(1, 3), st.integers(0, 5), DTYPES)
def test_strides_change_nothing(seed, n, v, step, pad, dtype):
    generator = seeded(seed)
    values = make_logits("fresh", n, v, dtype, generator)
    labels = make_labels(values, generator)
    wide = torch.full((n, (v + pad) * step), torch.nan, dtype=dtype)
    strided = wide[:, pad * step :: step]
    strided.copy_(values)
    for a, b in zip(token_stats(strided, labels, outputs=ALL), token_stats(values, labels, outputs=ALL), strict=True):
        assert torch.equal(a, b)


@QUICK
@given(SEEDS, st.integers(1, 5), VOCABULARIES, st.sampled_from([1e4, -1e4, 3000.0]), st.floats(0.3, 3.0))
def test_a_common_offset_changes_nothing(seed, n, v, offset, temperature):
    generator = seeded(seed)
    logits = torch.randint(-128, 129, (n, v), generator=generator) / 32  # exact beside 1e4 in fp32
    labels = make_labels(logits, generator)
    inputs = [(logits + c).requires_grad_() for c in (0.0, offset)]
    assert torch.equal(inputs[1].detach() - offset, logits)
    both = [token_stats(x, labels, temperature=temperature) for x in inputs]
    for _x, stats in zip(inputs, both, strict=True):
        (stats.logps + stats.entropy).sum().backward()
    # without FMA, z = x / T is rounded at 1e4 before the maximum leaves it
    bound = NATS * 4 if not CORE or CORE.cpu_isas()[0] != "baseline" else 5e-3
    for i in range(2):
        assert (both[0][i] - both[1][i]).abs().max() <= bound
    assert (inputs[0].grad - inputs[1].grad).abs().max() <= bound


@QUICK
@given(SEEDS, st.integers(1, 5), VOCABULARIES, st.sampled_from(SCALES))
def test_the_order_of_the_vocabulary_changes_nothing(seed, n, v, scale):
    generator = seeded(seed)
    logits = make_logits(scale, n, v, generator=generator)
    labels = make_labels(logits, generator)
    order = torch.randperm(v, generator=generator)
    shuffled_labels = torch.argsort(order)[labels]
    inputs = [logits.clone().requires_grad_(), logits[:, order].clone().requires_grad_()]
    both = [token_stats(x, y, outputs=ALL) for x, y in zip(inputs, (labels, shuffled_labels), strict=True)]
    assert_same_stats(*both)
    for _x, stats in zip(inputs, both, strict=True):
        (stats.logps + stats.entropy).sum().backward()
    assert (inputs[0].grad[:, order] - inputs[1].grad).abs().max() <= NATS


@pytest.mark.parametrize("backend, isa", VARIANTS)
@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(2, 2100), st.integers(1, 7), st.sampled_from(SCALES))
def test_tiles_cut_anywhere_and_taken_in_any_order(backend, isa, seed, n, v, pieces, scale):
    generator = seeded(seed)
    logits = make_logits(scale, n, v, generator=generator)
    labels = make_labels(logits, generator)
    inner = torch.randint(1, v, (pieces - 1,), generator=generator).tolist()
    cuts = sorted({0, v, *inner})
    parts = list(itertools.pairwise(cuts))
    order = [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    whole, split = new_state(n, Level.EXTRAS, logits), new_state(n, Level.EXTRAS, logits)
    tiles.fold_(logits, labels, 0, whole, Transform(), level=Level.EXTRAS, backend=backend, isa=isa)
    for a, b in order:
        tiles.fold_(logits[:, a:b], labels, a, split, Transform(), level=Level.EXTRAS, backend=backend, isa=isa)
    assert torch.equal(whole[0], split[0]) and torch.equal(whole[4], split[4])  # maximum and label: no sum, no rounding
    assert_same_stats(stats_from_state(split, ALL), stats_from_state(whole, ALL))
    # the gradient of a tile is that of its columns in the whole, bit for bit but for where a block of SIMD ends
    g = torch.randn(2, n, generator=generator)
    out, joined = torch.empty_like(logits), torch.empty_like(logits)
    for target, where in ((out, [(0, v)]), (joined, order)):
        for a, b in where:
            tiles.grad_(
                logits[:, a:b], labels, a, whole, g[0], g[1], Transform(), out=target[:, a:b], backend=backend, isa=isa
            )
    assert (out - joined).abs().max() <= 4e-7 * g.abs().max()


@QUICK
@given(SEEDS, st.integers(1, 40), st.integers(1, 300), st.integers(1, 24), st.integers(9, 20), st.booleans())
def test_the_budget_changes_nothing(seed, n, v, d, log_budget, half):
    generator = seeded(seed)
    dtype = torch.bfloat16 if half else torch.float32
    hidden, weight, labels = make_head("fresh", n, v, d, dtype, generator)
    labels[torch.rand(n, generator=generator) < 0.2] = -100
    g = torch.randn(2, n, generator=generator)
    results = []
    for budget in (None, 2**log_budget):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        try:
            stats = linear_token_stats(h, w, labels, workspace_bytes=budget)
        except ValueError as error:
            assert "holds no tile" in str(error)
            return
        (stats.logps @ g[0] + stats.entropy @ g[1]).backward()
        results.append((stats, h.grad.double(), w.grad.double()))
    (one, *gradients_one), (many, *gradients_many) = results
    for i in range(2):
        assert (one[i] - many[i]).abs().max() <= NATS
    for a, b in zip(gradients_one, gradients_many, strict=True):
        assert (a - b).norm() <= (1e-2 if half else 1e-5) * (a.norm() + 1e-3 * g.norm())


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 4000), st.sampled_from([2, 3]))
def test_the_number_of_threads_changes_nothing_at_all(seed, n, v, threads):
    generator = seeded(seed)
    logits = make_logits("trained", n, v, generator=generator)
    labels = make_labels(logits, generator)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (before, threads):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            stats = token_stats(x, labels, outputs=ALL)
            (stats.logps + 0.3 * stats.entropy).sum().backward()
            results.append((*stats, x.grad))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@QUICK
@given(SEEDS, st.integers(2, 12), st.integers(1, 1500), st.sampled_from(SCALES))
def test_a_row_does_not_depend_on_its_neighbours(seed, n, v, scale):
    generator = seeded(seed)
    logits = make_logits(scale, n, v, generator=generator)
    labels = make_labels(logits, generator)
    together = token_stats(logits, labels, outputs=ALL)
    poisoned = logits.clone()
    poisoned[1:] = torch.nan
    alone, beside_nan = token_stats(logits[:1], labels[:1], outputs=ALL), token_stats(poisoned, labels, outputs=ALL)
    for a, b, c in zip(together, alone, beside_nan, strict=True):
        assert torch.equal(a[:1], b) and torch.equal(a[:1], c[:1])


@QUICK
@given(SEEDS, st.integers(1, 6), st.integers(1, 1500), st.lists(st.sampled_from(ALL), min_size=1, unique=True))
def test_an_output_does_not_depend_on_what_else_is_asked_for(seed, n, v, outputs):
    """Each level of the fold is a separate compiled variant; all of them must be the same sum."""
    generator = seeded(seed)
    logits = make_logits("fresh", n, v, generator=generator)
    labels = make_labels(logits, generator)
    some, everything = token_stats(logits, labels, outputs=tuple(outputs)), token_stats(logits, labels, outputs=ALL)
    assert [name for name in ALL if getattr(some, name) is not None] == [name for name in ALL if name in outputs]
    assert_same_stats(some, everything, outputs)


@QUICK
@given(SEEDS, st.integers(1, 6), st.integers(2, 1500))
def test_a_mask_is_the_same_as_the_entries_not_being_there(seed, n, v):
    generator = seeded(seed)
    logits = make_logits("fresh", n, v, generator=generator)
    keep = torch.rand(v, generator=generator) < 0.5
    keep[torch.randint(v, (1,), generator=generator)] = True
    kept = keep.nonzero()[:, 0]
    position = torch.randint(len(kept), (n,), generator=generator)
    full, short = logits.clone().requires_grad_(), logits[:, kept].clone().requires_grad_()
    masked = token_stats(full, kept[position], outputs=ALL, keep_mask=keep)
    without = token_stats(short, position, outputs=ALL)
    assert_same_stats(masked, without)
    for stats in (masked, without):
        (stats.logps + stats.entropy).sum().backward()
    assert (full.grad[:, ~keep] == 0).all()
    assert (full.grad[:, kept] - short.grad).abs().max() <= NATS


@QUICK
@given(SEEDS, st.integers(1, 6), st.integers(1, 400), st.floats(0.4, 2.5), st.floats(0.5, 2.0))
def test_temperature_and_scale_are_one_factor(seed, n, v, temperature, scale):
    generator = seeded(seed)
    logits = make_logits("fresh", n, v, generator=generator)
    labels = make_labels(logits, generator)
    rows = torch.full((n,), temperature, dtype=torch.float64)
    both = token_stats(logits, labels, temperature=temperature, logit_scale=scale)
    per_row = token_stats(logits, labels, temperature=rows, logit_scale=scale)
    factor = token_stats(logits.double() * scale / temperature, labels)
    for i in range(2):
        assert (both[i] - per_row[i]).abs().max() <= NATS
        assert (both[i] - factor[i]).abs().max() <= NATS


@QUICK
@given(SEEDS, st.integers(1, 5), st.integers(1, 300))
def test_bounds_that_any_distribution_keeps(seed, n, v):
    logits = make_logits("trained", n, v, generator=seeded(seed))
    labels = make_labels(logits, seeded(seed))
    stats = token_stats(logits, labels, outputs=ALL)
    log_v = torch.tensor(float(v)).log()
    assert (stats.logps <= NATS).all()
    assert (stats.entropy >= 0).all() and (stats.entropy <= log_v + NATS).all()
    assert (stats.log_sum_sq_probs <= NATS).all() and (stats.log_sum_sq_probs >= -log_v - NATS).all()
    assert (stats.entropy >= -stats.log_sum_sq_probs - NATS).all()  # Shannon is at least Renyi-2
    top = logits.argmax(-1) == labels
    assert (stats.is_top1 >= top).all()

"""What every GPU backend of the tile interface must do, judged by the fp64 specification: tests to import.

A file that imports them all gives them a fixture `kernels` with `fold_`, `grad_` and `stats` as in `entropy_po.tiles`. With a
GPU the kernels run on it; without one, on whatever that file has to run them on the CPU.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from entropy_po import reference, tiles
from entropy_po.types import (
    EMPTY,
    IGNORED,
    STATE_ROWS,
    Level,
    TokenStats,
    Transform,
    merge_states,
    new_state,
    state_column,
    state_dtype,
    stats_from_state,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATS = ("logps", "entropy", "lse", "is_top1", "mean_logit", "log_sum_sq_probs")
V = 331  # Triton: a whole block of 256 and a tail of 75; CUDA: vectors, and an edge on either side
LIVE = V * 4 // 5  # where the "holes" rows begin to be above -inf: past the first block
VOCAB_START = 1000
KINDS = ("fresh", "peaked", "wide", "equal", "holes", "offset")
ROWS_EACH = 3


def randn(gen, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).to(DEVICE)


def make_logits(gen, dtype, v=V, kinds=KINDS):
    """[ROWS_EACH * len(kinds), v] logits, and labels of which half are the row's largest entry."""
    n = ROWS_EACH
    z = {kind: torch.randn(n, v, generator=gen, dtype=torch.float64) for kind in kinds}
    if "fresh" in z:
        z["fresh"] *= 0.02  # an untrained head
    if "peaked" in z:
        z["peaked"][torch.arange(n), torch.randint(v, (n,), generator=gen)] += 17.0  # p(label) > 0.999
    if "wide" in z:
        z["wide"] *= 4.0
    if "equal" in z:
        z["equal"] = torch.full((n, v), 1.5, dtype=torch.float64)
    if "holes" in z:
        z["holes"][:, :LIVE] = -torch.inf
        z["holes"][:, -1] = -torch.inf
    if "offset" in z:
        z["offset"] -= 1e4
    tile = torch.cat([z[kind] for kind in kinds]).to(dtype)
    labels = tile.double().argmax(-1)
    labels[1::2] = torch.randint(LIVE if v == V else 0, max(v - 1, 1), labels[1::2].shape, generator=gen)
    return tile.to(DEVICE), (labels + VOCAB_START).to(DEVICE)


def make_transform(gen, name, n, dtype, v=V, device=DEVICE):
    """One of the transforms, its vectors already rounded to the dtype of the arithmetic."""
    acc = state_dtype(dtype)
    bias = randn(gen, v, dtype=acc).to(device)
    row_temperature = (0.5 + torch.rand(n, generator=gen)).to(device, acc)
    keep_mask = (torch.rand(n, v, generator=gen) < 0.6).to(device)
    keep_mask[:, v // 2 :: 2] = True
    return {
        "plain": Transform(),
        "scaled": Transform(logit_scale=1.3, temperature=0.7),
        "softcap": Transform(softcap=6.0),
        "bias": Transform(bias=bias),
        "row_temperature": Transform(row_temperature=row_temperature),
        "keep_mask": Transform(keep_mask=keep_mask),
        "everything": Transform(
            logit_scale=0.8, softcap=9.0, row_temperature=row_temperature, bias=bias, keep_mask=keep_mask
        ),
    }[name]


def functions(backend):
    """What a fixture `kernels` has, through the tile interface; `stats` as a dict of what was asked for."""

    def stats(state, outputs):
        made = tiles.stats(state, outputs, backend=backend)._asdict()
        return {name: values for name, values in made.items() if values is not None}

    fold_, grad_ = (partial(function, backend=backend) for function in (tiles.fold_, tiles.grad_))
    return SimpleNamespace(fold_=fold_, grad_=grad_, stats=stats)


def in_dtype(transform, dtype):
    return transform.tile(slice(None), slice(None), dtype)


def folded(kernels, tile, labels, transform, level=Level.EXTRAS, vocab_start=VOCAB_START, state=None):
    state = new_state(tile.shape[0], level, tile) if state is None else state
    kernels.fold_(tile, labels, vocab_start, state, transform, level=level)
    return state


def gradient(kernels, tile, labels, state, g_logp, g_ent, transform, out=None, vocab_start=VOCAB_START):
    out = torch.full_like(tile, torch.nan) if out is None else out
    kernels.grad_(tile, labels, vocab_start, state, g_logp, g_ent, transform, out=out)
    return out


def truth_of(tile, labels, transform, g_logp, g_ent, dtype=torch.float64):
    """TokenStats and the gradient by autograd through `reference.token_stats`, everything done in `dtype`."""
    x = tile.to(dtype, copy=True).requires_grad_()
    acc = state_dtype(dtype)
    stats = reference.token_stats(x, labels - VOCAB_START, in_dtype(transform, acc))
    wanted = [(y, g) for y, g in ((stats.logps, g_logp), (stats.entropy, g_ent)) if g is not None]
    (grad_x,) = torch.autograd.grad([y for y, _ in wanted], x, [g.to(acc) for _, g in wanted])
    return TokenStats(*(y.detach() for y in stats)), grad_x


def assert_within_twice_torch(ours, torch_same_dtype, truth, tiny, what):
    """Norm of our error over the rows of one kind, at most twice torch's, plus `tiny`. Infinities and NaN must agree."""
    ours, torch_same_dtype = ours.double(), torch_same_dtype.double()
    finite = truth.isfinite()
    assert torch.equal(torch.where(finite, 0, ours), torch.where(finite, 0, truth)), f"{what}: inf or NaN misplaced"
    error = torch.where(finite, ours - truth, 0).norm()
    budget = 2 * torch.where(finite, torch_same_dtype - truth, 0).nan_to_num().norm() + tiny
    assert error <= budget, f"{what}: error {error:.3g}, budget {budget:.3g}"


def by_kind(kinds=KINDS):
    return ((kind, slice(i * ROWS_EACH, (i + 1) * ROWS_EACH)) for i, kind in enumerate(kinds))


def assert_stats(ours, torch_same_dtype, truth, eps):
    distance = truth.lse - truth.mean_logit  # sums are relative to the maximum: the mean is known to eps of this
    for name in STATS:
        for kind, rows in by_kind():
            a, b, c = (getattr(stats, name)[rows] for stats in (ours, torch_same_dtype, truth))
            if name == "is_top1":
                assert torch.equal(a, c), f"{name} of the {kind} rows"
            else:
                size = c.nan_to_num(0, 0, 0).abs().clamp_min(1) + (distance[rows] if name == "mean_logit" else 0)
                units = 8 if name == "log_sum_sq_probs" else 4  # log q - 2 log s: of squares, so twice the errors
                tiny = units * eps * size.norm()
                assert_within_twice_torch(a, b, c, tiny, f"{name} of the {kind} rows")


def assert_gradient(ours, torch_same_dtype, truth, p_max, upstream, eps):
    """`tiny` allows that s is stored in one number: it knows p to one unit in the last place of 1, no better."""
    for kind, rows in by_kind():
        tiny = 4 * eps * truth[rows].norm() + 4 * eps * (p_max * upstream)[rows].norm()
        assert_within_twice_torch(ours[rows], torch_same_dtype[rows], truth[rows], tiny, f"gradient of the {kind} rows")


TRANSFORMS = ("plain", "scaled", "softcap", "bias", "row_temperature", "keep_mask", "everything")
GRID = [(torch.float32, name) for name in TRANSFORMS]
# fp64 has its own scalars and its own polynomial.
GRID += [(torch.float64, name) for name in ("plain", "scaled", "softcap", "everything")]
# 16-bit tiles differ from fp32 in a load and a store, whatever the transform.
GRID += [(dtype, name) for dtype in (torch.bfloat16, torch.float16) for name in ("plain", "scaled", "everything")]


@pytest.mark.parametrize("dtype, name", GRID, ids=str)
def test_statistics_and_gradients(kernels, gen, dtype, name):
    acc = state_dtype(dtype)
    # The truth is fp64 too: with logits of 1e4 it is good to 1e4 units in the last place, and no test can ask for more.
    eps = torch.finfo(acc).eps * (1e4 if dtype == torch.float64 else 1)
    tile, labels = make_logits(gen, dtype)
    n = tile.shape[0]
    transform = make_transform(gen, name, n, dtype)
    if transform.softcap is not None:  # tanh is rounded, in torch as here, and then multiplied by softcap / temperature
        coldest = transform.temperature if transform.row_temperature is None else float(transform.row_temperature.min())
        eps *= 1 + transform.softcap / coldest / 4
    if transform.keep_mask is not None:
        transform.keep_mask[torch.arange(n), labels - VOCAB_START] = True
    before = tile.clone()
    state = folded(kernels, tile, labels, transform)
    assert torch.equal(tile, before)
    g_logp, g_ent = randn(gen, n, dtype=acc), randn(gen, n, dtype=acc)
    for upstream in ((g_logp, None), (None, g_ent), (g_logp, g_ent)):
        same, same_grad = truth_of(tile, labels, transform, *upstream, dtype=dtype)
        truth, truth_grad = truth_of(tile, labels, transform, *upstream)
        ours = gradient(kernels, tile, labels, state, *upstream, transform)
        z = reference.transformed(tile.double(), in_dtype(transform, torch.float64))
        size = sum(g.double().abs() for g in upstream if g is not None)
        assert_gradient(ours, same_grad, truth_grad, z.softmax(-1).amax(-1), size, eps)
    assert_stats(stats_from_state(state, STATS), same, truth, eps)
    gradient(kernels, tile, labels, state, g_logp, g_ent, transform, out=tile)
    assert torch.equal(tile, ours), "in place differs from out of place"


def test_the_gradient_at_an_unlikely_label_keeps_its_digits(kernels, gen):
    """The label's column has arithmetic of its own; its entropy's gradient is as small as p, and as exact."""
    n = 8
    tile = torch.randn(n, V, generator=gen, dtype=torch.float64).to(torch.float32).to(DEVICE)
    tile[:, 7] += 15.0
    labels = torch.randint(8, V, (n,), generator=gen).to(DEVICE)
    tile[torch.arange(n), labels] = -1.0
    labels += VOCAB_START
    state, g_ent = folded(kernels, tile, labels, Transform()), torch.ones(n, device=DEVICE)
    ours = gradient(kernels, tile, labels, state, None, g_ent, Transform())
    _, truth = truth_of(tile, labels, Transform(), None, g_ent.double())
    at_label = torch.arange(n), labels - VOCAB_START
    error = (ours[at_label].double() - truth[at_label]).abs()
    eps = torch.finfo(torch.float32).eps
    # of an exponential of -16, whose argument is rounded to 16 units, and of a difference of 16 that is rounded likewise
    assert bool((error <= 64 * eps * truth[at_label].abs()).all()), (ours[at_label], truth[at_label])


def test_mutants_exceed_the_budget(kernels, gen):
    tile, labels = make_logits(gen, torch.float32)
    n = tile.shape[0]
    g_logp, g_ent = randn(gen, n, dtype=torch.float32), randn(gen, n, dtype=torch.float32)
    same, same_grad = truth_of(tile, labels, Transform(), g_logp, g_ent, torch.float32)
    truth, truth_grad = truth_of(tile, labels, Transform(), g_logp, g_ent)
    eps, p_max = torch.finfo(torch.float32).eps, tile.double().softmax(-1).amax(-1)
    upstream = g_logp.double().abs() + g_ent.double().abs()
    state = folded(kernels, tile, labels, Transform())
    ours = gradient(kernels, tile, labels, state, g_logp, g_ent, Transform())
    at_label = torch.arange(n), labels - VOCAB_START
    dropped, swapped = ours.clone(), ours.clone()
    dropped[at_label] -= g_logp  # the one-hot term forgotten
    swapped[3] = ours[2]
    unnormalised = gradient(kernels, tile, labels, state, g_logp, g_ent, Transform(temperature=1.001))
    for mutant in (ours * 1.0001, dropped, swapped, unnormalised):
        with pytest.raises(AssertionError, match="gradient of the"):
            assert_gradient(mutant, same_grad, truth_grad, p_max, upstream, eps)
    padded = torch.cat([tile, torch.zeros_like(tile[:, :5])], 1)  # columns beyond the vocabulary counted as exp(0)
    with pytest.raises(AssertionError, match="of the"):
        assert_stats(stats_from_state(folded(kernels, padded, labels, Transform()), STATS), same, truth, eps)


@pytest.mark.parametrize("level", [Level.LOGPS, Level.ENTROPY])
def test_lower_levels_are_the_same_numbers(kernels, gen, level):
    tile, labels = make_logits(gen, torch.float32)
    full, state = folded(kernels, tile, labels, Transform()), folded(kernels, tile, labels, Transform(), level)
    assert state.shape[0] == STATE_ROWS[level]
    for row in (0, 1, 3, 4):  # all that a log-prob is made of
        assert torch.equal(state[row], full[row])
    if level is Level.LOGPS:
        assert not state[2].any(), "t was computed though nobody asked for entropy"
    else:  # each variant is compiled by itself: whether e * d + t is rounded once or twice is the compiler's choice
        assert_close(state[2], full[2], rtol=4 * torch.finfo(torch.float32).eps, atol=0.0)


@pytest.mark.parametrize(
    "v", [1, 2, 3, 7, 8, 9, 31, 127, 255, 256, 257, 513]
)  # around a vector, and Triton's blocks of 256
def test_every_tail(kernels, gen, v):
    tile, labels = make_logits(gen, torch.float32, v, kinds=("wide", "equal"))
    g = randn(gen, tile.shape[0], dtype=torch.float32)
    truth, truth_grad = truth_of(tile, labels, Transform(), g, g)
    state = folded(kernels, tile, labels, Transform())
    stats = stats_from_state(state, STATS)
    torch.testing.assert_close(stats.logps.double(), truth.logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient(kernels, tile, labels, state, g, g, Transform()).double(), truth_grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_split_tiles_equal_the_whole(kernels, gen, order):
    tile, labels = make_logits(gen, torch.float32)
    n = tile.shape[0]
    transform = make_transform(gen, "everything", n, torch.float32)
    g_logp, g_ent = randn(gen, n, dtype=torch.float32), randn(gen, n, dtype=torch.float32)
    whole = folded(kernels, tile, labels, transform)
    parts = [slice(0, 140), slice(140, 141), slice(141, V)]
    state, pieces = new_state(n, Level.EXTRAS, tile), torch.full_like(tile, torch.nan)
    part_transform = {cols.start: transform.tile(slice(None), cols, torch.float32) for cols in parts}
    for cols in (parts[i] for i in order):
        folded(
            kernels,
            tile[:, cols],
            labels,
            part_transform[cols.start],
            vocab_start=VOCAB_START + cols.start,
            state=state,
        )
    split_stats, whole_stats = stats_from_state(state, STATS), stats_from_state(whole, STATS)
    for name in ("logps", "entropy", "lse", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(split_stats, name), getattr(whole_stats, name), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(split_stats.mean_logit, whole_stats.mean_logit, rtol=2e-6, atol=1e-5)  # up to 20 below m
    assert torch.equal(split_stats.is_top1, whole_stats.is_top1)
    for cols in parts:
        start = VOCAB_START + cols.start
        args = (tile[:, cols], labels, whole, g_logp, g_ent, part_transform[cols.start], pieces[:, cols])
        gradient(kernels, *args, vocab_start=start)
    assert torch.equal(pieces, gradient(kernels, tile, labels, whole, g_logp, g_ent, transform))


def test_states_of_shards_merge_into_that_of_the_whole(kernels, gen):
    """What ranks do that split the vocabulary: a state of its own per shard, one without columns, one wholly masked, and
    the label in one of them. The others' kernels see a label that is elsewhere; a label in none of them gives NaN."""
    tile, labels = make_logits(gen, torch.float32)
    n = tile.shape[0]
    labels[3] = VOCAB_START + V
    transform = make_transform(gen, "everything", n, torch.float32)
    g_logp, g_ent = randn(gen, n, dtype=torch.float32), randn(gen, n, dtype=torch.float32)
    whole = folded(kernels, tile, labels, transform)
    stops = torch.tensor([140, 140, LIVE, V], device=DEVICE)
    shards = [slice(0, 140), slice(140, 140), slice(140, LIVE), slice(LIVE, V)]
    parts = [transform.tile(slice(None), cols, torch.float32) for cols in shards]
    states = [
        folded(kernels, tile[:, cols], labels, part, vocab_start=VOCAB_START + cols.start)
        for cols, part in zip(shards, parts, strict=True)
    ]
    owner = torch.searchsorted(stops, labels - VOCAB_START, right=True).clamp(max=len(shards) - 1)
    merged = merge_states(torch.stack(states), owner)
    torch.testing.assert_close(merged[0], whole[0], rtol=0, atol=0)
    ours, theirs = stats_from_state(merged, STATS), stats_from_state(whole, STATS)
    assert ours.logps[3].isnan() and theirs.logps[3].isnan()
    for name in ("logps", "entropy", "lse", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(ours.mean_logit, theirs.mean_logit, rtol=2e-6, atol=1e-5)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    pieces = torch.full_like(tile, torch.nan)
    for cols, part in zip(shards, parts, strict=True):
        args = (tile[:, cols], labels, merged, g_logp, g_ent, part, pieces[:, cols])
        gradient(kernels, *args, vocab_start=VOCAB_START + cols.start)
    expected = gradient(kernels, tile, labels, whole, g_logp, g_ent, transform)
    torch.testing.assert_close(pieces, expected, rtol=1e-5, atol=1e-6)


def relative_error_at_an_offset(kernels, gen, temperature):
    """The largest of the errors in entropy, logp and gradient when all logits are near 1e4.

    The logits are on a grid that fp32 still has at 1e4, so that the offset costs nothing before the kernel sees them.
    """
    z, labels = (randn(gen, 8, V) * 3 * 256).round() / 256, torch.arange(8, device=DEVICE) * 41 + VOCAB_START
    transform = Transform(temperature=temperature)
    g = randn(gen, 8, dtype=torch.float32)
    truth, truth_grad = truth_of(z, labels, transform, g, g)
    tile = (z + 1e4).float()
    state = folded(kernels, tile, labels, transform)
    stats = stats_from_state(state, STATS)
    pairs = (stats.entropy, truth.entropy), (stats.logps, truth.logps)
    pairs += ((gradient(kernels, tile, labels, state, g, g, transform), truth_grad),)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_a_common_offset_is_no_error(kernels, gen, temperature):
    assert relative_error_at_an_offset(kernels, gen, temperature) < 2e-6


def test_softcap_keeps_digits_near_zero_and_at_saturation(kernels, gen):
    """Each entry by itself: tanh's slope falls to 1e-9 here, of which 1 - tanh^2 would have no digit in fp32."""
    x = torch.logspace(-7, 1, 200, dtype=torch.float64) * 5.5
    tile = torch.cat([x, -x]).float().repeat(4, 1).to(DEVICE)
    labels, g = torch.tensor([0, 100, 199, 300], device=DEVICE) + VOCAB_START, randn(gen, 4, dtype=torch.float32)
    transform = Transform(softcap=5.0)
    _, truth = truth_of(tile, labels, transform, g, None)
    ours = gradient(kernels, tile, labels, folded(kernels, tile, labels, transform), g, None, transform).double()
    assert ((ours - truth).abs() / truth.abs()).max() < 2e-5
    tile = tile[:1].repeat(400, 1)
    z = folded(kernels, tile, torch.arange(400, device=DEVICE) + VOCAB_START, transform)[4].double()
    assert (z / (5 * (tile[0].double() / 5).tanh()) - 1).abs().max() < 2e-6


@pytest.mark.parametrize("options", [{}, {"softcap": 50.0}])
def test_what_the_mask_removes_has_no_gradient_however_cold_the_row(kernels, gen, options):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    n = tile.shape[0]
    keep = torch.rand(n, V, generator=gen).to(DEVICE) < 0.6
    keep[torch.arange(n), labels - VOCAB_START] = True
    transform = Transform(temperature=1e-6, keep_mask=keep, **options)
    g = torch.full((n,), 1e5, device=DEVICE)  # as a loss scale makes it
    ours = gradient(kernels, tile, labels, folded(kernels, tile, labels, transform), g, g, transform)
    assert not ours[~keep].any() and ours.isfinite().all()


def masked_rows(gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    tile = tile.repeat(2, 1)
    labels = labels.repeat(2)
    tile[0] = -torch.inf  # nothing is live
    tile[1, :LIVE] = -torch.inf
    tile[1, 300], labels[1] = 3.0, 300 + VOCAB_START
    tile[2, 7] = -torch.inf  # a label that is not live
    labels[2] = 7 + VOCAB_START
    tile[3, 5] = torch.nan
    tile[4, 300] = torch.inf
    return tile, labels


def test_minus_inf_is_exactly_nothing_and_nan_spreads(kernels, gen):
    tile, labels = masked_rows(gen)
    n = tile.shape[0]
    g_logp, g_ent = randn(gen, n, dtype=torch.float32), randn(gen, n, dtype=torch.float32)
    state = folded(kernels, tile, labels, Transform())
    m, s, t, label_d, _, q, c, live = state
    assert m[0] == -torch.inf and not any(x[0] for x in (s, t, q, c, live))
    assert label_d[2] == -torch.inf
    assert live[1] == V - LIVE
    assert s[3:5].isnan().all() and t[3:5].isnan().all()
    ours = gradient(kernels, tile, labels, state, g_logp, g_ent, Transform())
    assert not ours[0].any()
    assert not ours[tile == -torch.inf].any()
    assert ours[3].isnan().all() and ours[4].isnan().any()
    truth_state, truth = new_state(n, Level.EXTRAS, tile.double()), torch.empty_like(tile, dtype=torch.float64)
    rest = labels, VOCAB_START, truth_state
    options = {"ignore_index": -100}
    reference.fold_(tile.double(), *rest, Transform(), level=Level.EXTRAS, **options)
    reference.grad_(tile.double(), *rest, g_logp.double(), g_ent.double(), Transform(), out=truth, **options)
    torch.testing.assert_close(ours[1:3].double(), truth[1:3], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[5:].double(), truth[5:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_nan_spreads_under_a_softcap_and_an_infinity_is_the_cap(kernels, gen, dtype):
    tile, labels = make_logits(gen, dtype, kinds=("wide",))
    tile[0, 5], tile[1, 300] = torch.nan, torch.inf
    transform, g = Transform(softcap=4.0), randn(gen, tile.shape[0], dtype=dtype)
    state = folded(kernels, tile, labels, transform)
    assert state[1:3, 0].isnan().all()
    assert gradient(kernels, tile, labels, state, g, g, transform)[0].isnan().all()
    tile[0, 5], tile[1, 300] = 0.0, 1e4
    capped = folded(kernels, tile, labels, transform)
    assert torch.equal(state[:, 1:], capped[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_least_number_may_stand_for_minus_inf(kernels, gen, dtype, order, temperature):
    """As many mask with it: in one tile or in several, of which one has nothing else, in states that are merged, too. Only the
    mean logit tells. And a row of nothing else is a row of equal logits, where a temperature does not make it -inf."""
    tile, labels = make_logits(gen, dtype, kinds=("wide", "peaked"))
    labels = labels.clamp(VOCAB_START + 200, VOCAB_START + 299)
    least = torch.finfo(dtype).min
    transform, g = Transform(temperature=temperature), randn(gen, tile.shape[0], dtype=state_dtype(dtype))
    made = []
    for value in (least, -torch.inf):
        x = tile.clone()
        x[:, :200], x[:, 300:], x[1, 201:] = value, value, value
        labels[1] = VOCAB_START + 200
        state = new_state(len(x), Level.EXTRAS, x)
        parts = [slice(0, 140), slice(140, 310), slice(310, V)][::order]
        for cols in parts:
            folded(kernels, x[:, cols], labels, transform, vocab_start=VOCAB_START + cols.start, state=state)
        apart = [folded(kernels, x[:, cols], labels, transform, vocab_start=VOCAB_START + cols.start) for cols in parts]
        states = [
            state,
            merge_states(torch.stack(apart), torch.ones_like(labels)),
            folded(kernels, x, labels, transform),
        ]
        made.append([stats._replace(mean_logit=None) for stats in (stats_from_state(state, STATS) for state in states)])
        made[-1] = [value for stats in made[-1] for value in stats if value is not None]
        made[-1] += [gradient(kernels, x, labels, state, g, g, transform) for state in states]
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs) and (ours.dtype == torch.bool or ours.isfinite().all())
    if temperature >= 1.0:
        x = torch.full_like(tile, least)
        stats = stats_from_state(folded(kernels, x, labels, transform), STATS)
        uniform = torch.full_like(stats.entropy, V).log()
        torch.testing.assert_close(stats.entropy, uniform, rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.logps, -uniform, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "dtype, transform, values",
    [
        (torch.float32, Transform(), (2e31, 0.0, -torch.inf)),  # what is not live yet has no distance
        (torch.float32, Transform(), (0.0, 2e31, -torch.inf)),
        (torch.float64, Transform(), (-1e39, -1e40, -1e39)),  # below all of fp32
        (
            torch.float32,
            Transform(logit_scale=1e-4, temperature=1e12),
            (0.0, -1e16, -2e16),
        ),  # far apart before the scale alone
        (torch.bfloat16, Transform(logit_scale=1e-4, temperature=1e12), (0.0, -1e16, -2e16)),
    ],
)
def test_logits_of_any_size(kernels, gen, dtype, transform, values):
    """Each a part of the row, in every order; in one tile and in two."""
    tile = torch.empty(3, V, dtype=dtype, device=DEVICE)
    for row in range(3):
        for part, value in zip(
            (slice(0, 140), slice(140, 280), slice(280, V)), values[row:] + values[:row], strict=True
        ):
            tile[row, part] = value
    labels = torch.full((3,), VOCAB_START + 141, device=DEVICE)
    truth = reference.token_stats(tile.double(), labels - VOCAB_START, transform)
    parts = new_state(3, Level.EXTRAS, tile)
    for cols in (slice(0, 140), slice(140, V)):
        folded(kernels, tile[:, cols], labels, transform, vocab_start=VOCAB_START + cols.start, state=parts)
    for state in (parts, folded(kernels, tile, labels, transform)):
        stats = stats_from_state(state, STATS)
        for name in ("logps", "entropy", "lse", "mean_logit", "log_sum_sq_probs"):
            torch.testing.assert_close(
                getattr(stats, name).double(), getattr(truth, name), rtol=2e-5, atol=1e-6, msg=name
            )


def test_a_tile_that_a_temperature_makes_minus_inf_is_nothing(kernels, gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    labels = labels.clamp(max=VOCAB_START + 139)
    tile[:, 140:] = torch.finfo(torch.float32).min
    tile[:, 150] = -2.5e38
    transform, outcomes = Transform(temperature=0.7), []
    for columns in (V, 140):
        state = new_state(len(tile), Level.EXTRAS, tile)
        for cols in (slice(140, columns), slice(0, 140)):
            folded(kernels, tile[:, cols], labels, transform, vocab_start=VOCAB_START + cols.start, state=state)
        outcomes.append(torch.stack([x.float() for x in stats_from_state(state, STATS)]))
    assert torch.equal(*outcomes) and outcomes[0].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_what_the_mask_removes_may_be_nan(kernels, gen, softcap):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    keep = torch.ones(tile.shape, dtype=torch.bool, device=DEVICE)
    keep[:, 10:20] = False
    labels[:] = 30 + VOCAB_START
    transform = Transform(softcap=softcap, keep_mask=keep)
    g = randn(gen, tile.shape[0], dtype=torch.float32)
    clean_state = folded(kernels, tile, labels, transform)
    clean = gradient(kernels, tile, labels, clean_state, g, g, transform)
    tile[:, 10:20] = torch.nan
    state = folded(kernels, tile, labels, transform)
    assert torch.equal(state, clean_state)
    assert torch.equal(gradient(kernels, tile, labels, state, g, g, transform), clean)


def test_ignored_and_undifferentiated_rows(kernels, gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    n = tile.shape[0]
    labels[0] = -100
    tile[1] = torch.nan
    before = new_state(n, Level.EXTRAS, tile)
    before[:, 0] = 7.0
    state = folded(kernels, tile, labels, Transform(), state=before.clone())
    assert torch.equal(state[:, 0], before[:, 0]), "an ignored row was folded"
    g_logp, g_ent = randn(gen, n, dtype=torch.float32), randn(gen, n, dtype=torch.float32)
    g_logp[1] = g_ent[1] = 0
    g_logp[0] = g_ent[0] = torch.nan
    ours = gradient(kernels, tile, labels, state, g_logp, g_ent, Transform())
    assert torch.equal(ours[:2], torch.zeros_like(ours[:2]))
    assert ours[2:].isfinite().all() and ours[2:].any(1).all()
    g_logp[2] = 0
    assert not gradient(kernels, tile, labels, state, g_logp, None, Transform())[2].any()
    assert not gradient(kernels, tile, labels, state, None, None, Transform()).any()


def test_any_ignore_index(kernels, gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    labels[1] = 3
    state = new_state(tile.shape[0], Level.ENTROPY, tile)
    kernels.fold_(tile, labels, 0, state, Transform(), level=Level.ENTROPY, ignore_index=3)
    assert state[1, 1] == 0 and (state[1, [0, 2]] > 0).all()


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_first_tile_begins_the_state(kernels, gen, dtype, level):
    """Whatever the memory held; a second tile goes on from there, and a row that is ignored has outputs of 0."""
    tile, labels = make_logits(gen, dtype, kinds=("wide", "holes"))
    n = tile.shape[0]
    labels[1] = -100
    begun = torch.full_like(new_state(n, level, tile), 3.0)
    begun[:, 2:] = torch.nan
    expected = new_state(n, level, tile)
    for cols in (slice(0, 200), slice(200, V)):
        args = tile[:, cols], labels, VOCAB_START + cols.start
        kernels.fold_(*args, begun, Transform(), level=level, first=cols.start == 0)
        kernels.fold_(*args, expected, Transform(), level=level)
    computed = labels != -100
    assert same_bits(begun[:, computed], expected[:, computed])
    assert begun[:, 1].tolist() == list(IGNORED[: len(begun)])
    for name, values in kernels.stats(begun, STATS if level is Level.EXTRAS else STATS[:4]).items():
        assert values[1] == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 127, 129, 300])  # around Triton's and CUDA's blocks of 128
def test_outputs_of_a_state(kernels, gen, dtype, n):
    """Against the same formulas in plain torch: no live entry, a NaN, a label that is not live, an entropy below 0 by rounding."""
    frame = torch.full((8, n + 5), torch.nan, dtype=dtype, device=DEVICE)
    state = frame[:, 3 : 3 + n]
    state.copy_(randn(gen, 8, n, dtype=dtype))
    state[[1, 5, 7]] = state[[1, 5, 7]].abs() + 1
    state[2:5] = -state[2:5].abs()
    state[:, 1:2] = state_column(EMPTY, state)
    state[1, 2:3] = torch.nan
    state[3:5, 3:4] = -torch.inf
    state[4, 4:9] = state[0, 4:9]
    state[1:3, 4:5] = torch.tensor([1.0, 1e-12], dtype=dtype, device=DEVICE)[:, None]
    expected = stats_from_state(state, STATS)._asdict()
    for outputs in (STATS, ("logps",), ("entropy", "lse"), ("is_top1",), ("mean_logit",), ("log_sum_sq_probs",)):
        made = kernels.stats(state, outputs)
        assert list(made) == [name for name in STATS if name in outputs]
        for name, values in made.items():
            assert values.dtype == expected[name].dtype, name
            eps = 0 if name == "is_top1" else torch.finfo(dtype).eps
            # two logarithms of about 1, each rounded by its own library, may cancel
            assert_close(values, expected[name], rtol=2 * eps, atol=8 * eps, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_touched_outside(kernels, gen, dtype):
    """Labels anywhere, a row stride wider than the row, and guards of NaN around everything."""
    n, stride = 6, V + 13
    frame = torch.full((n * stride + 64,), torch.nan, dtype=dtype, device=DEVICE)
    tile = frame[32:].as_strided((n, V), (stride, 1), 37)  # not 16-byte aligned either
    tile.copy_(randn(gen, n, V))
    state_frame = torch.full((8 + 2, n + 9), torch.nan, device=DEVICE)
    state = state_frame[1:-1, 4 : 4 + n]
    state.copy_(new_state(n, Level.EXTRAS, tile))
    labels = torch.tensor([-1, VOCAB_START - 1, VOCAB_START + V, 10**15, -(10**15), VOCAB_START + 5], device=DEVICE)
    guard, state_guard = frame.clone(), state_frame.clone()
    folded(kernels, tile, labels, Transform(), state=state)
    assert state[3:5, :5].isnan().all(), "a label of another tile was read"
    assert state[[0, 1, 2, 5, 6, 7]].isfinite().all() and state[:, 5].isfinite().all()
    g = randn(gen, n, dtype=torch.float32)
    expected = gradient(kernels, tile.clone(), labels, state, g, g, Transform())
    gradient(kernels, tile, labels, state, g, g, Transform(), out=tile)
    assert torch.equal(tile, expected)
    tile.copy_(guard.as_strided((n, V), (stride, 1), 37))
    state.copy_(new_state(n, Level.EXTRAS, tile))
    assert same_bits(frame, guard) and same_bits(state_frame[:, :4], state_guard[:, :4])
    assert same_bits(state_frame[[0, -1]], state_guard[[0, -1]]) and same_bits(state_frame[:, -5:], state_guard[:, -5:])


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_bf16_overlay_equals_a_separate_output(kernels, gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide", "peaked"))
    tile = torch.nn.functional.pad(tile, (0, 5))[:, :V]  # rows wider than the tile
    n = tile.shape[0]
    labels[1] = -100
    g_logp, g_ent = randn(gen, n, dtype=torch.float32), randn(gen, n, dtype=torch.float32)
    state = folded(kernels, tile, labels, Transform())
    separate = torch.full((n, V), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    gradient(kernels, tile, labels, state, g_logp, g_ent, Transform(), out=separate)
    rounded = gradient(kernels, tile, labels, state, g_logp, g_ent, Transform()).bfloat16()
    assert torch.equal(separate, rounded)
    overlay = tiles.bf16_overlay(tile)
    gradient(kernels, tile, labels, state, g_logp, g_ent, Transform(), out=overlay)
    assert torch.equal(overlay, separate)


@pytest.mark.parametrize("shape", ["v", "1v", "n1", "transposed", "strided"])
def test_keep_mask_of_any_layout(kernels, gen, shape):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide", "equal"))
    n = tile.shape[0]
    full = (torch.rand(n, V, generator=gen) < 0.5).to(DEVICE)
    keep = {
        "v": full[0],
        "1v": full[:1],
        "n1": full[:, :1],
        "transposed": full.t().contiguous().t(),
        "strided": full.repeat_interleave(2, dim=1)[:, ::2],
    }[shape]
    g = randn(gen, n, dtype=torch.float32)
    outcomes = []
    for mask in (keep, keep.expand(n, V).contiguous()):
        transform = Transform(keep_mask=mask)
        state = folded(kernels, tile, labels, transform)
        outcomes.append(torch.cat([state, gradient(kernels, tile, labels, state, g, g, transform).t()]))
    assert torch.equal(*(x.nan_to_num(-1.0) for x in outcomes))


def test_strided_labels_and_gradients(kernels, gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    n = tile.shape[0]
    g = randn(gen, n, dtype=torch.float32)
    state = folded(kernels, tile, labels, Transform())
    spread = torch.stack([labels, labels * 0 - 7], 1)[:, 0]
    assert torch.equal(folded(kernels, tile, spread, Transform()), state)
    g_spread, g_one = torch.stack([g, -g], 1)[:, 0], torch.ones(1, device=DEVICE).expand(n)
    expected = gradient(kernels, tile, labels, state, g, torch.ones(n, device=DEVICE), Transform())
    assert torch.equal(gradient(kernels, tile, spread, state, g_spread, g_one, Transform()), expected)


@pytest.mark.parametrize("n, v", [(0, 5), (3, 0), (0, 0)])
def test_empty_tiles(kernels, n, v):
    tile = torch.zeros(n, v, device=DEVICE)
    labels, g = torch.zeros(n, dtype=torch.int64, device=DEVICE), torch.ones(n, device=DEVICE)
    state = folded(kernels, tile, labels, Transform(), vocab_start=0)
    assert same_bits(state, new_state(n, Level.EXTRAS, tile))
    gradient(kernels, tile, labels, state, g, g, Transform())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: 70,000 programs and 9 GiB")
def test_more_than_2_31_elements_and_65535_rows(kernels, gen):
    n, v = 70_000, 32_768
    tile = torch.zeros(n, v, dtype=torch.bfloat16, device=DEVICE)
    # rows enough that they are not split over several programs, whose sums have another order
    rows = torch.cat([torch.tensor([0, 65_535, 65_536, n - 1]), torch.arange(1, 4093)]).to(DEVICE)
    tile[rows] = randn(gen, len(rows), v, dtype=torch.bfloat16)
    labels, g = torch.full((n,), 17, device=DEVICE), torch.ones(n, device=DEVICE)
    few, few_labels = tile[rows], labels[rows]
    state = folded(kernels, tile, labels, Transform(), Level.ENTROPY, vocab_start=0)
    few_state = folded(kernels, few, few_labels, Transform(), Level.ENTROPY, vocab_start=0)
    assert torch.equal(state[:, rows], few_state)
    gradient(kernels, tile, labels, state, g, g, Transform(), out=tile, vocab_start=0)
    gradient(kernels, few, few_labels, few_state, g[rows], g[rows], Transform(), out=few, vocab_start=0)
    assert torch.equal(tile[rows], few)

"""reference.py against fp64 definitions and numbers one can check by hand; and the helper that judges everything else."""

import itertools
import math

import oracles
import pytest
import torch

from entropy_po import reference
from entropy_po.testing import SCALES, assert_within_reference_error, make_head, make_labels, make_logits
from entropy_po.types import STATE_ROWS, Level, TokenStats, Transform, new_state, stats_from_state

ALL = TokenStats._fields
ROUNDING = 1e-12  # of a few hundred fp64 operations
OFFSET = 1e-10  # the same beside logits of 1e4, of which fp64 keeps 1.8e-12


def options_for(n, v, labels):
    keep = torch.rand(n, v) < 0.7
    keep[torch.arange(n), labels.clamp_min(0)] = True
    row_temperature = torch.rand(n, dtype=torch.float64) + 0.5
    return {
        "plain": ({}, Transform()),
        "scale and temperature": (
            {"logit_scale": 1.3, "temperature": 0.7},
            Transform(logit_scale=1.3, temperature=0.7),
        ),
        "softcap": ({"softcap": 5.0}, Transform(softcap=5.0)),
        "row temperature": ({"temperature": row_temperature}, Transform(row_temperature=row_temperature)),
        "shared mask": ({"keep_mask": keep.any(0)}, Transform(keep_mask=keep.any(0))),
        "mask": ({"keep_mask": keep}, Transform(keep_mask=keep)),
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", options_for(1, 1, torch.zeros(1, dtype=torch.int64)))
@pytest.mark.parametrize("n, v", [(0, 5), (1, 1), (3, 2), (7, 31), (3, 1001)])  # nothing, one of all, tails
def test_reference_is_the_definition(scale, name, n, v):
    logits = make_logits(scale, n, v).double()
    labels = make_labels(logits)
    labels[1:2] = -100
    kwargs, transform = options_for(n, v, labels)[name]
    if "keep_mask" in kwargs and v > 8:  # a row whose every entry is masked has no distribution
        assert ((logits > -torch.inf) & kwargs["keep_mask"]).any(-1).all()
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours, exact = reference.token_stats(x, labels, transform), oracles.stats(y, labels, **kwargs)
    for field, a, b in zip(ALL, ours, exact, strict=True):
        assert a.shape == b.shape == labels.shape
        if a.dtype == torch.bool:
            assert torch.equal(a, b), field
        elif a.numel():
            assert ((a - b).abs() <= OFFSET * (1 + b.abs())).all(), field
    g = torch.randn(2, n, dtype=torch.float64)
    (ours.logps @ g[0] + ours.entropy @ g[1]).backward()
    (exact[0] @ g[0] + exact[1] @ g[1]).backward()
    assert x.grad.isfinite().all()
    assert (x.grad - y.grad).norm() <= OFFSET * (g.norm() + 1e-300)


def test_gradcheck():
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3])
    for name, (_, transform) in options_for(4, 7, labels).items():
        done = torch.autograd.gradcheck(lambda z, t=transform: reference.token_stats(z, labels, t)[:2], (x,))
        assert done, name


def stats_by_tiles(x, labels, cuts, order):
    state = new_state(len(x), Level.EXTRAS, x)
    for k in order:
        tile = x[:, cuts[k] : cuts[k + 1]]
        reference.fold_(tile, labels, cuts[k], state, Transform(), level=Level.EXTRAS, ignore_index=-100)
    return state


@pytest.mark.parametrize("scale", SCALES)
def test_tile_form_is_the_whole_form(scale):
    """fold_ in any order, then grad_, against autograd through the full softmax."""
    x = make_logits(scale, 5, 101).double()
    labels = make_labels(x)
    cuts = [0, 1, 40, 41, 101]
    g = torch.randn(2, 5, dtype=torch.float64)
    y = x.clone().requires_grad_()
    exact = oracles.stats(y, labels)
    (exact[0] @ g[0] + exact[1] @ g[1]).backward()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        state = stats_by_tiles(x, labels, cuts, order)
        for a, b in zip(stats_from_state(state, ALL), exact, strict=True):
            assert ((a.double() - b.double()).abs() <= OFFSET * (1 + b.double().abs())).all()
        out = torch.full_like(x, torch.nan)
        for a, b in itertools.pairwise(cuts):
            reference.grad_(x[:, a:b], labels, a, state, g[0], g[1], Transform(), ignore_index=-100, out=out[:, a:b])
        assert (out - y.grad).norm() <= OFFSET * g.norm()


def test_numbers_by_hand():
    """p = (1/4, 3/4): log p = -log 4, H = log 4 - 3/4 log 3, sum p^2 = 10/16; and the uniform distribution."""
    log3 = math.log(3)
    stats = reference.token_stats(torch.tensor([[0.0, log3]], dtype=torch.float64), torch.tensor([0]), Transform())
    by_hand = (-math.log(4), math.log(4) - 0.75 * log3, math.log(4), 0.0, log3 / 2, math.log(10 / 16))
    for value, expected in zip(stats, by_hand, strict=True):
        assert abs(value.item() - expected) <= ROUNDING
    # at temperature 1/2 the odds 1 : 3 are squared
    half = reference.token_stats(
        torch.tensor([[0.0, log3]], dtype=torch.float64), torch.tensor([1]), Transform(temperature=0.5)
    )
    assert abs(half.logps.item() - math.log(0.9)) <= ROUNDING
    for v in (1, 2, 1000):
        flat = reference.token_stats(torch.full((1, v), 7.0, dtype=torch.float64), torch.tensor([v - 1]), Transform())
        assert abs(flat.entropy.item() - math.log(v)) <= ROUNDING
        assert abs(flat.logps.item() + math.log(v)) <= ROUNDING
        assert abs(flat.log_sum_sq_probs.item() + math.log(v)) <= ROUNDING
        assert flat.is_top1.item()  # a tie counts: no logit is above the label's


def test_minus_inf_contributes_nothing_and_a_row_of_it_is_nan():
    x = torch.tensor([[1.0, -torch.inf, 2.0], [-torch.inf] * 3], dtype=torch.float64)
    stats = reference.token_stats(x, torch.tensor([0, 0]), Transform())
    two = reference.token_stats(x[:1, ::2], torch.tensor([0]), Transform())
    for a, b in zip(stats, two, strict=True):
        assert abs(float(a[0]) - float(b[0])) <= ROUNDING
    assert stats.logps[1].isnan() and stats.entropy[1].isnan()


def test_state_rows_match_the_levels():
    for level, rows in STATE_ROWS.items():
        state = new_state(3, level, torch.zeros(1, dtype=torch.bfloat16))
        assert state.shape == (rows, 3) and state.dtype == torch.float32
        assert (state[0] == -torch.inf).all() and state[3:5].isnan().all() and (state[1:3] == 0).all()


# --- the judge: what it accepts and what it must reject


def judged(scale="fresh", dtype=torch.float32):
    """(torch's gradient in dtype, the exact one) of logps and entropy together, for fresh inputs."""
    x = make_logits(scale, 24, 257, dtype)
    labels = make_labels(x)
    g = torch.randn(2, 24)

    def gradient(y, stats):
        return torch.autograd.grad(stats[0] @ g[0].to(stats[0]) + stats[1] @ g[1].to(stats[1]), y)[0]

    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    return gradient(a, reference.token_stats(a, labels, Transform())), gradient(b, oracles.stats(b, labels)), x, labels


MUTANTS = {
    "scaled by 1.01": lambda g, x: g * 1.01,
    "a row dropped": lambda g, x: g.index_fill(0, g.norm(dim=1).argmax(), 0),
    "a column dropped": lambda g, x: g.index_fill(1, g.norm(dim=0).argmax(), 0),
    "rows shifted by one": lambda g, x: g.roll(1, 0),
    "a mean for a sum": lambda g, x: g / len(g),
    "a sign": lambda g, x: -g,
    "one element": lambda g, x: g.index_put((torch.tensor([3]), torch.tensor([5])), g[3, 5] + g.square().mean().sqrt()),
    "rounded to bf16": lambda g, x: g.bfloat16().to(g.dtype),
    "a NaN": lambda g, x: g.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(torch.nan)),
    "an infinity": lambda g, x: g.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(torch.inf)),
    "transposed shape": lambda g, x: g.t(),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("scale", SCALES[:2])
def test_the_judge_rejects(mutant, scale):
    theirs, exact, x, _ = judged(scale)
    assert_within_reference_error(theirs, theirs, exact)
    with pytest.raises(AssertionError, match="d logits"):
        assert_within_reference_error(MUTANTS[mutant](theirs, x), theirs, exact, name="d logits")


def test_the_judge_rejects_a_forgotten_mask():
    x = make_logits("fresh", 8, 200)
    labels = make_labels(x)
    keep = torch.rand(8, 200) < 0.9
    keep[torch.arange(8), labels] = True
    exact = oracles.stats(x, labels, keep_mask=keep)[1]
    masked = reference.token_stats(x, labels, Transform(keep_mask=keep)).entropy
    assert_within_reference_error(masked, masked, exact, unit=1.0)
    with pytest.raises(AssertionError):
        assert_within_reference_error(reference.token_stats(x, labels, Transform()).entropy, masked, exact, unit=1.0)


def test_the_judge_rejects_logits_rounded_to_bf16():
    """The error that a bf16 product leaves in the entropy, and that no tolerance of bf16's size would see."""
    x = 3 * torch.randn(64, 500)
    labels = make_labels(x)
    exact = oracles.stats(x, labels)[1]
    theirs = reference.token_stats(x, labels, Transform()).entropy
    rounded = reference.token_stats(x.bfloat16(), labels, Transform()).entropy
    with pytest.raises(AssertionError):
        assert_within_reference_error(rounded, theirs, exact, unit=1.0)


def test_the_judge_gives_no_credit_for_infinities_of_torch():
    exact = torch.ones(4, dtype=torch.float64)
    broken = torch.tensor([1.0, torch.inf, 1.0, 1.0])
    with pytest.raises(AssertionError):
        assert_within_reference_error(torch.tensor([1.0, 3.5, 1.0, 1.0]), broken, exact)
    assert_within_reference_error(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))


@pytest.mark.parametrize("scale", SCALES)
def test_inputs_have_the_scale_they_name(scale):
    logits = make_logits(scale, 12, 400)
    labels = make_labels(logits)
    assert (logits.gather(1, labels[:, None]) > -torch.inf).all()
    top = logits.double().softmax(-1).amax(-1)
    assert (top > 0.999).all() if scale == "trained" else (top < 0.5).any()
    hidden, weight, labels = make_head(scale, 12, 400, 64)
    head_top = (hidden.double() @ weight.double().t()).softmax(-1).amax(-1)
    if scale == "trained":
        assert (head_top > 0.999).all()
    assert (hidden.shape, weight.shape, labels.shape) == ((12, 64), (400, 64), (12,))
    with pytest.raises(ValueError, match="scale='huge'"):
        make_logits("huge", 1, 1)

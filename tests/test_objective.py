"""The (a, b) family against worked vectors, its identities, autograd and population minimisers."""

import doctest
import math

import numpy as np
import pytest
import torch
from outcomes import ROUNDING, assert_close, randn, toy

import entropy_po.dual
import entropy_po.objective
import entropy_po.policy_gradient
from entropy_po.objective import LOSSES, EntropyObjective

PRINTED = 0.5e-6 + 1e-12  # half a unit of the sixth decimal, the digits they were printed with
FIRST_PAIR = (-10.0, -12.0, -11.0, -11.5)  # logp_w, logp_l, ref_w, ref_l
FAMILY = [
    EntropyObjective.dpo(0.1),
    EntropyObjective.hdpo(0.1, 0.8),
    EntropyObjective.hdpo(0.5, 1.3),
    EntropyObjective.spl(0.3, 0.2),
    EntropyObjective.qempo(2.0),
    EntropyObjective.qempo_kl(2.0, 1.0),
]


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1).unbind()


# ---- worked vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective, logps, z, loss",
    [
        (EntropyObjective.hdpo(0.1, 1.0), FIRST_PAIR, 0.150, 0.620957),
        (EntropyObjective.hdpo(0.1, 0.9), FIRST_PAIR, 0.130, 0.630258),
        (EntropyObjective.hdpo(0.1, 1.2), FIRST_PAIR, 0.190, 0.602653),
        (EntropyObjective.hdpo(0.1, 1.0), (-210.0, -180.0, -210.0, -180.0), 0.0, 0.693147),
        (EntropyObjective.hdpo(0.1, 1.2), (-210.0, -180.0, -210.0, -180.0), -0.6, 1.037488),
        (EntropyObjective.hdpo(0.1, 0.8), (-210.0, -180.0, -210.0, -180.0), 0.6, 0.437488),
        (EntropyObjective.qempo(10.0), (-10.0, -12.0, None, None), 0.2, 0.598139),
        (EntropyObjective.qempo_kl(2.0, 1.0), FIRST_PAIR, 1.75, 0.160224),
    ],
)
def test_margin_and_loss_match_the_printed_vectors(objective, logps, z, loss):
    pair = column(*[x for x in logps if x is not None])
    margin = objective.margin(*pair)
    assert_close(margin, torch.tensor([z], dtype=torch.float64))
    assert abs(objective.pair_loss(margin).item() - loss) <= PRINTED


@pytest.mark.parametrize("alpha, slope", [(1.0, -0.046257), (0.9, -0.042079), (1.2, -0.054317)])
def test_gradient_matches_the_printed_vectors(alpha, slope):
    objective = EntropyObjective.hdpo(0.1, alpha)
    w, lo, ref_w, ref_l = (x.clone().requires_grad_() for x in column(*FIRST_PAIR))
    margin = objective.margin(w, lo, ref_w, ref_l)
    objective.pair_loss(margin).sum().backward()
    assert abs(w.grad.item() - slope) <= PRINTED
    assert_close(lo.grad, -w.grad)
    assert_close(objective.policy_coef * objective.pair_loss_and_slope(margin)[1], w.grad)


# ---- identities of the family ---------------------------------------------------------------------------------------


def test_hdpo_is_dpo_with_scaled_beta_and_reference(gen):
    logps = randn(gen, 4, 7) * 30 - 200
    alpha, beta = 0.85, 0.07
    hdpo = EntropyObjective.hdpo(beta, alpha).margin(*logps)
    assert_close(hdpo, EntropyObjective.dpo(alpha * beta).margin(*logps[:2], *(logps[2:] / alpha)))


def test_constructors_agree_on_the_same_member(gen):
    w, lo, ref_w, ref_l = logps = randn(gen, 4, 7)
    mu, lam = 0.7, 3.0
    kl_form, h_form = EntropyObjective.qempo_kl(lam, mu), EntropyObjective.hdpo(mu / lam, 1 + 1 / mu)
    assert_close(kl_form.margin(*logps), h_form.margin(*logps))
    spl = EntropyObjective.spl(0.3, 0.2)
    assert_close(spl.margin(*logps), EntropyObjective.hdpo(0.2, 0.3 / 0.2).margin(*logps))
    assert EntropyObjective.qempo_kl(lam, 0.0) == EntropyObjective.qempo(lam)
    assert EntropyObjective.hdpo(0.1, 1.0) == EntropyObjective.dpo(0.1)
    by_hand = 0.3 * (w - lo) - 0.2 * (ref_w - ref_l)
    assert_close(spl.margin(*logps), by_hand)


def test_qempo_is_the_limit_of_a_vanishing_reference(gen):
    rewards, log_ref = toy(gen, 20)
    limit = EntropyObjective.qempo(2.0)
    for b in (1e-3, 1e-6, 1e-9):
        near = EntropyObjective(limit.policy_coef, b)
        gap = (near.optimal_policy(rewards, log_ref) - limit.optimal_policy(rewards)).abs().max()
        assert gap <= 4 * b / limit.policy_coef * float(log_ref.abs().max())  # first order in b


def test_needs_reference_is_b_above_zero():
    assert [o.needs_reference for o in FAMILY] == [True, True, True, True, False, True]


@pytest.mark.parametrize("objective", FAMILY)
def test_rewards_invert_the_optimal_policy(objective, gen):
    rewards, log_ref = toy(gen, 9)
    policy = objective.optimal_policy(rewards, log_ref)
    offset = objective.implicit_reward(policy, log_ref) - rewards
    assert_close(offset, offset[:1].expand(9), 1e-10)
    # At the optimum the shaped reward is a constant: no policy gradient is left.
    shaped = objective.shaped_reward(rewards, policy, log_ref)
    assert_close(shaped, -offset, 1e-10)
    pair = objective.margin(policy[:1], policy[1:2], log_ref[:1], log_ref[1:2])
    assert_close(pair, rewards[:1] - rewards[1:2], 1e-10)


def test_optimal_policy_handles_unsupported_outcomes_and_batches(gen):
    rewards, log_ref = toy(gen, 6)
    log_ref[2] = -math.inf
    policy = EntropyObjective.dpo(0.5).optimal_policy(rewards, log_ref)
    assert policy[2] == -math.inf and abs(float(policy.exp().sum()) - 1) <= ROUNDING
    keep = torch.arange(6) != 2
    assert_close(policy[keep], torch.log_softmax(log_ref[keep] + rewards[keep] / 0.5, 0))
    free = EntropyObjective.qempo(2.0).optimal_policy(rewards, log_ref)
    assert_close(free, torch.log_softmax(2.0 * rewards, 0))
    many = randn(gen, 2, 3, 6)
    batched = EntropyObjective.dpo(0.5).optimal_policy(many, log_ref)
    assert_close(batched[1, 2], EntropyObjective.dpo(0.5).optimal_policy(many[1, 2], log_ref))


def test_low_precision_is_raised_to_fp32_and_reference_is_ignored_without_b():
    w, lo = torch.tensor([-201.0]).bfloat16(), torch.tensor([-180.0]).bfloat16()
    junk = torch.full((3,), math.nan)
    objective = EntropyObjective.qempo(3.0)
    margin = objective.margin(w, lo, junk, junk)
    assert margin.dtype == torch.float32
    assert margin.item() == pytest.approx((w.double() - lo.double()).item() / 3.0, rel=2**-23)
    assert objective.pair_loss(margin.bfloat16()).dtype == torch.float32
    assert objective.implicit_reward(w, junk).dtype == torch.float32
    assert EntropyObjective.dpo(0.1).margin(*(x.double() for x in (w, lo, w, lo))).dtype == torch.float64


# ---- pair losses ----------------------------------------------------------------------------------------------------

CASES = [
    ("sigmoid", 0.0),
    ("sigmoid", 0.2),
    ("sigmoid", 0.5),
    ("robust", 0.0),
    ("robust", 0.3),
    ("ipo", 0.0),
    ("hinge", 0.0),
]


@pytest.mark.parametrize("loss, eps", CASES)
@pytest.mark.parametrize("objective", [EntropyObjective.hdpo(0.3, 1.2), EntropyObjective.qempo(0.8)])
def test_slope_is_the_derivative_of_the_loss(objective, loss, eps, gen):
    z = (randn(gen, 11) * 4).requires_grad_()
    value, slope = objective.pair_loss_and_slope(z, loss, eps)
    assert torch.equal(value, objective.pair_loss(z, loss, eps))
    assert_close(slope, torch.autograd.grad(value.sum(), z)[0])
    assert torch.autograd.gradcheck(lambda z: objective.pair_loss(z, loss, eps), z)


@pytest.mark.parametrize("loss, eps", CASES)
def test_losses_match_their_definitions(loss, eps, gen):
    beta = 0.3
    log_ratio_gap = randn(gen, 11) * 4
    z = beta * log_ratio_gap
    sigmoid = torch.sigmoid(z)
    truth = {
        "sigmoid": -(1 - eps) * sigmoid.log() - eps * (1 - sigmoid).log(),
        "robust": (-(1 - eps) * sigmoid.log() + eps * (1 - sigmoid).log()) / (1 - 2 * eps),
        "ipo": (log_ratio_gap - 1 / (2 * beta)) ** 2,  # TRL's
        "hinge": (1 - z).clamp(min=0),
    }[loss]
    assert_close(EntropyObjective.dpo(beta).pair_loss(z, loss, eps), truth, 1e-10)


def test_robust_loss_is_unbiased_under_flipped_labels(gen):
    objective, z, flip = EntropyObjective.dpo(0.1), randn(gen, 5), 0.2
    noisy = (1 - flip) * objective.pair_loss(z, "robust", flip) + flip * objective.pair_loss(-z, "robust", flip)
    assert_close(noisy, objective.pair_loss(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss, eps", CASES)
def test_extreme_margins_stay_finite(loss, eps, dtype):
    z = torch.tensor([-1e4, -200.0, 0.0, 1.0, 200.0, 1e4], dtype=dtype, requires_grad=True)
    value, slope = EntropyObjective.dpo(0.1).pair_loss_and_slope(z, loss, eps)
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all() and slope.isfinite().all() and grad.isfinite().all()
    if loss == "hinge":
        assert torch.equal(slope, grad.to(slope.dtype))  # at the corner z = 1 too
    if loss == "sigmoid" and eps == 0:
        assert value[0] == -z[0].item() and value[-1] == 0 and slope[0] == -1 and slope[-1] == 0


@pytest.mark.parametrize("loss", ["sigmoid", "robust"])
def test_a_pair_that_cannot_be_lost_costs_nothing(loss):
    """A rejected answer that the policy cannot give: z is infinite, and a smoothing of 0 times an infinite term no term."""
    objective = EntropyObjective.dpo(beta=0.1)
    z = torch.tensor([INF, -INF], requires_grad=True)
    value, slope = objective.pair_loss_and_slope(z, loss)
    assert value.tolist() == [0, INF] and slope.tolist() == [0, -1]
    value[0].backward()
    assert z.grad.tolist() == [0, 0]


@pytest.mark.parametrize("loss, eps", CASES)
def test_a_margin_without_a_number_has_no_sound_gradient(loss, eps):
    z = torch.tensor([NAN], requires_grad=True)
    value, slope = EntropyObjective.dpo(beta=0.1).pair_loss_and_slope(z, loss, eps)
    (grad,) = torch.autograd.grad(value, z)
    assert value.isnan().all() and (slope.isnan() | (slope == grad)).all() and (slope != 0).all()


def test_margin_and_loss_gradcheck(gen):
    logps = tuple(randn(gen, 3).requires_grad_() for _ in range(4))
    objective = EntropyObjective.hdpo(0.4, 1.3)
    assert torch.autograd.gradcheck(lambda *x: objective.pair_loss(objective.margin(*x)), logps)
    assert torch.autograd.gradcheck(lambda *x: objective.implicit_reward(*x), logps[:2])


# ---- what the losses and gradients are for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [EntropyObjective.hdpo(0.7, alpha) for alpha in (0.8, 1.0, 1.2)] + [EntropyObjective.qempo(1.4)],
    ids=str,
)
def test_population_loss_is_minimised_by_the_closed_form(objective, gen):
    rewards, log_ref = toy(gen, 7)
    chosen, rejected = torch.cartesian_prod(torch.arange(7), torch.arange(7)).unbind(1)
    prefers = torch.sigmoid(rewards[chosen] - rewards[rejected])  # Bradley-Terry, every ordered pair equally often
    theta = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=400, tolerance_grad=1e-10, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logp = torch.log_softmax(theta, 0)
        margin = objective.margin(logp[chosen], logp[rejected], log_ref[chosen], log_ref[rejected])
        loss = (prefers * objective.pair_loss(margin)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    learned = torch.log_softmax(theta.detach(), 0).exp()
    assert_close(learned, objective.optimal_policy(rewards, log_ref).exp(), 1e-5)


@pytest.mark.parametrize("objective", FAMILY, ids=str)
def test_policy_gradient_of_shaped_reward_is_the_gradient_of_the_objective(objective, gen):
    rewards, log_ref = toy(gen, 8)
    theta = randn(gen, 8).requires_grad_()
    logp = torch.log_softmax(theta, 0)
    a, b = objective.policy_coef, objective.ref_coef
    value = (logp.exp() * (rewards - a * logp + b * log_ref)).sum()  # E r + a H - b CE
    (exact,) = torch.autograd.grad(value, theta, retain_graph=True)
    shaped = objective.shaped_reward(rewards, logp, log_ref)
    assert not shaped.requires_grad
    (estimate,) = torch.autograd.grad((logp.exp().detach() * shaped * logp).sum(), theta)
    assert_close(estimate, exact)


# ---- messages -------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD_NUMBERS = [
    (lambda x: EntropyObjective(x, 0.1), "policy_coef", (0.0, -1.0, NAN, INF, "x")),
    (lambda x: EntropyObjective(0.1, x), "ref_coef", (-1e-300, NAN, INF, None)),
    (EntropyObjective.dpo, "beta", (0.0, -0.1, NAN)),
    (lambda x: EntropyObjective.hdpo(x, 1.0), "beta", (0.0, -0.1)),
    (lambda x: EntropyObjective.hdpo(0.1, x), "alpha", (0.0, -1.0, INF)),
    (lambda x: EntropyObjective.spl(x, 0.1), "alpha_s", (0.0, -1.0)),
    (lambda x: EntropyObjective.spl(0.1, x), "beta_s", (-1.0,)),
    (EntropyObjective.qempo, "lam", (0.0, -1.0)),
    (lambda x: EntropyObjective.qempo_kl(x, 1.0), "lam", (0.0, -1.0)),
    (lambda x: EntropyObjective.qempo_kl(1.0, x), "mu", (-1.0, NAN)),
]


@pytest.mark.parametrize("build, name, value", [(build, name, v) for build, name, vs in BAD_NUMBERS for v in vs])
def test_bad_coefficients_are_named(build, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value!r};"):
        build(value)


X = torch.zeros(3)
DPO = EntropyObjective.dpo(0.1)
BAD_CALLS = [
    (lambda: DPO.margin(X, torch.zeros(3, 1), X, X), "rejected_logps"),
    (lambda: DPO.margin(X, X), "ref_chosen_logps"),
    (lambda: DPO.margin(X, X, X), "ref_rejected_logps"),
    (lambda: DPO.margin(X, X, torch.zeros(1), X), "ref_chosen_logps"),
    (lambda: DPO.margin(X, X, X, torch.zeros(3, 1)), "ref_rejected_logps"),
    (lambda: DPO.implicit_reward(X), "ref_logps"),
    (lambda: DPO.implicit_reward(X, torch.zeros(1)), "ref_logps"),
    (lambda: DPO.shaped_reward(X, X), "ref_logps"),
    (lambda: DPO.shaped_reward(X, torch.zeros(1), X), "logps"),
    (lambda: DPO.optimal_policy(X), "ref_logps"),
    (lambda: DPO.optimal_policy(X, torch.zeros(2)), "ref_logps"),
    (lambda: DPO.optimal_policy(X, X - INF), "ref_logps"),
    (lambda: DPO.pair_loss(X, "kto"), "loss"),
    (lambda: DPO.pair_loss(X, "sigmoid", 0.6), "label_smoothing"),
    (lambda: DPO.pair_loss(X, "sigmoid", -0.1), "label_smoothing"),
    (lambda: DPO.pair_loss(X, "robust", 0.5), "label_smoothing"),
    (lambda: DPO.pair_loss(X, "ipo", 0.1), "label_smoothing"),
    (lambda: DPO.pair_loss_and_slope(X, "hinge", 0.1), "label_smoothing"),
]


@pytest.mark.parametrize("call, name", BAD_CALLS)
def test_bad_calls_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        call()


def test_objective_is_a_frozen_value():
    objective = EntropyObjective.dpo(np.float32(0.5))
    assert type(objective.policy_coef) is float and hash(objective) == hash(EntropyObjective.dpo(0.5))
    with pytest.raises(AttributeError):
        objective.policy_coef = 1.0


def test_docstring_examples_run():
    for module, fewest in ((entropy_po.objective, 8), (entropy_po.dual, 5), (entropy_po.policy_gradient, 1)):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted >= fewest


def test_every_loss_is_covered():
    assert {loss for loss, _ in CASES} == set(LOSSES)

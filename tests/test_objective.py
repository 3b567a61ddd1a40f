"""The (a, b) family against worked vectors, its identities, autograd, population minimisers and scipy."""

import doctest
import math
import random

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

import entropy_po.dual
import entropy_po.objective
import entropy_po.policy_gradient
from entropy_po.dual import solve_dual
from entropy_po.objective import LOSSES, EntropyObjective

ROUNDING = 1e-12  # relative, of a few fp64 operations on numbers up to ~1e3
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


@pytest.fixture
def gen():
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed = {seed}")  # shown by pytest when the test fails
    return torch.Generator().manual_seed(seed)


def randn(gen, *shape):
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def toy(gen, size):
    """rewards and normalised ref log-probs of a finite outcome space, partly correlated as after SFT."""
    rewards = randn(gen, size)
    return rewards, torch.log_softmax(randn(gen, size) + 0.5 * rewards, dim=0)


def entropy(logp):
    return -float(logp.exp() @ logp)


def kl(logp, log_ref):
    return float(logp.exp() @ (logp - log_ref))


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1).unbind()


def assert_close(ours, truth, relative=ROUNDING):
    ours, truth = torch.as_tensor(ours), torch.as_tensor(truth)
    assert ours.shape == truth.shape
    assert torch.equal(ours.isfinite(), truth.isfinite())
    live = truth.isfinite()
    worst = ((ours - truth)[live].abs() / truth[live].abs().clamp(min=1.0)).max()
    assert worst <= relative, f"worst error {worst:.3g} > {relative:.3g}"


# ---- worked vectors -------------------------------------------------------------------------------------------------


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


def equal_reward_policy(alpha, rewards, log_ref, min_reward):
    """H-DPO's optimum at the beta at which E[r] = min_reward."""

    def excess(log_beta):
        logp = EntropyObjective.hdpo(math.exp(log_beta), alpha).optimal_policy(rewards, log_ref)
        return float(logp.exp() @ rewards) - min_reward

    beta = math.exp(brentq(excess, -8, 12, xtol=1e-14, rtol=1e-14))
    return EntropyObjective.hdpo(beta, alpha).optimal_policy(rewards, log_ref)


def test_frontier_of_sixty_outcomes(gen):
    # At equal reward entropy rises with alpha, KL is least at alpha = 1 and flat there.
    rewards, log_ref = toy(gen, 60)
    min_reward = equal_reward_target(rewards, log_ref)
    alphas = (0.8, 0.9, 1.0, 1.1, 1.3, 2.0, 5.0)
    found = [equal_reward_policy(alpha, rewards, log_ref, min_reward) for alpha in alphas]
    entropies, kls = [entropy(p) for p in found], [kl(p, log_ref) for p in found]
    assert entropies == sorted(entropies) and len(set(entropies)) == len(alphas)
    assert kls[0] > kls[1] > kls[2] < kls[3] < kls[4] < kls[5] < kls[6]
    steps = [equal_reward_policy(1 + d, rewards, log_ref, min_reward) for d in (1e-3, 2e-3)]
    h_rise, kl_rise = (
        [f(p) - base for p in steps] for f, base in ((entropy, entropies[2]), (lambda p: kl(p, log_ref), kls[2]))
    )
    assert 1.9 < h_rise[1] / h_rise[0] < 2.1  # first order in alpha - 1
    assert 3.8 < kl_rise[1] / kl_rise[0] < 4.2  # second order


def equal_reward_target(rewards, log_ref):
    """A reward above both the reference's and the uniform policy's, so that the constraint binds everywhere."""
    low = max(float(log_ref.exp() @ rewards), float(rewards.mean()))
    return low + 0.4 * (float(rewards.max()) - low)


def test_matched_constraints_order_the_entropies(gen):
    rewards, log_ref = toy(gen, 60)
    min_reward = equal_reward_target(rewards, log_ref)
    rlhf = equal_reward_policy(1.0, rewards, log_ref, min_reward)
    budget = kl(rlhf, log_ref)
    qempo = solve_dual(rewards, log_ref, min_reward)
    some, more = (solve_dual(rewards, log_ref, min_reward, factor * budget) for factor in (1.05, 1.3))
    assert qempo.entropy >= more.entropy > some.entropy > entropy(rlhf)
    assert more.mu < some.mu and qempo.mu == 0
    assert_close(some.objective.optimal_policy(rewards, log_ref), some.policy_logps, 1e-9)
    assert_close(qempo.objective.optimal_policy(rewards), qempo.policy_logps, 1e-9)


# ---- solve_dual -----------------------------------------------------------------------------------------------------


def dual_value(found, rewards, log_ref, min_reward, max_kl):
    scores = found.lam * rewards if found.mu == 0 else found.lam * rewards + found.mu * log_ref
    value = (1 + found.mu) * float(torch.logsumexp(scores / (1 + found.mu), 0)) - found.lam * min_reward
    return value + (found.mu * max_kl if found.mu > 0 else 0.0)


def least_kl(rewards, log_ref, min_reward):
    if float(log_ref.exp() @ rewards) >= min_reward:
        return 0.0
    return kl(equal_reward_policy(1.0, rewards, log_ref, min_reward), log_ref)


@pytest.mark.parametrize("budget", [None, "tight", "middle", "slack"])
@pytest.mark.parametrize("reward_binds", [True, False])
def test_solve_dual_agrees_with_scipy(budget, reward_binds, gen):
    rewards, log_ref = toy(gen, 7)
    uniform = float(rewards.mean())
    min_reward = equal_reward_target(rewards, log_ref) if reward_binds else float(rewards.min())
    least = least_kl(rewards, log_ref, min_reward)
    free_kl = solve_dual(rewards, log_ref, min_reward).kl
    share = {None: None, "tight": 0.02, "middle": 0.5, "slack": 1.5}[budget]
    max_kl = None if share is None else least + share * (free_kl - least)
    found = solve_dual(rewards, log_ref, min_reward, max_kl)

    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1},
        {"type": "ineq", "fun": lambda p: p @ rewards.numpy() - min_reward},
    ]
    if max_kl is not None:
        constraints.append({"type": "ineq", "fun": lambda p: max_kl - p @ (np.log(p) - log_ref.numpy())})
    start = log_ref.exp().numpy()
    solved = minimize(
        lambda p: p @ np.log(p),
        start,
        jac=lambda p: np.log(p) + 1,
        bounds=[(1e-12, 1)] * 7,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert abs(found.entropy + solved.fun) <= 1e-6, solved.message
    assert_close(found.policy_logps.exp(), torch.from_numpy(solved.x), 1e-3)  # entropy is flat there: sqrt of 1e-6

    # A certificate that needs no other solver: feasible, and primal = dual.
    assert found.reward >= min_reward - 1e-12 and found.kl == pytest.approx(kl(found.policy_logps, log_ref), abs=1e-12)
    assert max_kl is None or found.kl <= max_kl + 1e-9
    gap = dual_value(found, rewards, log_ref, min_reward, max_kl) - found.entropy
    assert abs(gap) <= 1e-9 * (1 + found.lam + found.mu)
    assert (found.mu > 0) == (budget in ("tight", "middle"))
    assert found.lam > 0 if reward_binds else budget in ("tight", "middle") or found.lam == 0
    assert found.lam > 0 or uniform >= min_reward or found.mu > 0


def test_solve_dual_with_slack_constraints_is_uniform(gen):
    rewards, log_ref = toy(gen, 5)
    found = solve_dual(rewards, None, float(rewards.mean()) - 0.1)
    assert found.objective is None and found.lam == found.mu == 0 and found.kl is None
    assert_close(found.policy_logps, torch.full((5,), -math.log(5), dtype=torch.float64))
    log_ref[1] = -math.inf
    log_ref = torch.log_softmax(log_ref, 0)
    kept = solve_dual(rewards, log_ref, float(rewards.min()), max_kl=50.0)
    assert kept.objective is None and kept.policy_logps[1] == -math.inf
    assert kept.entropy == pytest.approx(math.log(4), rel=ROUNDING) and math.isfinite(kept.kl)
    assert solve_dual(rewards, log_ref, float(rewards.min())).kl == math.inf
    constant = solve_dual(torch.full((3,), 0.1), None, float(torch.tensor(0.1)))
    assert constant.lam == 0 and constant.entropy == pytest.approx(math.log(3), rel=ROUNDING)


def test_solve_dual_binds_kl_on_the_support_of_the_reference(gen):
    rewards, log_ref = toy(gen, 8)
    min_reward = equal_reward_target(rewards, log_ref)
    padded_ref = torch.cat([log_ref, torch.tensor([-math.inf], dtype=torch.float64)])
    padded_rewards = torch.cat([rewards, rewards.max().reshape(1) + 1])
    max_kl = 1.1 * least_kl(rewards, log_ref, min_reward)
    inner, outer = (
        solve_dual(rewards, log_ref, min_reward, max_kl),
        solve_dual(padded_rewards, padded_ref, min_reward, max_kl),
    )
    assert_close(outer.policy_logps[:8], inner.policy_logps, 1e-6)
    assert outer.policy_logps[8] == -math.inf and outer.lam == pytest.approx(inner.lam, rel=1e-6)
    assert_close(outer.objective.optimal_policy(padded_rewards, padded_ref), outer.policy_logps, 1e-8)


@pytest.mark.parametrize("scale, offset", [(1e-6, 0.0), (1e6, 0.0), (1.0, 1e6)])
def test_solve_dual_does_not_depend_on_the_units_of_reward(scale, offset, gen):
    rewards, log_ref = toy(gen, 12)
    min_reward = equal_reward_target(rewards, log_ref)
    max_kl = 1.2 * least_kl(rewards, log_ref, min_reward)
    plain = solve_dual(rewards, log_ref, min_reward, max_kl)
    moved = solve_dual(scale * rewards + offset, log_ref, scale * min_reward + offset, max_kl)
    assert moved.lam * scale == pytest.approx(plain.lam, rel=1e-6) and moved.mu == pytest.approx(plain.mu, rel=1e-6)


def test_solve_dual_near_the_largest_reward():
    # Ten digits below the maximum: lam is large but exact. P(best) = 1 - 1e-10 over two outcomes.
    found = solve_dual(torch.tensor([0.0, 1.0]), None, 1 - 1e-10)
    assert found.lam == pytest.approx(math.log(1e10), rel=1e-6)


def test_solve_dual_finds_the_exact_rlhf_budget_degenerate(gen):
    rewards, log_ref = toy(gen, 10)
    min_reward = equal_reward_target(rewards, log_ref)
    with pytest.raises(ValueError, match=r"max_kl.*multipliers diverge"):
        solve_dual(rewards, log_ref, min_reward, least_kl(rewards, log_ref, min_reward))


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


R4 = torch.tensor([0.0, 1.0, 2.0, 3.0])
REF4 = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
CUT4 = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
BAD_DUALS = [
    ((R4, None, 3.1), "^min_reward must be at most the largest reward 3, got 3.1; lower min_reward"),
    ((R4, None, 3.0), "^min_reward must be below .*lam diverges; lower min_reward"),
    ((R4, CUT4, 2.5, 9.0), "^min_reward must be at most the largest reward 2 that ref_logps supports"),
    ((R4, None, NAN), "^min_reward must be a finite number"),
    ((R4, REF4, 2.5, 0.1), "^max_kl must be above .* got 0.1; raise max_kl or lower min_reward"),
    ((R4, REF4, 0.5, 0.0), "^max_kl must be above 0, got that very value.*raise max_kl"),
    ((R4, REF4, 2.5, -1.0), "^max_kl must be a finite number >= 0"),
    ((R4, None, 2.5, 1.0), "^ref_logps must be given with max_kl"),
    ((R4, REF4[:3], 2.5, 1.0), "^ref_logps must have the shape of rewards"),
    ((R4, REF4 + 1, 2.5, 1.0), "^ref_logps must be log-probs that sum to one.*log_softmax"),
    ((R4, R4 - INF, 2.5, 1.0), "^ref_logps must be log-probs that sum to one"),
    ((R4.reshape(2, 2), None, 2.5), "^rewards must be a non-empty"),
    ((torch.tensor([0.0, NAN]), None, 0.5), "^rewards must be a non-empty"),
]


@pytest.mark.parametrize("arguments, message", BAD_DUALS)
def test_bad_constrained_problems_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_dual(*arguments)


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

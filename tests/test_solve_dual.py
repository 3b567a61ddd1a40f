"""`solve_dual` against scipy, a certificate of its own, and H-DPO's policies at equal reward."""

import math

import numpy as np
import pytest
import torch
from outcomes import ROUNDING, assert_close, toy
from scipy.optimize import brentq, minimize

from entropy_po.dual import solve_dual
from entropy_po.objective import EntropyObjective


def entropy(logp):
    return -float(logp.exp() @ logp)


def kl(logp, log_ref):
    return float(logp.exp() @ (logp - log_ref))


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
    least = least_kl(rewards, log_ref, min_reward)
    max_kl = least + 0.5 * (solve_dual(rewards, log_ref, min_reward).kl - least)  # between what must and what would be
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


R4 = torch.tensor([0.0, 1.0, 2.0, 3.0])
REF4 = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
CUT4 = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
BAD_DUALS = [
    ((R4, None, 3.1), "^min_reward must be at most the largest reward 3, got 3.1; lower min_reward"),
    ((R4, None, 3.0), "^min_reward must be below .*lam diverges; lower min_reward"),
    ((R4, CUT4, 2.5, 9.0), "^min_reward must be at most the largest reward 2 that ref_logps supports"),
    ((R4, None, math.nan), "^min_reward must be a finite number"),
    ((R4, REF4, 2.5, 0.1), "^max_kl must be above .* got 0.1; raise max_kl or lower min_reward"),
    ((R4, REF4, 0.5, 0.0), "^max_kl must be above 0, got that very value.*raise max_kl"),
    ((R4, REF4, 2.5, -1.0), "^max_kl must be a finite number >= 0"),
    ((R4, None, 2.5, 1.0), "^ref_logps must be given with max_kl"),
    ((R4, REF4[:3], 2.5, 1.0), "^ref_logps must have the shape of rewards"),
    ((R4, REF4 + 1, 2.5, 1.0), "^ref_logps must be log-probs that sum to one.*log_softmax"),
    ((R4, R4 - math.inf, 2.5, 1.0), "^ref_logps must be log-probs that sum to one"),
    ((R4.reshape(2, 2), None, 2.5), "^rewards must be a non-empty"),
    ((torch.tensor([0.0, math.nan]), None, 0.5), "^rewards must be a non-empty"),
]


@pytest.mark.parametrize("arguments, message", BAD_DUALS)
def test_bad_constrained_problems_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_dual(*arguments)

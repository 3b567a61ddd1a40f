"""Dual ascent: the rule of one update, and where it ends with policies that follow lam and mu slowly and are seen by samples."""

import json
import math

import pytest
import torch

from entropy_po.dual import DualAscent, solve_dual
from entropy_po.objective import EntropyObjective

# ---- one update ----


def test_lam_rises_below_the_target_and_falls_above_it():
    below, above = (DualAscent(lam=10.0, min_reward=0.5, lam_step=0.2) for _ in range(2))
    below.update(0.1)
    above.update(0.9)
    assert below.lam == pytest.approx(10 * math.exp(0.08)) and above.lam == pytest.approx(10 * math.exp(-0.08))
    assert below.objective == EntropyObjective.qempo(below.lam)


def test_mu_rises_above_the_budget_and_stops_at_zero():
    ascent = DualAscent(lam=2.0, mu=0.03, max_kl=4.0, mu_step=0.05)
    ascent.update(0.0, kl=6.0)
    assert ascent.mu == pytest.approx(1.03 * math.exp(0.05 * 0.5) - 1) and ascent.lam == 2.0
    for _ in range(3):
        ascent.update(0.0, kl=1.0)
    assert ascent.mu == 0.0 and ascent.objective.ref_coef == 0.0


def test_multipliers_keep_within_their_bounds_and_wait_for_the_warmup():
    ascent = DualAscent(lam=1.0, min_reward=1.0, lam_step=5.0, lam_bounds=(0.5, 2.0), warmup=2, window=3)
    lams = []
    for reward in (0.0, 0.0, 0.0, 0.0, 3.0, 3.0):
        ascent.update(reward)
        lams.append(ascent.lam)
    assert lams[:2] == [1.0, 1.0] and lams[2:] == [2.0, 2.0, 0.5, 0.5]


def test_the_verdict_tells_a_target_out_of_reach_from_one_not_yet_reached():
    ascent = DualAscent(lam=1.0, min_reward=1.0, lam_step=0.1, lam_bounds=(0.5, 1.5), window=4)
    for _ in range(4):
        ascent.update(0.5)
    assert not ascent.infeasible and "with lam now 1." in ascent.verdict()
    for _ in range(10):
        ascent.update(0.5)
    assert ascent.infeasible and ascent.verdict().startswith("infeasible as it stands: mean reward 0.5 misses R=1")
    for _ in range(4):
        ascent.update(0.99)
    assert not ascent.infeasible and ascent.verdict() == "mean reward 0.99 meets R=1"


def test_dual_ascent_continues_from_its_state():
    ascent, copy = (DualAscent(lam=3.0, mu=0.1, min_reward=0.7, max_kl=2.0) for _ in range(2))
    for i in range(30):
        ascent.update(0.1 * (i % 7), kl=0.3 * i)
    copy.load_state(json.loads(json.dumps(ascent.state())))
    assert copy == ascent


def test_dual_ascent_finds_the_multipliers_of_the_exact_dual():
    """Ascent with the exact optimum as the policy ends where `solve_dual` does."""
    torch.manual_seed(1)
    rewards, log_ref = torch.rand(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64).log_softmax(0)
    exact = solve_dual(rewards, log_ref, 0.6, 0.6)
    assert exact.lam > 0 and exact.mu > 0
    ascent = DualAscent(lam=1.0, mu=1.0, min_reward=0.6, max_kl=0.6, lam_step=1.0, mu_step=0.5, horizon=0)
    for _ in range(4000):
        logps = ascent.objective.optimal_policy(rewards, log_ref)
        ascent.update(float(logps.exp() @ rewards), float(logps.exp() @ (logps - log_ref)))
    assert (ascent.lam, ascent.mu) == pytest.approx((exact.lam, exact.mu), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0.0}, "lam must be"),
        ({"lam": 1.0, "max_kl": 0.0}, "max_kl must be"),
        ({"lam": 5.0, "lam_bounds": (0.1, 2.0)}, "lam=5 must lie within its bounds"),
    ],
)
def test_bad_dual_ascent_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DualAscent(**options)


def test_a_kl_budget_needs_a_kl():
    with pytest.raises(ValueError, match="kl must be"):
        DualAscent(lam=1.0, max_kl=1.0).update(0.5)


# ---- a policy that follows ----


class Outcomes:
    """A thousand outcomes that the reference rarely finds good, and a policy that takes natural gradient steps on them.

    Such a step moves log pi the same share of the way to the optimum of the present (a, b), so the policy follows with a lag:
    `LAG` updates near the multipliers that hold R and K, longer where lam is larger, as entropy then has little weight.
    """

    LAG, R = 50, 0.95

    def __init__(self):
        gen = torch.Generator().manual_seed(5)
        self.rewards = torch.rand(1000, generator=gen, dtype=torch.float64) ** 0.4
        self.log_ref = (2 * torch.randn(1000, generator=gen, dtype=torch.float64) - self.rewards).log_softmax(0)
        self.qempo = solve_dual(self.rewards, self.log_ref, self.R)
        self.max_kl = 1.835  # a quarter above the least KL that reaches R
        self.qempo_kl = solve_dual(self.rewards, self.log_ref, self.R, self.max_kl)

    def follow(self, ascent: DualAscent, optimum, updates: int, seed: int, samples: int = 128) -> torch.Tensor:
        """Means over the last third of (reward, KL, entropy), of the policy itself; the controller sees samples of it."""
        gen, logps, rows = torch.Generator().manual_seed(seed), self.log_ref, []
        for _ in range(updates):
            p = logps.exp()
            rows.append(torch.stack([p @ self.rewards, p @ (logps - self.log_ref), -p @ logps]))
            drawn = torch.multinomial(p, samples, replacement=True, generator=gen)
            ascent.update(float(self.rewards[drawn].mean()), float((logps - self.log_ref)[drawn].mean()))
            now = ascent.objective
            step = min(1 / (self.LAG * optimum.objective.policy_coef), 0.5 / now.policy_coef)
            logps = (logps + step * now.shaped_reward(self.rewards, logps, self.log_ref)).log_softmax(0)
        return torch.stack(rows[updates * 2 // 3 :]).mean(0)


@pytest.fixture(scope="module")
def outcomes():
    return Outcomes()


@pytest.mark.parametrize("factor", [0.1, 0.3, 3.0, 10.0])
def test_reward_and_entropy_settle_from_a_start_on_either_side(factor, outcomes):
    """Within 1 % of R of the reward's range, and at the entropy that R leaves, wherever lam starts."""
    exact = outcomes.qempo
    ascent = DualAscent(lam=factor * exact.lam, min_reward=outcomes.R, lam_step=1.0, horizon=outcomes.LAG)
    reward, _, entropy = outcomes.follow(ascent, exact, 300, seed=int(10 * factor))
    assert reward == pytest.approx(outcomes.R, abs=0.01) and entropy == pytest.approx(exact.entropy, abs=0.15)
    assert ascent.reward_held and not ascent.infeasible


def test_without_a_horizon_the_multiplier_winds_up_and_entropy_is_lost(outcomes):
    exact = outcomes.qempo
    ascent = DualAscent(lam=10 * exact.lam, min_reward=outcomes.R, lam_step=1.0, horizon=0)
    assert outcomes.follow(ascent, exact, 300, seed=0)[2] < exact.entropy - 1.0


@pytest.mark.parametrize("factors", [(0.25, 0.25), (0.25, 4.0), (4.0, 0.25), (4.0, 4.0)])
def test_lam_and_mu_settle_together(factors, outcomes):
    exact = outcomes.qempo_kl
    lam, mu = exact.lam * factors[0], exact.mu * factors[1]
    targets = {"min_reward": outcomes.R, "max_kl": outcomes.max_kl}
    ascent = DualAscent(lam=lam, mu=mu, lam_step=1.0, mu_step=0.05, horizon=outcomes.LAG, **targets)
    reward, kl, entropy = outcomes.follow(ascent, exact, 400, seed=0)
    assert reward == pytest.approx(outcomes.R, abs=0.01) and kl == pytest.approx(outcomes.max_kl, rel=0.05)
    assert entropy == pytest.approx(exact.entropy, abs=0.15)


def test_a_noisy_reward_out_of_reach_is_said_and_stays_said(outcomes):
    """Noise takes lam off its bound and back; what the controller says does not flicker with it."""
    exact = outcomes.qempo
    ascent = DualAscent(lam=exact.lam, min_reward=1.1, lam_bounds=(1.0, 1000.0), horizon=outcomes.LAG)
    outcomes.follow(ascent, exact, 150, seed=0, samples=8)
    said = []
    for seed in range(20):
        outcomes.follow(ascent, exact, 1, seed=seed, samples=8)
        said.append(ascent.infeasible)
    assert all(said) and "misses R=1.1 with lam at its upper bound 1000" in ascent.verdict()


def test_a_bound_does_not_wind_up():
    """What a multiplier could not act on while it was at its bound is not stored: it leaves as soon as R is met."""
    ascent = DualAscent(lam=1.0, min_reward=0.5, lam_step=1.0, horizon=0, lam_bounds=(0.1, 2.0))
    for _ in range(100):
        ascent.update(0.0)
    assert ascent.lam == 2.0
    ascent.update(0.6)
    assert ascent.lam == pytest.approx(2.0 * math.exp(-0.1))


def test_steps_are_taken_at_the_reward_the_policy_is_heading_for():
    ascent = DualAscent(lam=10.0, min_reward=0.5, lam_step=0.1, horizon=10.0)
    ascent.update(0.2)
    assert ascent.lam == pytest.approx(10 * math.exp(0.1 * 0.3))
    before = ascent.lam
    ascent.update(0.26)  # smoothed over 1 + 10 / 5 updates: 0.22, rising by 0.02, so heading for 0.42
    assert ascent.lam == pytest.approx(before * math.exp(0.1 * 0.08))


def test_mu_leaves_the_weight_of_log_pi_where_it_is():
    """A KL above its budget pulls to the reference; without a reward error the reward's weight, 1 / a, stays."""
    ascent = DualAscent(lam=8.0, mu=1.0, min_reward=0.5, max_kl=2.0, mu_step=0.1)
    before = ascent.objective
    ascent.update(0.5, kl=6.0)
    after = ascent.objective
    assert after.policy_coef == pytest.approx(before.policy_coef) and after.ref_coef > before.ref_coef

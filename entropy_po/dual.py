"""The multipliers lam and mu that meet a reward target R and a KL budget K. Source: arXiv 2602.15894.

`solve_dual` finds them exactly on a finite outcome space; `DualAscent` follows them while a policy is trained.
"""

import math
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropy_po.arguments import at_least_fp32, non_negative, positive, real, same_shape, whole
from entropy_po.objective import EntropyObjective


@dataclass(frozen=True, eq=False)
class DualSolution:
    """What `solve_dual` found: the multipliers, the policy and where it lies. Entropy and KL in nats.

    Attributes:
        objective: the (a, b) whose optimum the policy is, or None when lam = 0 (a = (1 + mu) / lam is infinite then).
        lam, mu: multipliers >= 0 of the reward and the KL constraint; 0 when the constraint does not bind.
        policy_logps: [Y], fp64 on the CPU; -inf outside the support of the reference when `max_kl` was given.
        entropy, reward: H(pi) and E_pi[r].
        kl: KL(pi || ref); None without a reference, inf where pi leaves the reference's support.
    """

    objective: EntropyObjective | None
    lam: float
    mu: float
    policy_logps: Tensor
    entropy: float
    reward: float
    kl: float | None


def solve_dual(
    rewards: Tensor, ref_logps: Tensor | None, min_reward: float, max_kl: float | None = None
) -> DualSolution:
    """The most diverse policy that meets a reward target and, optionally, a KL budget, on a finite outcome space.

        QEMPO      max H(pi)   s.t. E_pi[r] >= R                          (max_kl = None)
        QEMPO-KL   max H(pi)   s.t. E_pi[r] >= R  and  KL(pi||ref) <= K

    by the dual, min over lam, mu >= 0 of

        (1 + mu) * log sum_y exp((lam * r + mu * log ref) / (1 + mu)) - lam * R + mu * K.

    With u = 1 / (1 + mu) and c = lam * u its policy is ref^(1-u) * exp(c * r) / Z. E[r] rises with c; and at the c(u)
    that meets R, KL never falls as u rises (the dual, minimised over lam, is convex in mu). So two nested bracketed
    root searches find both multipliers, with nothing to tune and no start that fails.

    Args:
        rewards: [Y], finite.
        ref_logps: [Y], log-probs that sum to one (checked to 1e-4, then normalised in fp64); -inf means no support.
            May be None when `max_kl` is None; given there, it only serves to report the KL.
        min_reward: R.
        max_kl: K >= 0 in nats, or None for no KL constraint. When given, the policy keeps to the reference's support.
    Returns:
        DualSolution. When both constraints are slack at the uniform policy (on the support), it is that policy.
    Raises:
        ValueError: an argument out of its range; R above the largest reward; K below the least KL that reaches R; or
            R, K that leave a single feasible point (R the largest reward, K exactly RLHF's KL at R), where the
            multipliers diverge. The message says which argument to move, and past what.
    Numerics:
        fp64 on the CPU; constraints are met to rounding. Against scipy in tests/test_solve_dual.py.
    Example:
        >>> found = solve_dual(torch.tensor([0.0, 1.0]), None, min_reward=0.75)
        >>> round(found.lam, 6), round(found.entropy, 6)            # log 3, and the entropy of (1/4, 3/4)
        (1.098612, 0.562335)

    Source: arXiv 2602.15894.
    """
    r, log_ref = _checked_outcomes(rewards, ref_logps)
    min_reward = real("min_reward", min_reward, "pass the expected reward to reach")
    if max_kl is not None:
        max_kl = non_negative("max_kl", max_kl, "pass the KL budget in nats, or None for no budget")
        if log_ref is None:
            raise ValueError("ref_logps must be given with max_kl, got None; pass log ref [Y] or max_kl=None")
    keep = torch.ones_like(r, dtype=torch.bool) if max_kl is None or log_ref is None else ~torch.isneginf(log_ref)
    best, spread = float(r[keep].max()), float(r[keep].max() - r[keep].min()) or 1.0
    d = (r[keep] - best) / spread  # [n] in [-1, 0]; relative to the best, so that R close below it costs no digits
    target = (min_reward - best) / spread
    where = f"the largest reward {best:g}" + ("" if bool(keep.all()) else " that ref_logps supports")
    if target > 0:
        raise ValueError(f"min_reward must be at most {where}, got {min_reward:g}; lower min_reward")
    if target == 0 and bool((d < 0).any()):
        raise ValueError(
            f"min_reward must be below {where}, got {min_reward:g}, which only the best outcomes reach, so that lam "
            f"diverges; lower min_reward"
        )

    def solution(u: float, c: float, logp: Tensor) -> DualSolution:
        lam, mu = c / spread / u, (1 - u) / u
        policy = torch.full_like(r, -math.inf)
        policy[keep] = logp
        return DualSolution(
            objective=EntropyObjective.qempo_kl(lam, mu) if lam > 0 else None,
            lam=lam,
            mu=mu,
            policy_logps=policy,
            entropy=-float(logp.exp() @ logp),
            reward=best + spread * float(logp.exp() @ d),
            kl=None if log_ref is None else _kl(logp, log_ref[keep]),
        )

    free = solution(1.0, *_tilt(torch.zeros_like(d), d, target))
    slack = 1e-9 * (max_kl or 0.0) + 1e-13  # of K: what rounding of a KL can hide
    if max_kl is None or log_ref is None or free.kl is None or free.kl <= max_kl + slack:
        return free
    base = log_ref[keep]
    least_kl = _kl(_tilt(base, d, target)[1], base)
    if max_kl < least_kl - slack:
        raise ValueError(
            f"max_kl must be above {least_kl:.6g}, the least KL at which the expected reward reaches "
            f"min_reward={min_reward:g}, got {max_kl:g}; raise max_kl or lower min_reward"
        )
    if max_kl <= least_kl + slack:
        raise ValueError(
            f"max_kl must be above {least_kl:.6g}, got that very value, which leaves RLHF as the only feasible "
            f"policy, so that the multipliers diverge; raise max_kl (say by 5 %) or lower min_reward={min_reward:g}"
        )
    u = _increasing_root(lambda u: _kl(_tilt((1 - u) * base, d, target)[1], base) - max_kl, 0.0, 1.0)
    return solution(u, *_tilt((1 - u) * base, d, target))


def _tilt(base: Tensor, d: Tensor, target: float) -> tuple[float, Tensor]:
    """(c, log-probs of softmax(base + c * d)) at the least c >= 0 with E[d] >= target; d <= 0, target < 0 or d = 0."""

    def excess(c: float) -> float:
        return float(torch.softmax(base + c * d, dim=0) @ d) - target

    c = 0.0
    if excess(0.0) < -1e-15:  # below the rounding of E[d], R already holds at c = 0
        high = 1.0
        while excess(high) < 0:
            high *= 2
        c = _increasing_root(excess, 0.0, high)
    return c, torch.log_softmax(base + c * d, dim=0)


def _increasing_root(f: Callable[[float], float], low: float, high: float) -> float:
    """Root of an increasing f with f(low) < 0 <= f(high), to a few units in the last place; ends where f >= 0."""
    f_low, f_high, last = f(low), f(high), 0
    for step in range(240):  # every third step halves the bracket, so this covers all 53 bits and small roots
        if f_high == 0 or high - low <= 4 * 2.0**-52 * high:
            break
        x = high - f_high * (high - low) / (f_high - f_low)
        if step % 3 == 2 or not low < x < high:
            x = 0.5 * (low + high)
        y = f(x)
        side = 1 if y >= 0 else -1
        if side > 0:
            high, f_high, f_low = x, y, f_low * (0.5 if last == side else 1.0)  # Illinois: unstick the other end
        else:
            low, f_low, f_high = x, y, f_high * (0.5 if last == side else 1.0)
        last = side
    return high


def _kl(logp: Tensor, log_ref: Tensor) -> float:
    p = logp.exp()
    return float(torch.where(p > 0, p * (logp - log_ref), 0.0).sum())  # p = 0 off the support of ref: 0, not 0 * inf


def _checked_outcomes(rewards: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, Tensor | None]:
    r = at_least_fp32("rewards", rewards).detach().to("cpu", torch.float64)
    if r.dim() != 1 or r.numel() == 0 or not bool(r.isfinite().all()):
        raise ValueError(f"rewards must be a non-empty [Y] of finite numbers, got shape {tuple(r.shape)}; check it")
    if ref_logps is None:
        return r, None
    same_shape("ref_logps", ref_logps, rewards, "rewards")
    log_ref = ref_logps.detach().to("cpu", torch.float64)
    total = float(torch.logsumexp(log_ref, dim=0))
    if not abs(total) <= 1e-4:  # also catches NaN and a reference that is -inf throughout
        raise ValueError(f"ref_logps must be log-probs that sum to one, got log sum {total:g}; apply log_softmax first")
    return r, log_ref - total


@dataclass
class DualAscent:
    """The multipliers of E r >= R and KL <= K, moved after each batch of samples towards the constraints.

        log a     <- log a     - lam_step * (R - reward ahead),       a = (1 + mu) / lam, the weight of log pi
        log(1+mu) <- log(1+mu) + mu_step * (KL ahead / K - 1),        mu >= 0

        ahead = s + horizon * ds,    ds = (mean - s) / (1 + horizon / 5),    s <- s + ds

    This ascends the paper's dual with three changes. The steps are taken in log a and log(1 + mu), not in lam and mu: the
    policy is ref^(mu / (1 + mu)) * exp(r / a) / Z, whose reward falls with a at any mu, and whose KL falls with mu at the a
    that meets R; so each constraint moves what it depends on and mu does not carry the reward along. They are taken at the
    reward and KL that the policy is heading for, not those it has: the dual's gradient is R - E r *of the policy that is
    optimal for lam*, and a policy that follows with r' = (r_optimal - r) / horizon has r_optimal = r + horizon * r'. Without
    it lam goes on rising while a policy that learns is still on its way, and entropy is lost for good (windup). And the
    multipliers are the integrators themselves, clipped to their bounds, so none is wound up beyond what acts. The means of
    batches are smoothed over a fifth of the horizon. In the words of control this is PI with the policy's lag as the
    integral time, in velocity form. A constraint whose target is None leaves its multiplier where it is.

    Args:
        lam, mu: where they start; lam > 0, mu >= 0.
        min_reward: R, or None.
        max_kl: K > 0 in nats, or None.
        lam_step: per update and unit of reward.
        mu_step: per update and relative excess of the KL.
        horizon: updates that the policy takes to follow the multipliers, >= 0; 0 if it follows at once.
        lam_bounds, mu_bounds: (lowest, highest).
        warmup: updates that only watch, until the policy has followed the first multipliers.
        tolerance: how far below R, in units of reward, or above K, relatively, still counts as holding it.
        window: updates over which the means are taken that `verdict` judges.
    Raises:
        ValueError: an argument out of its range.
    Example:
        >>> ascent = DualAscent(lam=10.0, min_reward=0.5, lam_step=0.2)
        >>> ascent.update(reward=0.0)
        >>> round(ascent.lam, 3)  # 10 * exp(0.1)
        11.052

    Source: the dual, arXiv 2602.15894; proportional action on a multiplier, arXiv 2007.03964.
    """

    lam: float
    mu: float = 0.0
    min_reward: float | None = None
    max_kl: float | None = None
    lam_step: float = 0.3
    mu_step: float = 0.02
    horizon: float = 100.0
    lam_bounds: tuple[float, float] = (1e-6, 1e6)
    mu_bounds: tuple[float, float] = (0.0, 100.0)
    warmup: int = 0
    tolerance: float = 0.02
    window: int = 20
    updates: int = 0
    recent: list[tuple[float, float | None, float, float]] = field(default_factory=list)  # reward, KL, lam, mu
    smoothed: tuple[float, float | None] | None = None  # reward and KL

    def __post_init__(self) -> None:
        self.lam = positive("lam", self.lam, "it multiplies the reward constraint")
        self.mu = non_negative("mu", self.mu, "it multiplies the KL constraint")
        self.horizon = non_negative("horizon", self.horizon, "it counts updates, 0 for a policy that follows at once")
        if self.min_reward is not None:
            self.min_reward = real("min_reward", self.min_reward, "it is the mean reward to reach")
        if self.max_kl is not None:
            self.max_kl = positive("max_kl", self.max_kl, "it is a budget in nats")
        for name in ("lam_step", "mu_step", "tolerance"):
            setattr(self, name, non_negative(name, getattr(self, name), "0 holds still"))
        whole("warmup", self.warmup, 0, "it counts updates")
        whole("window", self.window, 1, "it counts updates")
        self.lam_bounds, self.mu_bounds = _bounds("lam_bounds", self.lam_bounds), _bounds("mu_bounds", self.mu_bounds)
        for name, value, (low, high) in (("lam", self.lam, self.lam_bounds), ("mu", self.mu, self.mu_bounds)):
            if not low <= value <= high:
                raise ValueError(f"{name}={value:g} must lie within its bounds, {low:g} to {high:g}; move it or them")

    @property
    def objective(self) -> EntropyObjective:
        """The (a, b) of the multipliers as they are now."""
        return EntropyObjective.qempo_kl(self.lam, self.mu)

    def update(self, reward: float, kl: float | None = None) -> None:
        """One step, from the mean reward and KL of a batch of samples; kl is read where there is a budget for it.

        Raises:
            ValueError: a mean that is not finite, or no kl while `max_kl` is set.
        """
        reward = real("reward", reward, "check the reward functions")
        if self.max_kl is not None:
            kl = real("kl", math.nan if kl is None else kl, "check the policy's and the reference's log-probs")
        kl = None if self.max_kl is None else kl
        self.updates += 1
        last_reward, last_kl = self.smoothed or (reward, kl)
        smooth_reward, reward_ahead = self._ahead(reward, last_reward)
        smooth_kl, kl_ahead = (None, None) if kl is None or last_kl is None else self._ahead(kl, last_kl)
        self.smoothed = smooth_reward, smooth_kl
        if self.updates > self.warmup:
            self._move(reward_ahead, kl_ahead)
        self.recent = [*self.recent, (reward, kl, self.lam, self.mu)][-self.window :]

    def _ahead(self, value: float, smoothed: float) -> tuple[float, float]:
        """(smoothed value, where it is heading)."""
        change = (value - smoothed) / (1 + self.horizon / 5)
        return smoothed + change, smoothed + change + self.horizon * change

    def _move(self, reward: float, kl: float | None) -> None:
        grown = 1.0
        if self.max_kl is not None and kl is not None:
            before = 1 + self.mu
            self.mu = _clip(before * _exp(self.mu_step * (kl / self.max_kl - 1)) - 1, self.mu_bounds)
            grown = (1 + self.mu) / before  # what lam grows by, so that a stays
        if self.min_reward is not None:
            factor = grown * _exp(self.lam_step * (self.min_reward - reward))
            self.lam = _clip(self.lam * factor, self.lam_bounds)

    @property
    def mean_reward(self) -> float:
        """Over the window; NaN before the first update."""
        return _mean([row[0] for row in self.recent])

    @property
    def mean_kl(self) -> float:
        return _mean([row[1] for row in self.recent if row[1] is not None])

    @property
    def reward_held(self) -> bool:
        """Whether the window's mean reward is R within tolerance, or above it."""
        return self.min_reward is None or self.mean_reward >= self.min_reward - self.tolerance

    @property
    def kl_held(self) -> bool:
        return self.max_kl is None or self.mean_kl <= self.max_kl * (1 + self.tolerance)

    @property
    def at_lam_bound(self) -> bool:
        """lam was at its upper bound within the window; noise takes it off and back."""
        return any(lam >= self.lam_bounds[1] for *_, lam, _ in self.recent)

    @property
    def at_mu_bound(self) -> bool:
        return any(mu >= self.mu_bounds[1] for *_, mu in self.recent)

    @property
    def infeasible(self) -> bool:
        """A full window misses a constraint although its multiplier is at its upper bound."""
        if len(self.recent) < self.window:
            return False
        return (self.at_lam_bound and not self.reward_held) or (self.at_mu_bound and not self.kl_held)

    def verdict(self) -> str:
        """One sentence: whether the constraints hold over the window, and what to do where they do not."""
        parts, remedies = [], []
        if self.min_reward is not None:
            parts.append(f"mean reward {self.mean_reward:.4g} {_held(self.reward_held)} R={self.min_reward:.4g}")
            if not self.reward_held:
                bound = self.at_lam_bound
                parts[-1] += f" with lam {'at its upper bound ' if bound else 'now '}{self.lam:.4g}"
                remedies.append(
                    "lower min_reward" + (" or raise lam_max" if bound else ", train longer or raise lam_lr")
                )
            elif self.mean_reward > self.min_reward + self.tolerance and self.lam > self.lam_bounds[0]:
                parts[-1] += f" with lam now {self.lam:.4g}"
        if self.max_kl is not None:
            parts.append(f"mean KL {self.mean_kl:.4g} {_held(self.kl_held)} K={self.max_kl:.4g}")
            if not self.kl_held:
                remedies.append("raise max_kl, or lower min_reward where both cannot be had")
        head = "infeasible as it stands: " if self.infeasible else ""
        return head + ", ".join(parts) + ("; " + "; ".join(remedies) if remedies else "")

    def state(self) -> dict[str, Any]:
        """What moves, as JSON holds it without loss."""
        moving = asdict(self)
        return {name: moving[name] for name in ("lam", "mu", "updates", "recent", "smoothed")}

    def load_state(self, state: dict[str, Any]) -> None:
        self.lam, self.mu, self.updates = state["lam"], state["mu"], state["updates"]
        self.recent = [tuple(row) for row in state["recent"]]
        self.smoothed = None if state["smoothed"] is None else tuple(state["smoothed"])


def _bounds(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{name} must be (lowest, highest), got {reprlib.repr(bounds)}; give two numbers")
    low, high = (non_negative(name, bound, "give (lowest, highest)") for bound in bounds)
    return low, high


def _exp(exponent: float) -> float:
    """Without overflow: one update by a factor of e^50 ends at any bound."""
    return math.exp(_clip(exponent, (-50.0, 50.0)))


def _clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _held(held: bool) -> str:
    return "meets" if held else "misses"

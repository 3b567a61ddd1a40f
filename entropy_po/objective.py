"""The (a, b) family of entropy-controlled preference objectives: H-DPO, DPO, SPL, QEMPO and QEMPO-KL.

Every method is one pair of numbers. With reward r, policy pi, reference ref, entropy H and cross-entropy CE (nats):

    maximise   E_pi[r] + a * H(pi) - b * CE(pi, ref),      a = policy_coef > 0,  b = ref_coef >= 0     (objective)
    optimum    pi*(y) = ref(y)^(b/a) * exp(r(y)/a) / Z                                                 (policy)
    reward     r(y)   = a * log pi*(y) - b * log ref(y) + const                                        (implicit reward)
    margin     z      = a * [log pi(w) - log pi(l)] - b * [log ref(w) - log ref(l)]                    (offline pair)

Log-probabilities are sums over a response's tokens, never length-normalised. Nothing here has a vocabulary axis.
Sources: arXiv 2411.07595 (H-DPO), arXiv 2602.15894 (QEMPO, QEMPO-KL).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_po.arguments import at_least_fp32, non_negative, positive, same_shape

PairLoss = Literal["sigmoid", "robust", "ipo", "hinge"]
LOSSES: tuple[str, ...] = get_args(PairLoss)


@dataclass(frozen=True)
class EntropyObjective:
    """One member of the family: the weights on log pi and on log ref.

    | constructor             | a: policy_coef | b: ref_coef |
    |-------------------------|----------------|-------------|
    | `dpo(beta)`             | beta           | beta        |
    | `hdpo(beta, alpha)`     | alpha * beta   | beta        |
    | `spl(alpha_s, beta_s)`  | alpha_s        | beta_s      |
    | `qempo(lam)`            | 1 / lam        | 0           |
    | `qempo_kl(lam, mu)`     | (1 + mu) / lam | mu / lam    |

    Args:
        policy_coef: a > 0, finite; reward units per nat of log pi.
        ref_coef: b >= 0, finite; reward units per nat of log ref. 0 means that no reference is read.
    Raises:
        ValueError: a coefficient out of its range; the message names the argument of the constructor that was called.
    Example:
        >>> EntropyObjective.hdpo(beta=0.5, alpha=2.0)
        EntropyObjective(policy_coef=1.0, ref_coef=0.5)
        >>> EntropyObjective.hdpo(beta=0.5, alpha=2.0) == EntropyObjective.qempo_kl(lam=2.0, mu=1.0)
        True

    Source: arXiv 2411.07595 (H-DPO), arXiv 2602.15894 (QEMPO).
    """

    policy_coef: float
    ref_coef: float

    def __post_init__(self) -> None:
        a = positive("policy_coef", self.policy_coef, "it weighs log pi: alpha * beta in H-DPO, 1 / lam in QEMPO")
        b = non_negative("ref_coef", self.ref_coef, "it weighs log ref: beta in DPO, 0 for no reference")
        object.__setattr__(self, "policy_coef", a)
        object.__setattr__(self, "ref_coef", b)

    @classmethod
    def dpo(cls, beta: float) -> "EntropyObjective":
        """DPO: a = b = beta > 0."""
        return cls.hdpo(beta, 1.0)

    @classmethod
    def hdpo(cls, beta: float, alpha: float) -> "EntropyObjective":
        """H-DPO: a = alpha * beta, b = beta, both > 0. alpha < 1 sharpens the policy, alpha > 1 flattens it."""
        beta = positive("beta", beta, "DPO often uses 0.01 to 0.5; for no reference use EntropyObjective.qempo")
        alpha = positive("alpha", alpha, "1 is DPO, below 1 sharpens, above 1 flattens")
        return cls(alpha * beta, beta)

    @classmethod
    def spl(cls, alpha_s: float, beta_s: float) -> "EntropyObjective":
        """Soft preference learning: a = alpha_s > 0 on the entropy, b = beta_s >= 0 on the cross-entropy."""
        alpha_s = positive("alpha_s", alpha_s, "it weighs the entropy")
        return cls(alpha_s, non_negative("beta_s", beta_s, "it weighs the cross-entropy to the reference"))

    @classmethod
    def qempo(cls, lam: float) -> "EntropyObjective":
        """QEMPO: a = 1 / lam, b = 0, where lam > 0 is the multiplier of the reward constraint."""
        return cls(1.0 / positive("lam", lam, "it multiplies the reward constraint"), 0.0)

    @classmethod
    def qempo_kl(cls, lam: float, mu: float) -> "EntropyObjective":
        """QEMPO-KL: a = (1 + mu) / lam, b = mu / lam; lam > 0 multiplies the reward constraint, mu >= 0 the KL one."""
        lam = positive("lam", lam, "it multiplies the reward constraint")
        mu = non_negative("mu", mu, "it multiplies the KL constraint; 0 is QEMPO")
        return cls((1.0 + mu) / lam, mu / lam)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are read at all (b > 0)."""
        return self.ref_coef > 0

    def margin(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
    ) -> Tensor:
        """The pair margin, the one number through which every pair loss sees the model.

            z = a * (chosen_logps - rejected_logps) - b * (ref_chosen_logps - ref_rejected_logps)

        Args:
            chosen_logps, rejected_logps: [B], any float dtype; summed log-probs under the policy, nats.
            ref_chosen_logps, ref_rejected_logps: [B]; the same under the reference. Ignored when b = 0.
        Returns:
            [B], fp32 or fp64 (low precision is raised to fp32 first). Differentiable in every argument.
        Raises:
            ValueError: shapes differ, or a reference is missing while b > 0; the message names the argument.
        Example:
            >>> w, l, ref_w, ref_l = torch.tensor([[-10.0], [-12.0], [-11.0], [-11.5]])
            >>> EntropyObjective.qempo_kl(lam=2.0, mu=1.0).margin(w, l, ref_w, ref_l)
            tensor([1.7500])

        Source: arXiv 2411.07595, the H-DPO loss; theory in the module docstring.
        """
        same_shape("rejected_logps", rejected_logps, chosen_logps, "chosen_logps")
        z = self.policy_coef * (
            at_least_fp32("chosen_logps", chosen_logps) - at_least_fp32("rejected_logps", rejected_logps)
        )
        if not self.needs_reference:
            return z
        ref_w = self._reference("ref_chosen_logps", ref_chosen_logps, chosen_logps, "chosen_logps")
        ref_l = self._reference("ref_rejected_logps", ref_rejected_logps, chosen_logps, "chosen_logps")
        return z - self.ref_coef * (ref_w - ref_l)

    def pair_loss(self, margin: Tensor, loss: PairLoss = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
        """Loss of each pair, a function of its margin z alone; not reduced over pairs.

            sigmoid   -(1 - e) log sigmoid(z) - e log sigmoid(-z)                (DPO; e > 0: conservative DPO)
            robust    [-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2e)   (robust DPO: labels flip with prob. e)
            ipo       (z / a - 1 / (2a))^2                                       (IPO)
            hinge     max(0, 1 - z)                                              (SLiC)

        with e = `label_smoothing`. IPO regresses the log-ratio gap z / a (for a = b = beta: gap of log pi / ref) on
        1 / (2 beta), and a takes beta's place throughout, so that the target of z is 1/2 for every (a, b); at
        a = b = beta this is TRL's `loss_type="ipo"` on the same log-probs (sums here, token means in some versions).

        Args:
            margin: [B], from `margin`; reward units.
            loss: one of "sigmoid", "robust", "ipo", "hinge".
            label_smoothing: e in [0, 0.5] for sigmoid, [0, 0.5) for robust, 0 for the others.
        Returns:
            [B], fp32 or fp64, differentiable. Finite for every finite z whose loss has a finite value.
        Raises:
            ValueError: an unknown `loss`, or a `label_smoothing` that the loss cannot take.
        Example:
            >>> EntropyObjective.dpo(beta=0.1).pair_loss(torch.zeros(2))
            tensor([0.6931, 0.6931])

        Source: arXiv 2411.07595; robust: arXiv 2403.00409; ipo: arXiv 2310.12036; hinge: arXiv 2305.10425.
        """
        return self.pair_loss_and_slope(margin, loss, label_smoothing)[0]

    def pair_loss_and_slope(
        self, margin: Tensor, loss: PairLoss = "sigmoid", label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """`pair_loss` with its derivative dloss/dz in closed form, for operators that run without autograd.

        By the chain rule dloss/dchosen_logps = a * slope = -dloss/drejected_logps: one scalar per pair.

        Args:
            margin, loss, label_smoothing: as for `pair_loss`.
        Returns:
            (loss [B], slope [B]), both fp32 or fp64. The hinge has slope 0 at its corner z = 1, as torch.relu has.
        Raises:
            ValueError: as for `pair_loss`.
        Example:
            >>> EntropyObjective.dpo(beta=0.1).pair_loss_and_slope(torch.zeros(1))
            (tensor([0.6931]), tensor([-0.5000]))
        """
        eps = check_smoothing(loss, label_smoothing)
        z = at_least_fp32("margin", margin)
        if loss == "sigmoid":
            return _log_losses(z, 1 - eps, eps), eps * torch.sigmoid(z) - (1 - eps) * torch.sigmoid(-z)
        if loss == "robust":
            value = _log_losses(z, 1 - eps, -eps)
            slope = -eps * torch.sigmoid(z) - (1 - eps) * torch.sigmoid(-z)
            return value / (1 - 2 * eps), slope / (1 - 2 * eps)
        if loss == "ipo":
            gap = (z - 0.5) / self.policy_coef
            return gap.square(), 2 * gap / self.policy_coef
        # of NaN -1, as torch.relu's: a pair without a margin does not drop out
        return torch.relu(1 - z), (z >= 1).to(z.dtype) - 1

    def implicit_reward(self, logps: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        """The reward for which the policy is optimal, up to a constant per prompt: a * logps - b * ref_logps.

        Args:
            logps: any shape, any float dtype; summed log-probs of responses under the policy, nats.
            ref_logps: the same shape, under the reference. Ignored when b = 0.
        Returns:
            The shape of `logps`, fp32 or fp64, differentiable. Differences of it over a pair are the margin.
        Raises:
            ValueError: `ref_logps` is missing while b > 0, or its shape differs.
        Example:
            >>> EntropyObjective.qempo(lam=10.0).implicit_reward(torch.tensor([-20.0]))
            tensor([-2.])
        """
        reward = self.policy_coef * at_least_fp32("logps", logps)
        if not self.needs_reference:
            return reward
        return reward - self.ref_coef * self._reference("ref_logps", ref_logps, logps, "logps")

    def shaped_reward(self, rewards: Tensor, logps: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        """The reward to hand to a policy gradient, a constant: r - a * logps + b * ref_logps.

        E_pi[shaped * grad log pi] is then the exact gradient of E_pi[r] + a H(pi) - b CE(pi, ref).

        Args:
            rewards: any shape; the task's reward of each sampled response.
            logps, ref_logps: the same shape; summed log-probs under the policy and the reference (ignored when b = 0).
        Returns:
            The shape of `rewards`, fp32 or fp64, detached from every graph.
        Raises:
            ValueError: `ref_logps` is missing while b > 0, or a shape differs.
        Example:
            >>> EntropyObjective.qempo(lam=100.0).shaped_reward(torch.tensor([1.0]), torch.tensor([-210.0]))
            tensor([3.1000])
        """
        same_shape("logps", logps, rewards, "rewards")
        return (at_least_fp32("rewards", rewards) - self.implicit_reward(logps, ref_logps)).detach()

    def optimal_policy(self, rewards: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        """Log-probs of the closed-form optimum on a finite outcome space: ref^(b/a) * exp(r/a) / Z.

        Args:
            rewards: [..., Y], finite; the reward of each of Y outcomes.
            ref_logps: [..., Y] or [Y]; log ref. Ignored when b = 0; where it is -inf and b > 0 the optimum is -inf too.
        Returns:
            [..., Y], fp32 or fp64; log-probs normalised over the last dimension.
        Raises:
            ValueError: `ref_logps` is missing while b > 0, its shape differs, or a row of it is -inf throughout.
        Example:
            >>> EntropyObjective.qempo(lam=1.0).optimal_policy(torch.tensor([0.0, 0.0])).exp()
            tensor([0.5000, 0.5000])
        """
        scores = at_least_fp32("rewards", rewards)
        if self.needs_reference:
            if isinstance(ref_logps, Tensor) and ref_logps.shape == rewards.shape[-1:]:
                ref_logps = at_least_fp32("ref_logps", ref_logps).expand_as(rewards)
            ref = self._reference("ref_logps", ref_logps, rewards, "rewards")
            if bool(torch.isneginf(ref).all(-1).any()):
                raise ValueError("ref_logps must support some outcome, got a row of -inf; drop that row")
            scores = scores + self.ref_coef * ref
        # differences first: their quotients may leave the range of fp32 where the scores' own would too
        return torch.log_softmax((scores - scores.detach().amax(-1, keepdim=True)) / self.policy_coef, dim=-1)

    def _reference(self, name: str, ref_logps: Tensor | None, like: Tensor, like_name: str) -> Tensor:
        if ref_logps is None:
            raise ValueError(
                f"{name} must be given when ref_coef > 0, got None with ref_coef={self.ref_coef:g}; "
                f"pass the reference's log-probs or use an objective with ref_coef=0 such as EntropyObjective.qempo"
            )
        same_shape(name, ref_logps, like, like_name)
        return at_least_fp32(name, ref_logps)


def _log_losses(z: Tensor, as_labelled: float, flipped: float) -> Tensor:
    """-as_labelled log sigmoid(z) - flipped log sigmoid(-z); a term of weight 0 is none, also where it is infinite."""
    value = -as_labelled * F.logsigmoid(z)
    return value - flipped * F.logsigmoid(-z) if flipped else value


def check_smoothing(loss: str, label_smoothing: float) -> float:
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}; pick one of these")
    eps = non_negative("label_smoothing", label_smoothing, "it is the share of labels taken as flipped, 0 for none")
    if loss in ("ipo", "hinge") and eps != 0:
        raise ValueError(f"label_smoothing must be 0 for loss={loss!r}, got {eps:g}; use loss='sigmoid' or 'robust'")
    if eps > 0.5 or (loss == "robust" and eps == 0.5):
        limit = "below 0.5" if loss == "robust" else "at most 0.5"
        raise ValueError(f"label_smoothing must be {limit} for loss={loss!r}, got {eps:g}; swap mislabelled pairs")
    return eps

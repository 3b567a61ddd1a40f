"""Advantages of sampled answers and the clipped surrogate, for the online form of every (a, b) objective.

For one prompt, a policy pi over answers y = (y_1 ... y_T) and J = E_pi[r] + a H(pi) - b CE(pi, ref),

    grad J = E_y [ (r(y) - a log pi(y) + b log ref(y) - baseline) grad log pi(y) ]                           (sequence)
    grad J = E_y [ sum_t (r(y) + sum_{u > t} a H_u + sum_{u >= t} b log ref_u - baseline_t) grad log pi_t
                   + a sum_t grad H_t ]                                                                        (token)

where log pi_t = log pi(y_t | y_<t), log ref_t likewise, and H_t is the entropy in nats of pi(. | y_<t), which the head's
kernels give with its gradient. Both are unbiased. In the first, the term a E[grad log pi] that the product rule leaves is
zero; the second follows from the chain rule H(pi) = E sum_t H_t: a token moves the entropies after it, never its own. The
bonus common in GRPO code keeps `a sum_t grad H_t` and drops `sum_{u > t} a H_u`: it is blind to what a token does to the
entropy of later ones, and so biased (`token_advantages(entropy=None)`).

A baseline may depend on anything but the answer's own tokens from t on: here, the mean of the same quantity over the other
answers to the prompt. Nothing here has a vocabulary axis.
"""

import torch
from torch import Tensor

from entropy_po.arguments import at_least_fp32, non_negative, same_shape
from entropy_po.objective import EntropyObjective


def leave_one_out(values: Tensor) -> Tensor:
    """Each value minus the mean of the others in its group.

    Args:
        values: [B, G, ...], G >= 2 answers to each of B prompts.
    Returns:
        The shape of `values`.
    Raises:
        ValueError: a group of one, which leaves no other to compare with.
    Example:
        >>> leave_one_out(torch.tensor([[3.0, 0.0, 0.0]]))
        tensor([[ 3.0000, -1.5000, -1.5000]])
    """
    values = at_least_fp32("values", values)
    size = values.shape[1] if values.dim() > 1 else 1
    if size < 2:
        raise ValueError(f"values has groups of {size}; a baseline needs 2 answers or more to each prompt.")
    return (values - values.mean(1, keepdim=True)) * (size / (size - 1))


def sequence_advantages(
    objective: EntropyObjective, rewards: Tensor, logps: Tensor, ref_logps: Tensor | None = None
) -> Tensor:
    """Advantages of whole answers, of the sequence form in the module docstring.

    Args:
        rewards, logps, ref_logps: [B, G]; log-probs are sums over an answer's tokens, nats. ref_logps only where b > 0.
    Returns:
        [B, G], detached.
    Raises:
        ValueError: as `EntropyObjective.shaped_reward` and `leave_one_out`.
    """
    return leave_one_out(objective.shaped_reward(rewards, logps, ref_logps))


def token_advantages(
    objective: EntropyObjective, rewards: Tensor, entropy: Tensor | None, ref_logps: Tensor | None = None
) -> Tensor:
    """Advantages of every token, of the token form; to go with `a * sum of the entropies`, differentiated.

    Args:
        rewards: [B, G].
        entropy: [B, G, T], entropies H_t in nats, 0 after an answer's end; None for the biased bonus.
        ref_logps: [B, G, T], log-probs of the tokens under the reference, 0 after the end. Ignored where b = 0.
    Returns:
        [B, G, T], detached; without meaning after an answer's end. [B, G, 1] where nothing depends on the token.
    Raises:
        ValueError: `ref_logps` is missing while b > 0; or as `leave_one_out`.
    """
    to_go = at_least_fp32("rewards", rewards)[..., None]
    for name, values in (("entropy", entropy), ("ref_logps", ref_logps if objective.needs_reference else None)):
        if values is not None and (at_least_fp32(name, values).dim(), values.shape[:2]) != (3, rewards.shape):
            raise ValueError(
                f"{name} must be [B, G, T] for rewards {tuple(rewards.shape)}, got {tuple(values.shape)}; reshape it."
            )
    if entropy is not None:
        to_go = to_go + objective.policy_coef * (_from_here_on(entropy) - entropy)
    if objective.needs_reference:
        if ref_logps is None:
            raise ValueError(f"ref_logps must be given when ref_coef > 0, got None with {objective}.")
        to_go = to_go + objective.ref_coef * _from_here_on(ref_logps)
    return leave_one_out(to_go).detach()


def clipped_surrogate(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate, to be maximised; not reduced.

        min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A),   ratio = exp(logps - old_logps)

    At ratio = 1 its gradient is A * grad logps: the policy gradient itself.

    Args:
        logps: any shape, log-probs under the policy that learns, nats; of tokens, or summed over whole answers.
        old_logps, advantages: the same shape, constants: log-probs under the policy that sampled, and A.
        epsilon, epsilon_high: how far down and up a ratio may go before its gradient stops.
    Returns:
        (surrogate, bool where the clip stops the gradient), the shape of `logps`.
    Raises:
        ValueError: shapes that differ, or an epsilon that is not >= 0.

    Source: arXiv 1707.06347; a larger upper bound: arXiv 2503.14476.
    """
    same_shape("old_logps", old_logps, logps, "logps")
    same_shape("advantages", advantages, logps, "logps")
    most = torch.finfo(torch.float32).max  # of any ratio
    epsilon = min(non_negative("epsilon", epsilon, "0.2 is usual"), most)
    epsilon_high = min(non_negative("epsilon_high", epsilon_high, "it is epsilon where nothing else was chosen"), most)
    ratio = (at_least_fp32("logps", logps) - old_logps).exp()
    whole, clipped = ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    return torch.minimum(whole, clipped), (clipped < whole).detach()


def _from_here_on(values: Tensor) -> Tensor:
    """sum_{u >= t} over the last dimension."""
    return values.flip(-1).cumsum(-1).flip(-1)

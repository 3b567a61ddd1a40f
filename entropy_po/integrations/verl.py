"""verl's fused head and its helpers on logits, with verl's signatures (0.9); verl itself is not needed here.

import verl.utils.kernel.linear_cross_entropy as kernel
from entropy_po.integrations.verl import linear_cross_entropy

kernel.linear_cross_entropy = linear_cross_entropy      # before the workers build their models
"""

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_po.integrations import logits as _logits
from entropy_po.ops.checks import check_matrix
from entropy_po.ops.linear_token_stats import linear_token_stats

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`verl.utils.kernel.linear_cross_entropy.linear_cross_entropy` on any device, width and vocabulary size.

        logps[i] = log softmax(h_i W^T / temperature)[labels_i]        entropy[i] = -sum_j p_j log p_j        (nats)

    Args:
        hidden: [..., D], N rows in all.
        weight: [V, D]; with a group this rank's shard [V / P, D], in the order of ranks.
        labels: [...], ids of the whole vocabulary; -100 gives zeros and no gradient.
        temperature: positive.
        reduction: of the log-probs: none, sum, or mean over the N rows.
        dist_process_group: the tensor-parallel ranks that split the vocabulary.
    Returns:
        (logps [N], or a scalar; entropy [N]), flat as verl's are, fp32, differentiable. In a group the ranks' gradients of
        `hidden` have to be summed, as verl's have: Megatron does when it scatters the sequence again.
    Raises:
        ValueError: an unknown reduction; or as `linear_token_stats`.
    Example:
        >>> logps, entropy = linear_cross_entropy(torch.randn(2, 3, 8), torch.randn(50, 8), torch.zeros(2, 3).long())
        >>> logps.shape
        torch.Size([6])
    """
    if not isinstance(reduction, str) or reduction.lower() not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}.")
    check_matrix("hidden", hidden, "[..., D]")
    if isinstance(labels, Tensor):
        labels = _logits.as_ids(labels).reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None:
        hidden = _Share.apply(hidden, dist_process_group.size())
    stats = linear_token_stats(hidden, weight, labels, temperature=temperature, vocab_group=dist_process_group)
    logps = stats.logps if reduction.lower() == "none" else getattr(stats.logps, reduction.lower())()
    return logps, stats.entropy


class _Share(torch.autograd.Function):
    """The operator gives every rank the whole gradient; a sum over the ranks is to come, so each passes its share on."""

    @staticmethod
    def forward(ctx, hidden: Tensor, size: int) -> Tensor:
        ctx.size = size
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """`verl.utils.torch_functional.logprobs_from_logits`: [...] in nats, fp32.

    Args:
        logits: [..., V].
        labels: [...].
        inplace_backward: the gradient overwrites the logits; what else still needs them raises torch's in-place error.
    """
    return _logits.logps_from_logits(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """`verl.utils.torch_functional.entropy_from_logits`: [..., V] to [...] in nats, fp32."""
    return _logits.entropy_from_logits(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`verl.utils.torch_functional.entropy_from_logits_with_chunking`; nothing here is larger than the logits, so chunk_size
    is not read."""
    return _logits.entropy_from_logits(logits)

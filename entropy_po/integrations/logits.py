"""What the trainers' helpers on logits have in common."""

import torch
from torch import Tensor

from entropy_po.ops.checks import check_matrix
from entropy_po.ops.token_stats import token_stats


def logps_from_logits(logits: Tensor, labels: Tensor, **options) -> Tensor:
    """log softmax(logits)[labels], [...] in nats, fp32 (fp64 for fp64 logits); `options` of `token_stats`."""
    return token_stats(logits, as_ids(labels), outputs=("logps",), **options).logps


def entropy_from_logits(logits: Tensor) -> Tensor:
    """-sum_j p_j log p_j of p = softmax(logits), [...] in nats, fp32 (fp64 for fp64 logits)."""
    check_matrix("logits", logits, "[..., V]")
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_stats(logits, labels, outputs=("entropy",)).entropy


def as_ids(labels: Tensor) -> Tensor:
    """Integers of any width as int64; what is none stays, for the operator to refuse."""
    return labels.long() if isinstance(labels, Tensor) and labels.dtype in (torch.int32, torch.int16) else labels

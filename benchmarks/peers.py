"""What the library is measured against: the same quantities by other means."""

from __future__ import annotations

import torch


def eager_stats(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def exact_stats(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits.double(), dim=-1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def trl_logps_and_entropy():
    """TRL's fused head as its own trainers call it (32768-column tiles), or None where it is not installed."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:
        return None
    return lambda hidden, weight, labels: ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("entropy",)
    )[:2]

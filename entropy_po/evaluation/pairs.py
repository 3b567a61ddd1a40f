"""Log-probs of preference pairs under a model, and how many of the pairs it ranks as they are labelled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from entropy_po.answers import answer_logps
from entropy_po.arguments import at_least_fp32, same_shape
from entropy_po.trainer.data import PairCollator, tokenize_pairs


@torch.inference_mode()
def pair_logps(
    model, tokenizer, pairs: Sequence[dict], *, max_length: int = 1024, batch_size: int = 16, progress: bool = True
) -> Tensor:
    """Summed log-probs [P, 2], fp32, nats, of the chosen and the rejected answers; no logits are formed.

    Args:
        model: a causal language model, plain or under PEFT; run in evaluation mode, its mode restored.
        pairs: rows in any of the formats that training takes.
        max_length: tokens; longer answers are cut, and a pair of which no difference is left is left out, with a warning.
        batch_size: pairs per forward.
    Returns:
        Rows of the pairs that are not left out, in their order.
    """
    dataset = tokenize_pairs(pairs, tokenizer, max_length=max_length, on_overlong="drop")
    if dataset.num_dropped:
        warnings.warn(
            f"{dataset.num_dropped} of {len(pairs)} pairs do not differ within max_length={max_length} tokens and are left out.",
            stacklevel=2,
        )
    collate = PairCollator(tokenizer.pad_token_id or 0)
    was_training, logps = model.training, []
    model.eval()
    try:
        starts = range(0, len(dataset), batch_size)
        for start in tqdm(starts, desc="held-out pairs", unit="batch", leave=False, disable=not progress):
            batch = collate(dataset.pairs[start : start + batch_size])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            logps.append(answer_logps(model, batch).view(-1, 2).float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(logps)


def accuracy(logps: Tensor, ref_logps: Tensor | None = None) -> float:
    """Share of pairs [P, 2] whose chosen answer is ahead: by log-prob, or by its gain over `ref_logps`. A tie is half.

    The first asks whether the model prefers the better answer, the second whether training moved it that way.

    Raises:
        ValueError: other shapes, no pairs, or a difference that is no number.
    """
    gain = at_least_fp32("logps", logps)
    if ref_logps is not None:
        same_shape("ref_logps", ref_logps, logps, "logps")
        gain = gain - ref_logps
    if gain.dim() != 2 or len(gain) == 0 or gain.shape[1] != 2:
        raise ValueError(f"logps must be [P, 2] of one pair or more, got shape {tuple(gain.shape)}.")
    margin = gain[:, 0] - gain[:, 1]
    if bool(margin.isnan().any()):
        raise ValueError("logps or ref_logps has a pair whose difference is no number; leave it out.")
    return ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().item()

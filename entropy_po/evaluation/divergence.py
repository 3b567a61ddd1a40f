"""How far a policy lies from a reference, measured on its own answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from entropy_po.answers import answer_logps
from entropy_po.evaluation.sampling import Answer, prompt_ids
from entropy_po.heads import evaluation_mode
from entropy_po.trainer.data import pad_rows

BATCH = 32


@torch.inference_mode()
def log_ratios(
    policy, reference, tokenizer, prompts: Sequence[str], groups: Sequence[Sequence[Answer]], temperature: float = 1.0
) -> list[list[float]]:
    """log pi(y | x) - log ref(y | x) in nats of every answer, summed over its tokens, by the fused head; no logits are formed.

    For answers drawn from pi its mean is an unbiased estimate of KL(pi || ref), of whole answers (of those cut at the limit:
    of what was drawn), by the definition of the KL and nothing else. A single answer's may be negative. Both are taken at the
    temperature that the answers were drawn at: pi is what answered, and a policy that is the reference has KL 0 at any.

    Args:
        policy, reference: causal language models with the same token ids, plain or under PEFT.
        prompts: P user messages.
        groups: the answers of each, from `sample_answers` with the same tokenizer.
        temperature: that of the draws.
    Returns:
        P lists.
    """
    starts = prompt_ids(tokenizer, prompts)
    rows = [
        (np.array([*start, *answer.token_ids]), len(start))
        for start, group in zip(starts, groups, strict=True)
        for answer in group
    ]
    ratios: list[float] = []
    with evaluation_mode(policy), evaluation_mode(reference):
        for i in range(0, len(rows), BATCH):
            batch = pad_rows(rows[i : i + BATCH], tokenizer.pad_token_id or 0)
            both = [
                answer_logps(m, {name: x.to(m.device) for name, x in batch.items()}, temperature=temperature).cpu()
                for m in (policy, reference)
            ]
            ratios += (both[0].double() - both[1].double()).tolist()
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return [ratios[end - len(group) : end] for group, end in zip(groups, ends, strict=True)]

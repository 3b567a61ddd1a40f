"""Diversity of texts and intervals of means; pure functions of lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams of words, pooled over the texts; 0 where there is none.

    Falls with the number and the length of the texts: compare samples of one size, and look at the length beside it.

    >>> distinct_n(["a b a b", "a b"])  # a b, b a, a b, a b
    0.5
    """
    grams = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_n_per_prompt(answers: Sequence[Sequence[str]], n: int = 2) -> float:
    """Mean over prompts of `distinct_n` among a prompt's own answers: do they differ from one another?"""
    return sum(distinct_n(texts, n) for texts in answers) / max(len(answers), 1)


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values, one a prompt.

    With weights, of the weighted mean sum(values * weights) / sum(weights): a mean over tokens, say, whose numbers
    differ from prompt to prompt. Values and weights of a prompt are drawn together.

    Raises:
        ValueError: no values, or weights of another number or sum 0.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    w = torch.ones_like(x) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if len(x) == 0 or w.shape != x.shape or not (w >= 0).all() or w.sum() == 0:
        raise ValueError(f"expected at least one value with weights as many, >= 0, not all 0; got {len(x)}, {len(w)}.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (draws, len(x)), generator=generator)
    means = (x * w)[chosen].sum(1) / w[chosen].sum(1)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means[means.isfinite()], ends).tolist()
    return low, high

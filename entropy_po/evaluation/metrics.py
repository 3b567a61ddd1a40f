"""Diversity of texts and intervals of means; pure functions of lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams of words, pooled over the texts; 0 where there is none.

    Falls with the number of texts: compare samples of one size only.

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


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, which must be independent (one value a prompt).

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("values is empty; an interval needs at least one value.")
    x = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = x[torch.randint(len(x), (draws, len(x)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high

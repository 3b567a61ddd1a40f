"""Diversity of texts and intervals of means; pure functions of lists."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, expm1, log1p

import torch
from torch import Tensor

from entropy_po import arguments


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams of words, pooled over the texts; 0 where there is none.

    Falls with the number and the length of the texts: compare samples of one size, and look at the length beside it.

    >>> distinct_n(["a b a b", "a b"])  # a b, b a, a b, a b
    0.5
    """
    grams = _ngrams(texts, n)
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(texts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    arguments.texts("texts", texts)
    arguments.whole("n", n, 1, "it counts words")
    grams = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return grams


def distinct_n_per_prompt(answers: Sequence[Sequence[str]], n: int = 2) -> float:
    """Mean over prompts of `distinct_n` among a prompt's own answers: do they differ from one another?"""
    if not isinstance(answers, (list, tuple)):
        raise ValueError(f"answers must be a list of lists of texts, got {type(answers).__name__}.")
    return sum(distinct_n(texts, n) for texts in answers) / max(len(answers), 1)


def expectation_adjusted_distinct_n(texts: Sequence[str], num_types: int, n: int = 1) -> float:
    """Different n-grams over how many there would be if each of the C n-grams were drawn uniformly from V,

        EAD = different / (V * (1 - ((V - 1) / V)^C))

    so that, unlike `distinct_n`, it does not fall merely because there is more text.

    Args:
        num_types: V > 1, of the possible n-grams; the source and its users take the vocabulary's size for every n.
    Returns:
        0 where there is no n-gram; above 1 where the texts are more varied than uniform draws.
    Example:
        >>> expectation_adjusted_distinct_n(["a b"], num_types=2)  # 2 / (2 * (1 - 1/4))
        1.3333333333333333

    Source: arXiv 2202.13587.
    """
    grams = _ngrams(texts, n)
    arguments.whole("num_types", num_types, 2, "take the vocabulary's size")
    expected = -num_types * expm1(len(grams) * log1p(-1.0 / num_types))
    return len(set(grams)) / expected if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU, 0 to 1, of every text against the others, by sacrebleu with its standard settings; low: varied.

    Raises:
        ValueError: fewer than two texts. ImportError: sacrebleu is not installed.
    """
    arguments.texts("texts", texts)
    if len(texts) < 2:
        raise ValueError(f"texts must be two or more, got {len(texts)}; each is compared with the others.")
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError("self_bleu needs the package sacrebleu: pip install sacrebleu") from error
    bleu = BLEU(effective_order=True)  # short texts have no 4-grams
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores) / 100


def vendi_score(embeddings: Tensor) -> float:
    """How many different texts there are, in effect: the exponential of the entropy of the eigenvalues of K / n, with K the
    cosine similarities of n texts. 1 where all are the same, n where all are orthogonal.

    Grows with n: compare samples of one size.

    Args:
        embeddings: [n, D], any scale; computed in fp64.
    Raises:
        ValueError: no texts, or an embedding of length 0.
    Example:
        >>> round(vendi_score(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])), 4)  # exp of the entropy of (1/3, 2/3)
        1.8899

    Source: arXiv 2210.02410, with q = 1.
    """
    rows = _unit_rows(embeddings)
    eigenvalues = torch.linalg.svdvals(rows).square() / len(rows)
    return float(torch.special.entr(eigenvalues).sum().exp())


def semantic_distance(embeddings: Tensor) -> float:
    """Mean over the pairs of n >= 2 texts of 1 minus their cosine similarity: 0 for the same meaning, 1 for unrelated ones.

    Args:
        embeddings: [n, D], any scale; computed in fp64.
    Raises:
        ValueError: fewer than two texts, or an embedding of length 0.
    Example:
        >>> round(semantic_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])), 4)  # of 1, 1 and 0
        0.6667
    """
    rows = _unit_rows(embeddings)
    n = len(rows)
    if n < 2:
        raise ValueError(f"embeddings must be of two texts or more, got {n}; each is compared with the others.")
    similar = float(rows.sum(0).square().sum()) - n
    return 1.0 - similar / (n * (n - 1))


def _unit_rows(embeddings: Tensor) -> Tensor:
    x = arguments.at_least_fp32("embeddings", embeddings).detach().double()
    lengths = x.norm(dim=-1, keepdim=True) if x.dim() == 2 else x.new_zeros(1)
    if x.dim() != 2 or len(x) == 0 or not bool(((lengths > 0) & lengths.isfinite()).all()):
        raise ValueError(
            f"embeddings must be [n, D] with n > 0, finite and without a row of zeros, got shape {tuple(x.shape)}; leave out "
            "what has none."
        )
    return x / lengths


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, from n >= k samples of which c are: no more, no less
    than the share of the n-choose-k draws without replacement that hold a right one,

        1 - C(n - c, k) / C(n, k)

    Args:
        num_samples: n.
        num_right: c, 0 to n.
        k: 1 to n.
    Raises:
        ValueError: k or c out of its range.
    Example:
        >>> pass_at_k(num_samples=4, num_right=1, k=2)
        0.5

    Source: arXiv 2107.03374.
    """
    for name, value in (("num_samples", num_samples), ("num_right", num_right), ("k", k)):
        arguments.whole(name, value, 0, "it counts answers")
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(
            f"expected 1 <= k <= num_samples and 0 <= num_right <= num_samples, got {k=}, {num_samples=}, {num_right=}."
        )
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


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
        ValueError: no values, one that is not finite, or weights of another number, or one that is not > 0; level outside
            0 to 1, or draws below 1.
    """
    return _central(_resampled_means(values, weights, draws, seed), level)


def paired_interval(
    values: Sequence[float],
    others: Sequence[float],
    weights: Sequence[float] | None = None,
    other_weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(values) - mean(others), measured on the same prompts.

    Both means are taken over the same drawn prompts, so what makes a prompt easy for every model cancels; two
    separate intervals may overlap where this one is clear of 0.

    Raises:
        ValueError: as `bootstrap_interval`, or two numbers of values.
    """
    ours, theirs = len(arguments.numbers("values", values)), len(arguments.numbers("others", others))
    if ours != theirs:
        raise ValueError(f"values and others must be as many, got {ours} and {theirs}; pair them by prompt.")
    # The same seed draws the same prompts for both.
    means = _resampled_means(values, weights, draws, seed) - _resampled_means(others, other_weights, draws, seed)
    return _central(means, level)


def _resampled_means(values: Sequence[float], weights: Sequence[float] | None, draws: int, seed: int) -> Tensor:
    x = arguments.numbers("values", values)
    w = torch.ones_like(x) if weights is None else arguments.numbers("weights", weights)
    if w.shape != x.shape or not bool((w > 0).all()):
        raise ValueError(f"weights must be as many as values and all > 0; got {len(w)} for {len(x)} values.")
    draws = arguments.whole("draws", draws, 1, "2000 gives two digits of an interval")
    seed = arguments.whole("seed", seed, 0, "any will do")
    chosen = torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(seed))
    return (x * w)[chosen].sum(1) / w[chosen].sum(1)


def _central(means: Tensor, level: float) -> tuple[float, float]:
    if not arguments.positive("level", level, "0.95 is usual") < 1:
        raise ValueError(f"level must be below 1, got {level:g}; 0.95 is usual")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    return low, high

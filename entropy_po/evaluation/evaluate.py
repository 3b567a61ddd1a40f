"""What a model answers, and how good and how varied that is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from entropy_po.evaluation.divergence import log_ratios
from entropy_po.evaluation.metrics import (
    bootstrap_interval,
    distinct_n,
    distinct_n_per_prompt,
    expectation_adjusted_distinct_n,
    pass_at_k,
    self_bleu,
    semantic_distance,
    vendi_score,
)
from entropy_po.evaluation.sampling import MAX_NEW_TOKENS, sample_answers

PROMPTS_PER_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """Means over prompts, with 95 % bootstrap intervals over prompts. Entropy in nats, lengths in tokens."""

    num_prompts: int
    answers_per_prompt: int
    temperature: float
    quality: float | None  # None where the prompts come without a check
    quality_interval: tuple[float, float] | None
    entropy_per_token: float  # of the policy at temperature 1, over the answers it sampled
    entropy_interval: tuple[float, float]
    distinct_2: float  # pooled over all answers
    distinct_2_per_prompt: float
    mean_length: float
    finished: float  # share of answers that ended by themselves
    ead_2_per_prompt: (
        float  # expectation-adjusted distinct-2 among a prompt's own answers, V the tokenizer's vocabulary
    )
    self_bleu_per_prompt: float | None  # None for one answer a prompt, or without sacrebleu
    # Chance that one of k answers has quality 1, by k = 1, 2, 4 ... ; None where the prompts come without a check.
    pass_at: dict[int, float] | None
    pass_at_interval: dict[int, tuple[float, float]] | None
    # One number a prompt, for paired comparisons of models on the same prompts.
    quality_by_prompt: tuple[float, ...] | None
    entropy_by_prompt: tuple[float, ...]  # nats per token drawn
    draws_by_prompt: tuple[int, ...]  # tokens drawn: the weights of the mean entropy
    # Of whole answers, of the policy at temperature 1; the entropy of its answers where they are drawn at 1.
    entropy_per_sequence: float
    entropy_per_sequence_interval: tuple[float, float]
    # Among a prompt's own answers, by an embedding model; None without one, or for one answer a prompt.
    vendi_per_prompt: float | None = None
    vendi_interval: tuple[float, float] | None = None
    semantic_distance_per_prompt: float | None = None
    semantic_distance_interval: tuple[float, float] | None = None
    # To the reference, both at the temperature of the draws: means of log pi - log ref, unbiased; None without one.
    kl_per_sequence: float | None = None
    kl_per_sequence_interval: tuple[float, float] | None = None
    kl_per_token: float | None = None
    kl_per_token_interval: tuple[float, float] | None = None

    def row(self) -> dict:
        return asdict(self)


def evaluate(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    quality: Callable[[int, str], float] | None = None,
    answers_per_prompt: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    label: str = "answers",
    embed: Callable[[Sequence[str]], Tensor] | None = None,
    reference=None,
) -> tuple[Evaluation, list[list[str]]]:
    """Sample answers to the prompts and measure them.

    Args:
        model: a causal language model, plain or under PEFT; run in evaluation mode, its mode restored.
        prompts: user messages.
        quality: (index of the prompt, answer) -> score in [0, 1], or None.
        temperature: of the sampling; the entropy reported is that of the policy itself, at temperature 1.
        embed: texts -> [n, D], `entropy_po.evaluation.embedding`, for Vendi score and semantic distance; or None.
        reference: a model with the same token ids, to measure the KL to; or None.
        seed: of the sampling; the same prompts and seed give the same answers on one machine.
    Returns:
        The evaluation, and the answers of every prompt.
    Raises:
        ValueError: no prompts, or a number out of its range.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one.")
    was_training, groups = model.training, []
    model.eval()
    try:
        for start in tqdm(range(0, len(prompts), PROMPTS_PER_BATCH), desc=label, unit="batch", leave=False):
            groups += sample_answers(
                model,
                tokenizer,
                prompts[start : start + PROMPTS_PER_BATCH],
                answers_per_prompt=answers_per_prompt,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed + start,
            )
    finally:
        model.train(was_training)
    texts = [[answer.text for answer in group] for group in groups]
    answers = [answer for group in groups for answer in group]
    draws = [sum(answer.num_draws for answer in group) for group in groups]
    entropies = [sum(a.entropy for a in group) / n for group, n in zip(groups, draws, strict=True)]
    scores, passes = None, None
    if quality is not None:
        each = [[quality(i, text) for text in group] for i, group in enumerate(texts)]
        scores = [sum(group) / len(group) for group in each]
        right = [sum(score >= 1 for score in group) for group in each]
        ks = [2**i for i in range(answers_per_prompt.bit_length())]
        passes = {k: [pass_at_k(answers_per_prompt, c, k) for c in right] for k in ks}
    per_sequence = [sum(a.entropy for a in group) / answers_per_prompt for group in groups]
    further = {} if embed is None or answers_per_prompt < 2 else _semantic(texts, embed)
    if reference is not None:
        further |= _divergence(log_ratios(model, reference, tokenizer, prompts, groups, temperature), draws)
    evaluation = Evaluation(
        num_prompts=len(prompts),
        answers_per_prompt=answers_per_prompt,
        temperature=temperature,
        quality=sum(scores) / len(scores) if scores else None,
        quality_interval=bootstrap_interval(scores) if scores else None,
        entropy_per_token=sum(answer.entropy for answer in answers) / sum(draws),
        entropy_interval=bootstrap_interval(entropies, draws),
        distinct_2=distinct_n([answer.text for answer in answers]),
        distinct_2_per_prompt=distinct_n_per_prompt(texts),
        mean_length=sum(answer.num_tokens for answer in answers) / len(answers),
        finished=sum(answer.finished for answer in answers) / len(answers),
        ead_2_per_prompt=sum(expectation_adjusted_distinct_n(group, len(tokenizer), 2) for group in texts) / len(texts),
        self_bleu_per_prompt=_self_bleu(texts),
        pass_at={k: sum(values) / len(values) for k, values in passes.items()} if passes else None,
        pass_at_interval={k: bootstrap_interval(values) for k, values in passes.items()} if passes else None,
        quality_by_prompt=tuple(scores) if scores else None,
        entropy_by_prompt=tuple(entropies),
        draws_by_prompt=tuple(draws),
        entropy_per_sequence=sum(per_sequence) / len(per_sequence),
        entropy_per_sequence_interval=bootstrap_interval(per_sequence),
        **further,
    )
    return evaluation, texts


def _semantic(texts: list[list[str]], embed: Callable[[Sequence[str]], Tensor]) -> dict:
    embeddings = [embed(group) for group in texts]
    found: dict[str, Any] = {}
    for name, measure in (("vendi", vendi_score), ("semantic_distance", semantic_distance)):
        values = [measure(x) for x in embeddings]
        found |= {f"{name}_per_prompt": sum(values) / len(values), f"{name}_interval": bootstrap_interval(values)}
    return found


def _divergence(ratios: list[list[float]], draws: list[int]) -> dict:
    """Per token it is the ratio of means, KL of an answer over tokens of an answer, as the entropy per token is."""
    per_sequence = [sum(group) / len(group) for group in ratios]
    per_token = [sum(group) / n for group, n in zip(ratios, draws, strict=True)]
    return {
        "kl_per_sequence": sum(per_sequence) / len(per_sequence),
        "kl_per_sequence_interval": bootstrap_interval(per_sequence),
        "kl_per_token": sum(map(sum, ratios)) / sum(draws),
        "kl_per_token_interval": bootstrap_interval(per_token, draws),
    }


def _self_bleu(texts: list[list[str]]) -> float | None:
    if len(texts[0]) < 2 or importlib.util.find_spec("sacrebleu") is None:
        return None
    return sum(self_bleu(group) for group in texts) / len(texts)

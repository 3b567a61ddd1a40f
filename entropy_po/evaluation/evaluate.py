"""What a model answers, and how good and how varied that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tqdm.auto import tqdm

from entropy_po.demo.make_pairs import sample_answers
from entropy_po.evaluation.metrics import bootstrap_interval, distinct_n, distinct_n_per_prompt

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
    distinct_2: float
    distinct_2_per_prompt: float
    mean_length: float
    finished: float  # share of answers that ended by themselves
    pair_accuracy: float | None = None  # share of held-out pairs with log pi(chosen) > log pi(rejected)

    def row(self) -> dict:
        return asdict(self)


def evaluate(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    quality: Callable[[int, str], float] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    label: str = "answers",
) -> tuple[Evaluation, list[list[str]]]:
    """Sample answers to the prompts and measure them.

    Args:
        model: a causal language model, plain or under PEFT; run in evaluation mode, its mode restored.
        prompts: user messages.
        quality: (index of the prompt, answer) -> score in [0, 1], or None.
        temperature: of the sampling; the entropy reported is that of the policy itself, at temperature 1.
        seed: of the sampling; the same prompts and seed give the same answers on one machine.
    Returns:
        The evaluation, and the answers of every prompt.
    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one.")
    was_training = model.training
    model.eval()
    texts, scores, entropies, lengths, finished = [], [], [], [], []
    try:
        for start in tqdm(range(0, len(prompts), PROMPTS_PER_BATCH), desc=label, unit="batch", leave=False):
            batch = list(prompts[start : start + PROMPTS_PER_BATCH])
            answers = sample_answers(model, tokenizer, batch, seed=seed + start, temperature=temperature)
            for i, group in enumerate(answers, start):
                texts.append([answer.text for answer in group])
                if quality is not None:
                    scores.append(sum(quality(i, answer.text) for answer in group) / len(group))
                entropies.append((sum(a.entropy for a in group), sum(a.num_draws for a in group)))
                lengths += [answer.num_tokens for answer in group]
                finished += [answer.finished for answer in group]
    finally:
        model.train(was_training)
    per_prompt = [total / draws for total, draws in entropies]
    evaluation = Evaluation(
        num_prompts=len(prompts),
        answers_per_prompt=len(texts[0]),
        temperature=temperature,
        quality=sum(scores) / len(scores) if scores else None,
        quality_interval=bootstrap_interval(scores) if scores else None,
        entropy_per_token=sum(total for total, _ in entropies) / sum(draws for _, draws in entropies),
        entropy_interval=bootstrap_interval(per_prompt),
        distinct_2=distinct_n([text for group in texts for text in group]),
        distinct_2_per_prompt=distinct_n_per_prompt(texts),
        mean_length=sum(lengths) / len(lengths),
        finished=sum(finished) / len(finished),
    )
    return evaluation, texts

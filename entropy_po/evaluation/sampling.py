"""Answers of a model to prompts, several to each, with the entropy of every step they were drawn at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from entropy_po import token_stats
from entropy_po.models import adds_end_token

MAX_NEW_TOKENS = 64


class Answer(NamedTuple):
    """One sampled answer.

    `entropy` is the sum, over the tokens drawn (the end-of-sequence token with them), of the entropy in nats of the
    model's distribution at temperature 1, whatever the temperature of the draw. Its mean over answers drawn at
    temperature 1 estimates the entropy of the whole answer, by the chain rule.
    """

    text: str
    num_tokens: int  # without the end-of-sequence token
    finished: bool  # False where it was cut at the limit
    entropy: float = 0.0
    token_ids: tuple[int, ...] = ()  # all tokens drawn

    @property
    def num_draws(self) -> int:
        return self.num_tokens + self.finished


@torch.inference_mode()
def sample_answers(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    answers_per_prompt: int,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
) -> list[list[Answer]]:
    """`answers_per_prompt` answers to each prompt, sampled from the whole distribution, all prompts in one batch.

    `model.generate` would read each prompt once per answer and keep finished answers in the batch until the last one
    ends; reading it once and dropping them takes a third of the time. Decoding needs the logits of its one position
    anyway, so the entropy comes from the very logits that the draw used, in one read of them.

    Args:
        model: causal language model in evaluation mode, plain or under PEFT.
        prompts: user messages; they go through the tokenizer's chat template where it has one.
        temperature: of the draws, > 0.
    Returns:
        The answers of each prompt. The same arguments give the same answers on one machine.
    Raises:
        ValueError: no prompts, or a number out of its range.
    """
    if not prompts or answers_per_prompt < 1 or max_new_tokens < 1 or not temperature > 0:
        raise ValueError(
            f"expected prompts, and answers_per_prompt, max_new_tokens and temperature above 0; got {len(prompts)} "
            f"prompts, {answers_per_prompt}, {max_new_tokens} and {temperature}."
        )
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor(end_tokens(model, tokenizer), device=device)
    inputs = _left_padded(tokenizer, prompts).to(device)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    step = model(inputs["input_ids"], attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=True)
    cache_name = "cache" if "cache" in step else "past_key_values"  # before transformers 5.24
    cache = step[cache_name]
    cache.batch_repeat_interleave(answers_per_prompt)
    logits, mask, positions = (
        x.repeat_interleave(answers_per_prompt, dim=0) for x in (step.logits[:, -1], mask, positions[:, -1:])
    )
    total = len(logits)
    rows = torch.arange(total)  # the answers still growing, by their place among all
    drawn: list[list[int]] = [[] for _ in range(total)]
    entropy, finished = torch.zeros(total), torch.zeros(total, dtype=torch.bool)
    for column in range(max_new_tokens):
        # Inverse of the distribution function: torch.multinomial draws one number per entry of the vocabulary.
        cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
        threshold = torch.rand(total, 1, generator=generator)[rows].to(device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold).clamp(max=logits.shape[-1] - 1)
        entropy[rows] += token_stats(logits, token[:, 0], outputs=("entropy",)).entropy.cpu()
        for row, value in zip(rows.tolist(), token[:, 0].tolist(), strict=True):
            drawn[row].append(value)
        ended = torch.isin(token[:, 0], ends)
        finished[rows] = ended.cpu()
        alive = (~ended).nonzero()[:, 0]
        if len(alive) == 0 or column + 1 == max_new_tokens:
            break
        if len(alive) < len(rows):
            cache.batch_select_indices(alive)
            rows, token, mask, positions = rows[alive.cpu()], token[alive], mask[alive], positions[alive]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions + 1
        step = model(token, attention_mask=mask, position_ids=positions, use_cache=True, **{cache_name: cache})
        logits = step.logits[:, -1]
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    answers = [
        Answer(text.strip(), len(ids) - end, end, nats, tuple(ids))
        for text, ids, end, nats in zip(texts, drawn, finished.tolist(), entropy.tolist(), strict=True)
    ]
    return [answers[i : i + answers_per_prompt] for i in range(0, total, answers_per_prompt)]


def prompt_ids(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The token ids that the answers to user messages follow."""
    texts, add_special_tokens, end = _prompt_texts(tokenizer, prompts)
    return [ids[: len(ids) - end] for ids in tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]]


def _left_padded(tokenizer, prompts: Sequence[str]):
    texts, add_special_tokens, end = _prompt_texts(tokenizer, prompts)
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, padding=True, padding_side="left", return_tensors="pt",
        return_token_type_ids=False,
    )  # fmt: skip
    encoded.update({name: column[:, : column.shape[1] - end] for name, column in encoded.items()})
    return encoded


def _prompt_texts(tokenizer, prompts: Sequence[str]) -> tuple[list[str], bool, int]:
    """(texts, whether the tokenizer's own special tokens are to be added: a chat template brings them along, how many of these
    are to be taken off the end)."""
    if tokenizer.chat_template is None:
        return list(prompts), True, int(adds_end_token(tokenizer))
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False), False, 0


def end_tokens(model, tokenizer) -> list[int]:
    """Chat models name further tokens that end an answer in their generation settings."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    return sorted({tokenizer.eos_token_id, *listed} - {None})

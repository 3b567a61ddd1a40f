"""Writes the demo's preference pairs: SmolLM2 answers each task several times, the checker says which answer is better.

    python -m entropy_po.demo.make_pairs [--out DIRECTORY] [--limit TASKS]

writes `pairs.jsonl` (from `train_tasks`) and `pairs_heldout.jsonl` (from `heldout_tasks`), one conversational pair a
line with the quality of both answers. On one machine, with the same versions of torch and transformers, a second run
gives the same bytes, and `--limit` the first lines of the same files: batches never depend on the limit, each has its
own seed, and two threads are used wherever it runs. Elsewhere rounding differs, and so do the answers. On two busy cores
the run took 8 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from entropy_po.demo.tasks import Task, heldout_tasks, quality, train_tasks
from entropy_po import token_stats
from entropy_po.models import SMOLLM2, load_model, load_tokenizer

ANSWERS_PER_TASK = 6
TASKS_PER_BATCH = 16
MAX_NEW_TOKENS = 64
# At 1.0 a model this small, in 4 bits, writes word salad, and a third of its answers do not end within 64 tokens.
TEMPERATURE = 0.7
SEED = 0


class Answer(NamedTuple):
    """One sampled answer; `finished` is False where it was cut at `MAX_NEW_TOKENS`.

    `entropy` is the sum, over the tokens drawn (the end-of-sequence token with them), of the entropy in nats of the
    model's distribution at temperature 1, whatever the temperature of the draw.
    """

    text: str
    num_tokens: int
    finished: bool
    entropy: float = 0.0

    @property
    def num_draws(self) -> int:
        return self.num_tokens + self.finished


@torch.inference_mode()
def sample_answers(
    model, tokenizer, prompts: list[str], *, seed: int, temperature: float = TEMPERATURE
) -> list[list[Answer]]:
    """`ANSWERS_PER_TASK` answers to each prompt, sampled from the whole distribution.

    `model.generate` would read each prompt once per answer and keep finished answers in the batch until the last one
    ends; reading it once and dropping them takes a third of the time.
    """
    generator = torch.Generator().manual_seed(seed)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    step = model(inputs["input_ids"], attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=True)
    cache = step.past_key_values
    cache.batch_repeat_interleave(ANSWERS_PER_TASK)
    logits, mask, positions = (
        x.repeat_interleave(ANSWERS_PER_TASK, dim=0) for x in (step.logits[:, -1], mask, positions[:, -1:])
    )
    rows = torch.arange(len(logits))  # of `tokens`: the answers still growing
    tokens = torch.full((len(logits), MAX_NEW_TOKENS), tokenizer.eos_token_id)
    entropy = torch.zeros(len(logits))
    for column in range(MAX_NEW_TOKENS):
        # Inverse of the distribution function: torch.multinomial draws one number per entry of the vocabulary.
        cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
        threshold = torch.rand(len(tokens), 1, generator=generator)[rows] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold).clamp(max=logits.shape[-1] - 1)
        tokens[rows, column] = token[:, 0]
        entropy[rows] += token_stats(logits, token[:, 0], outputs=("entropy",)).entropy
        alive = (token[:, 0] != tokenizer.eos_token_id).nonzero()[:, 0]
        if len(alive) == 0 or column + 1 == MAX_NEW_TOKENS:
            break
        if len(alive) < len(rows):
            cache.batch_select_indices(alive)
            rows, token, mask, positions = rows[alive], token[alive], mask[alive], positions[alive]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions + 1
        step = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        logits = step.logits[:, -1]
    lengths = (tokens != tokenizer.eos_token_id).sum(dim=1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    answers = [
        Answer(text.strip(), n, n < MAX_NEW_TOKENS, nats)
        for text, n, nats in zip(texts, lengths, entropy.tolist(), strict=True)
    ]
    return [answers[i : i + ANSWERS_PER_TASK] for i in range(0, len(answers), ANSWERS_PER_TASK)]


def choose_pair(task: Task, answers: list[Answer]) -> dict | None:
    """The best and the worst finished answer as a conversational pair, None where all have the same quality.

    Of several best and worst ones it takes those closest in length, so that length says little about which is chosen.
    """
    finished = [(quality(task, answer.text), answer) for answer in answers if answer.finished]
    best = max((score for score, _ in finished), default=0.0)
    worst = min((score for score, _ in finished), default=0.0)
    if best == worst:
        return None
    chosen, rejected = min(
        product((a for score, a in finished if score == best), (a for score, a in finished if score == worst)),
        key=lambda pair: abs(pair[0].num_tokens - pair[1].num_tokens),
    )
    return {
        "prompt": [{"role": "user", "content": task.prompt}],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "quality_chosen": round(best, 4),
        "quality_rejected": round(worst, 4),
    }


def answered_tasks(model, tokenizer, tasks: list[Task], limit: int, label: str) -> Iterator[tuple[Task, list[Answer]]]:
    """The first `limit` tasks with their answers; a batch holds the same tasks whatever the limit."""
    for start in tqdm(range(0, min(limit, len(tasks)), TASKS_PER_BATCH), desc=label, unit="batch"):
        batch = tasks[start : start + TASKS_PER_BATCH]
        answers = sample_answers(model, tokenizer, [task.prompt for task in batch], seed=SEED + start)
        yield from list(zip(batch, answers, strict=True))[: limit - start]


def write_pairs(path: Path, answered: Iterator[tuple[Task, list[Answer]]]) -> str:
    """Writes the pairs under a temporary name, renames it to `path`, and returns a line about what was sampled."""
    scratch = path.with_name(f"{path.name}.tmp")
    start = time.perf_counter()
    scores, num_tokens, num_pairs = [], [], 0
    with open(scratch, "w", encoding="utf-8", newline="\n") as file:
        for task, answers in answered:
            scores += [quality(task, answer.text) for answer in answers]
            num_tokens += [answer.num_tokens for answer in answers]
            if pair := choose_pair(task, answers):
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                num_pairs += 1
    os.replace(scratch, path)
    seconds = time.perf_counter() - start
    return (
        f"{path}: {num_pairs} pairs from {len(scores)} answers of mean quality {sum(scores) / len(scores):.3f} and "
        f"mean length {sum(num_tokens) / len(scores):.1f} tokens; {sum(num_tokens) / seconds:.0f} tokens/s"
    )


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write the demo's preference pairs.")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the two files (default: the current one)")
    parser.add_argument("--limit", type=int, default=None, help="use only the first tasks of each file, at least one")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit: got {args.limit}, expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    for name, tasks in (("pairs.jsonl", train_tasks()), ("pairs_heldout.jsonl", heldout_tasks())):
        limit = len(tasks) if args.limit is None else args.limit
        print(write_pairs(args.out / name, answered_tasks(model, tokenizer, tasks, limit, name)))


if __name__ == "__main__":
    main()

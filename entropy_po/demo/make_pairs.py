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

import torch
from tqdm import tqdm

from entropy_po.demo.tasks import Task, heldout_tasks, quality, train_tasks
from entropy_po.evaluation import sampling
from entropy_po.evaluation.sampling import Answer
from entropy_po.models import SMOLLM2, load_model, load_tokenizer

ANSWERS_PER_TASK = 6
TASKS_PER_BATCH = 16
MAX_NEW_TOKENS = 64
# At 1.0 a model this small, in 4 bits, writes word salad, and a third of its answers do not end within 64 tokens.
TEMPERATURE = 0.7
SEED = 0


def sample_answers(
    model, tokenizer, prompts: list[str], *, seed: int, temperature: float = TEMPERATURE
) -> list[list[Answer]]:
    """`ANSWERS_PER_TASK` answers to each prompt, with this file's settings."""
    return sampling.sample_answers(
        model,
        tokenizer,
        prompts,
        answers_per_prompt=ANSWERS_PER_TASK,
        temperature=temperature,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
    )


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

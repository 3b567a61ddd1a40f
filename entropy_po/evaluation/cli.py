"""`entropy-po evaluate`: one or several models on the same prompts, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Command line of the evaluation; returns the exit status."""
    parser = argparse.ArgumentParser(prog="entropy-po evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="smollm2-135m, hub ids, model or adapter folders")
    add("--prompts", type=Path, help="JSON lines with a `prompt` each, not scored; default: the demo's held-out tasks")
    add("--task", help="human-eval, or reasoning-gym:NAME: prompts with their check, instead of --prompts")
    add("--limit", type=int, help="use only the first prompts")
    add("--pairs", help="preference pairs, as for training: share of them ranked right by log-prob")
    add("--max_length", type=int, default=1024, help="longest prompt and answer of --pairs, in tokens (default 1024)")
    add("--reference", help="a model with the same token ids: the KL of every model to it, per answer and per token")
    add("--embedding", help="an embedding model (all-minilm-l6-v2, hub id or folder) for Vendi score and semantic distance, "
        "or `policy` for each model's own hidden states, which do not compare models")  # fmt: skip
    add("--samples", type=int, default=4, help="answers per prompt (default 4)")
    add("--temperature", type=float, nargs="+", default=[1.0], help="of the sampling, one or several (default 1)")
    add("--max_new_tokens", type=int, default=64, help="longest answer (default 64)")
    add("--seed", type=int, default=0)
    add("--dtype", default="bfloat16", help="type of the weights (default bfloat16)")
    add("--output_dir", type=Path, default=Path("evaluation"))
    arguments = parser.parse_args(argv)
    given = [("temperature", value) for value in arguments.temperature]
    given += [(name, getattr(arguments, name)) for name in ("samples", "max_new_tokens", "limit")]
    for name, value in given:
        if value is not None and not value > 0:
            raise ValueError(f"--{name}={value} must be > 0; {_REMEDIES[name]}.")
    prompts, score = prompts_and_score(arguments.prompts, arguments.limit, arguments.task)

    from entropy_po.evaluation.embedding import POLICY, load_embedder, policy_embedder
    from entropy_po.evaluation.evaluate import evaluate
    from entropy_po.evaluation.pairs import accuracy, pair_logps
    from entropy_po.models import default_device, load_model, load_tokenizer
    from entropy_po.trainer.data import load_rows

    pairs = None if arguments.pairs is None else load_rows(arguments.pairs)
    embed = None if arguments.embedding in (None, POLICY) else load_embedder(arguments.embedding)
    reference, reference_ids = None, None
    if arguments.reference is not None:
        reference = load_model(arguments.reference, dtype=arguments.dtype, device=default_device())
        reference_ids = load_tokenizer(arguments.reference).get_vocab()
    rows, answers = {}, {}
    for name in dict.fromkeys(arguments.model):
        model = load_model(name, dtype=arguments.dtype, device=default_device())
        tokenizer = load_tokenizer(name)
        if reference is not None and tokenizer.get_vocab() != reference_ids:
            raise ValueError(
                f"--reference={arguments.reference} has other tokens than {name}; a KL needs one vocabulary for both."
            )
        if arguments.embedding == POLICY:
            embed = policy_embedder(model, tokenizer)
        ranked = (
            None if pairs is None else accuracy(pair_logps(model, tokenizer, pairs, max_length=arguments.max_length))
        )
        for temperature in dict.fromkeys(arguments.temperature):
            row = name if len(arguments.temperature) == 1 else f"{name}, T={temperature:g}"
            evaluation, texts = evaluate(
                model,
                tokenizer,
                prompts,
                quality=score,
                answers_per_prompt=arguments.samples,
                temperature=temperature,
                max_new_tokens=arguments.max_new_tokens,
                seed=arguments.seed,
                label=row,
                embed=embed,
                reference=reference,
            )
            rows[row] = {**evaluation.row(), "pair_accuracy": ranked}
            answers[row] = [{"prompt": p, "answers": a} for p, a in zip(prompts, texts, strict=True)]
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "answers": answers}, indent=1) + "\n")
    table = markdown(rows)
    (folder / "evaluation.md").write_text(table, encoding="utf-8")
    written = "evaluation.json, evaluation.md"
    if score is not None:
        from entropy_po.evaluation.plots import quality_diversity

        quality_diversity(dict(zip(_short(list(rows)), rows.values(), strict=True)), folder / "quality-diversity.png")
        written += ", quality-diversity.png"
    print(f"{table}\nWritten to {folder}: {written}")
    return 0


_REMEDIES = {
    "samples": "diversity within a prompt wants 2 or more",
    "temperature": "use a small one for nearly greedy answers",
    "max_new_tokens": "it bounds the length of an answer",
    "limit": "leave it out to use all prompts",
}


def _short(names: list[str]) -> list[str]:
    """Folders by their last two parts, for runs are often told apart by the parent's name; whole where these are not all different."""
    short = ["/".join(Path(name).parts[-2:]) for name in names]
    return short if len(set(short)) == len(short) else names


def prompts_and_score(path: Path | None, limit: int | None, task: str | None = None):
    """The prompts, and (index, answer) -> quality where there is a checker.

    Raises:
        ValueError: a line that is not JSON or has no prompt (its number is named), or no prompts at all; a task that is
            none, or prompts and a task. ImportError: the task's package is not installed.
    """
    if task is not None:
        if path is not None:
            raise ValueError(f"--task={task} brings its own prompts; leave out --prompts={path}.")
        return _task(task, limit)
    if path is None:
        from entropy_po.demo.tasks import heldout_tasks, quality

        tasks = heldout_tasks()[:limit]
        return [task.prompt for task in tasks], lambda i, text: quality(tasks[i], text)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a `prompt`, got {line[:60]!r}."
            ) from error
        if not isinstance(prompt, str):
            raise ValueError(
                f"{path}, line {number}: `prompt` must be text, got {type(prompt).__name__}; tasks print it by --text."
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: no prompts; give one JSON object with a `prompt` per line.")
    return prompts[:limit], None


def _task(task: str, limit: int | None):
    reward: Callable[..., list[float]]
    kind, _, name = task.partition(":")
    if kind == "human-eval" and not name:
        from entropy_po.tasks import human_eval

        rows, reward = human_eval.rows()[:limit], human_eval.passes_tests
    elif kind == "reasoning-gym" and name:
        from entropy_po.tasks import reasoning

        rows, reward = reasoning.rows(name, limit or 64, seed=1), reasoning.score  # training's seed is 0
    else:
        raise ValueError(
            f"--task={task} is unknown; use human-eval, or reasoning-gym:NAME such as reasoning-gym:chain_sum."
        )

    def score(i: int, text: str) -> float:
        return reward(completions=[text], **{name: [value] for name, value in rows[i].items() if name != "prompt"})[0]

    return [row["prompt"][0]["content"] for row in rows], score


def markdown(rows: dict[str, dict]) -> str:
    """The evaluations as a Markdown table, 95 % intervals in brackets, without the columns that no row has."""
    cells = {name: _cells(row) for name, row in rows.items()}
    titles = [title for title in next(iter(cells.values())) if any(row[title] is not None for row in cells.values())]
    lines = ["| model | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    lines += [f"| {name} | " + " | ".join(row[title] or "-" for title in titles) + " |" for name, row in cells.items()]
    return "\n".join(lines) + "\n"


def _cells(row: dict) -> dict[str, str | None]:
    def shown(name: str, interval: str | None = None, digits: int = 3) -> str | None:
        value, ends = row[name], row[interval] if interval else None
        if value is None:
            return None
        return f"{value:.{digits}f}" + (f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else "")

    passes, intervals = row["pass_at"] or {}, row["pass_at_interval"] or {}
    one, best = None, None
    if passes:
        one, best = ("{:.3f} [{:.3f}, {:.3f}]".format(passes[k], *intervals[k]) for k in (min(passes), max(passes)))
        best += f" (k={max(passes)})"
    return {
        "quality": shown("quality", "quality_interval"),
        "right, 1 answer": one,
        "right, best of k": best,
        "pairs ranked right": shown("pair_accuracy", digits=2),
        "entropy, nats/token": shown("entropy_per_token", "entropy_interval"),
        "entropy, nats/answer": shown("entropy_per_sequence", "entropy_per_sequence_interval", 1),
        "KL to the reference, nats/token": shown("kl_per_token", "kl_per_token_interval"),
        "KL, nats/answer": shown("kl_per_sequence", "kl_per_sequence_interval", 2),
        "Vendi score within a prompt": shown("vendi_per_prompt", "vendi_interval", 2),
        "semantic distance within a prompt": shown("semantic_distance_per_prompt", "semantic_distance_interval"),
        "distinct-2": shown("distinct_2"),
        "distinct-2 within a prompt": shown("distinct_2_per_prompt"),
        "EAD-2 within a prompt": shown("ead_2_per_prompt"),
        "self-BLEU within a prompt": shown("self_bleu_per_prompt"),
        "length, tokens": shown("mean_length", digits=1),
        "finished": shown("finished", digits=2),
    }

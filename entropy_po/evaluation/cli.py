"""`entropy-po evaluate`: one or several models on the same prompts, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Command line of the evaluation; returns the exit status."""
    parser = argparse.ArgumentParser(prog="entropy-po evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="smollm2-135m, hub ids, model or adapter folders")
    add("--prompts", type=Path, help="JSON lines with a `prompt` each, not scored; default: the demo's held-out tasks")
    add("--limit", type=int, help="use only the first prompts")
    add("--pairs", help="preference pairs, as for training: share of them ranked right by log-prob")
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
    prompts, score = prompts_and_score(arguments.prompts, arguments.limit)

    from entropy_po.evaluation.evaluate import evaluate
    from entropy_po.evaluation.pairs import accuracy, pair_logps
    from entropy_po.models import load_model, load_tokenizer
    from entropy_po.trainer.data import load_rows

    pairs = None if arguments.pairs is None else load_rows(arguments.pairs)
    rows, answers = {}, {}
    for name in dict.fromkeys(arguments.model):
        model, tokenizer = load_model(name, dtype=arguments.dtype), load_tokenizer(name)
        ranked = None if pairs is None else accuracy(pair_logps(model, tokenizer, pairs))
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

        quality_diversity({_short(name): row for name, row in rows.items()}, folder / "quality-diversity.png")
        written += ", quality-diversity.png"
    print(f"{table}\nWritten to {folder}: {written}")
    return 0


_REMEDIES = {
    "samples": "diversity within a prompt wants 2 or more",
    "temperature": "use a small one for nearly greedy answers",
    "max_new_tokens": "it bounds the length of an answer",
    "limit": "leave it out to use all prompts",
}


def _short(name: str) -> str:
    """A folder by its last two parts: runs are often told apart by the parent's name."""
    return "/".join(Path(name).parts[-2:])


def prompts_and_score(path: Path | None, limit: int | None):
    """The prompts, and (index, answer) -> quality where there is a checker.

    Raises:
        ValueError: a line that is not JSON or has no prompt (its number is named), or no prompts at all.
    """
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
            raise ValueError(f"{path}, line {number}: `prompt` must be text, got {type(prompt).__name__}.")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: no prompts; give one JSON object with a `prompt` per line.")
    return prompts[:limit], None


def markdown(rows: dict[str, dict]) -> str:
    """The evaluations as a Markdown table, 95 % intervals in brackets."""
    lines = [
        "| model | quality | all met, 1 answer | all met, best of k | pairs ranked right | entropy, nats/token | distinct-2 "
        "| distinct-2 within a prompt | EAD-2 within a prompt | self-BLEU within a prompt | length, tokens | finished |",
        "|---|" + "---|" * 11,
    ]
    for name, row in rows.items():
        quality, one, best, pairs, bleu = "-", "-", "-", "-", "-"
        if row["self_bleu_per_prompt"] is not None:
            bleu = f"{row['self_bleu_per_prompt']:.3f}"
        if row["pass_at"]:
            ks = sorted(row["pass_at"])
            one, best = (
                "{:.3f} [{:.2f}, {:.2f}]".format(row["pass_at"][k], *row["pass_at_interval"][k])
                for k in (ks[0], ks[-1])
            )
            best += f" (k={ks[-1]})"
        if row["quality"] is not None:
            quality = "{:.3f} [{:.2f}, {:.2f}]".format(row["quality"], *row["quality_interval"])
        if row["pair_accuracy"] is not None:
            pairs = f"{row['pair_accuracy']:.2f}"
        entropy = "{:.3f} [{:.2f}, {:.2f}]".format(row["entropy_per_token"], *row["entropy_interval"])
        lines.append(
            f"| {name} | {quality} | {one} | {best} | {pairs} | {entropy} | {row['distinct_2']:.3f} | "
            f"{row['distinct_2_per_prompt']:.3f} | {row['ead_2_per_prompt']:.3f} | {bleu} | {row['mean_length']:.1f} | {row['finished']:.2f} |"
        )
    return "\n".join(lines) + "\n"

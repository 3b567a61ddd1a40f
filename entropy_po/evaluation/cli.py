"""`entropy-po evaluate`: one or several models on the same prompts, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="entropy-po evaluate", description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="smollm2-135m, hub ids, model or adapter folders")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="JSON lines with a `prompt` each (no quality then); default: the demo's held-out tasks",
    )
    parser.add_argument("--limit", type=int, help="use only the first prompts")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights")
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    arguments = parser.parse_args(argv)
    if not arguments.temperature > 0:
        raise ValueError(
            f"--temperature={arguments.temperature} must be > 0; use a small one for nearly greedy answers."
        )
    prompts, score = prompts_and_score(arguments.prompts, arguments.limit)

    from entropy_po.evaluation.evaluate import evaluate
    from entropy_po.models import load_model, load_tokenizer

    rows, answers = {}, {}
    for name in arguments.model:
        model, tokenizer = load_model(name, dtype=arguments.dtype), load_tokenizer(name)
        options = {"quality": score, "temperature": arguments.temperature, "seed": arguments.seed, "label": name}
        evaluation, texts = evaluate(model, tokenizer, prompts, **options)
        rows[name], answers[name] = (
            evaluation.row(),
            [{"prompt": p, "answers": a} for p, a in zip(prompts, texts, strict=True)],
        )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "evaluation.json").write_text(
        json.dumps({"rows": rows, "answers": answers}, indent=1) + "\n"
    )
    table = markdown(rows)
    (arguments.output_dir / "evaluation.md").write_text(table)
    written = "evaluation.json, evaluation.md"
    if score is not None:
        from entropy_po.demo.plots import quality_diversity

        quality_diversity(
            {Path(name).name: row for name, row in rows.items()}, arguments.output_dir / "quality-diversity.png"
        )
        written += ", quality-diversity.png"
    print(table + f"\nWritten to {arguments.output_dir}: {written}")
    return 0


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
            prompts.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a `prompt`, got {line[:60]!r}."
            ) from error
        if not isinstance(prompts[-1], str):
            raise ValueError(f"{path}, line {number}: `prompt` must be text, got {type(prompts[-1]).__name__}.")
    if not prompts:
        raise ValueError(f"{path}: no prompts; give one JSON object with a `prompt` per line.")
    return prompts[:limit], None


def markdown(rows: dict[str, dict]) -> str:
    """The evaluations as a Markdown table, intervals in brackets."""
    lines = [
        "| model | quality | entropy, nats/token | distinct-2 | distinct-2 within a prompt | length, tokens | finished |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        quality = "-"
        if row["quality"] is not None:
            quality = "{:.3f} [{:.2f}, {:.2f}]".format(row["quality"], *row["quality_interval"])
        entropy = "{:.3f} [{:.2f}, {:.2f}]".format(row["entropy_per_token"], *row["entropy_interval"])
        lines.append(
            f"| {name} | {quality} | {entropy} | {row['distinct_2']:.3f} | {row['distinct_2_per_prompt']:.3f} | "
            f"{row['mean_length']:.1f} | {row['finished']:.2f} |"
        )
    return "\n".join(lines) + "\n"

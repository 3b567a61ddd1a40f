"""Tasks whose answers a program can check, each as prompts, as a reward and as an evaluation. Import a module by its name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable


def chat(text: str) -> list[dict]:
    """The prompt of a row: one user's message, as `evaluate` asks it."""
    return [{"role": "user", "content": text}]


def add_text_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", action="store_true", help="prompts as plain text, for a model without a chat template"
    )


def print_rows(rows: Iterable[dict], text: bool) -> None:
    """JSON lines for --train_data."""
    for row in rows:
        print(json.dumps({**row, "prompt": row["prompt"][0]["content"]} if text else row))

"""Time, memory and error of the operators at a shape of yours, against torch and whatever peers are installed."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

from entropy_po.bench import context
from entropy_po.bench.measure import measure, one_line
from entropy_po.bench.memory import phases
from entropy_po.bench.problem import Case
from entropy_po.bench.timing import NOISY, keep_freed_memory

MIB = 1 << 20
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    case = _case(arguments)
    keep_freed_memory()
    row, failed = measure(case, arguments.rounds, progress=partial(_progress, what="rounds"))
    memory: dict[str, dict[str, int]] = {}
    for who in _progress(row["who"], "memory"):
        if who["name"] != row["floor"]:
            try:
                memory[who["name"]] = phases(case, who["name"])
            except RuntimeError as error:  # out of memory, in a process of its own: what has been measured stays
                failed[f"{who['name']}, memory"] = one_line(error)
    print(_table(row, failed, memory))
    if case.d:
        print(_lengths(case, arguments.memory))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**row, "memory": memory, "failed": failed}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="entropy-po bench", description=__doc__)
    parser.add_argument("--shape", required=True, help="N,D,V (tokens, hidden size, words); N,V for given logits")
    parser.add_argument("--dtype", default="bf16", choices=[*DTYPES, *DTYPES.values()])
    parser.add_argument(
        "--path", choices=("hidden", "nll", "pair"), default="pair",
        help="with N,D,V: log-probs and entropy per token, their mean, or the loss of one pair of N/2 tokens each",
    )  # fmt: skip
    parser.add_argument("--frozen", action="store_true", help="no gradient of the head's weight")
    parser.add_argument("--no-entropy", action="store_true", help="of the paths that give it: log-probs alone")
    parser.add_argument("--peaked", action="store_true", help="confident logits, as of a trained model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory", type=float, nargs="+", default=[8, 16, 24, 40, 80], help="GiB to fit a context into"
    )
    parser.add_argument("--json", help="also write the report here")
    return parser


def _case(arguments: argparse.Namespace) -> Case:
    """
    Raises:
        ValueError: the shape is not two or three positive numbers, or an odd number of tokens for a pair.
    """
    try:
        shape = [int(part) for part in arguments.shape.split(",")]
    except ValueError:
        shape = []
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"--shape {arguments.shape}: give N,D,V or N,V, all positive: --shape 1024,576,49152.")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds {arguments.rounds} must be at least 1.")
    path, n, v = ("logits" if len(shape) == 2 else arguments.path), shape[0], shape[-1]
    if path == "pair" and n % 2:
        raise ValueError(f"--shape {arguments.shape}: a pair has two answers of N/2 tokens; make N even.")
    return Case(
        path, n, v, shape[1] if len(shape) == 3 else 0, DTYPES.get(arguments.dtype, arguments.dtype),
        trained=not arguments.frozen, entropy=not arguments.no_entropy, peaked=arguments.peaked, device=arguments.device,
    )  # fmt: skip


def _progress(steps, what: str):
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, what, leave=False, file=sys.stderr)


def _table(row: dict, failed: dict[str, str], memory: dict[str, dict[str, int]]) -> str:
    lines = [
        f"{row['name']}: means of the faster half of {row['rounds']} interleaved rounds; floor: {row['floor']}",
        "",
        f"{'':32}{'ms':>9}{'x floor':>9}{'x ours':>8}{'error':>10}{'gradient':>10}{'MiB: forward':>14}{'held':>8}{'backward':>10}",
    ]
    for who in row["who"]:
        errors, mib = who["errors"], memory.get(who["name"])
        cells = [f"{who['name']:32}{who['ms']:9.1f}{who['times_floor']:9.2f}"]
        cells.append(f"{who['times_ours']:8.2f}" if "times_ours" in who else " " * 8)
        cells += [f"{errors[name]:10.1e}" if name in errors else " " * 10 for name in ("value", "gradient")]
        if mib:
            cells += [
                f"{mib[phase] / MIB:{width}.0f}" for phase, width in (("forward", 14), ("held", 8), ("backward", 10))
            ]
        lines.append("".join(cells) + ("  noisy" if who["spread"] > NOISY else ""))
    lines += [f"{name:32}did not run: {why}" for name, why in failed.items()]
    lines += [
        "",
        "error: worst output against fp64, nats. gradient: relative norm. MiB: peaks beside the inputs, and what is held between.",
    ]
    return "\n".join(lines)


def _lengths(case: Case, gibs: list[float]) -> str:
    element = getattr(torch, case.dtype).itemsize
    found = context.needs(case.d, case.v, element, case.trained, torch.device(case.device).type)
    width = max(map(len, found)) + 2
    lines = [
        "",
        "Longest pair whose loss fits, in tokens of both answers (arithmetic; the model itself needs its own):",
    ]
    lines.append(" " * width + "".join(f"{gib:g} GiB".rjust(14) for gib in gibs))
    for name, need in found.items():
        lengths = [context.longest(gib * context.GIB, need) for gib in gibs]
        lines.append(f"{name:{width}}" + "".join((f"{n:,}" if n else "-").rjust(14) for n in lengths))
    return "\n".join(lines)

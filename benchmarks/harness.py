"""Interleaved timing and process memory, for machines that other work shares: ratios within one run, medians of rounds."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from entropy_po.trainer.memory import peak_bytes, reset_peak, status_bytes

RESULTS = Path(__file__).parent / "results"


def time_interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round. Each round runs all of them, starting one further on than the last, so
    that a drift of the machine, and what one leaves in the caches for the next, fall on all alike."""
    names = list(candidates)
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(seconds: list[float]) -> float:
    """(third quartile - first) / median: above about 0.25 the machine was too busy to believe a few percent."""
    first, middle, third = statistics.quantiles(seconds, n=4)
    return (third - first) / middle


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Growth of the process's peak resident memory over one call, which it should not have made before."""
    reset_peak()
    before = status_bytes("VmRSS")
    run()
    return peak_bytes() - before


def in_fresh_process(module: str, *arguments: str) -> Any:
    """The JSON that `python -m module arguments` prints last, from a process that has run nothing else."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    from entropy_po import describe

    facts = describe()
    return {
        "processor": facts["cpu"]["processor"],
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "instruction_set": (facts["cpu"]["instruction_sets"] or ["none"])[0],
        "versions": {k: v for k, v in facts["versions"].items() if v},
        "system": f"{platform.system()} {platform.machine()}",
    }


def bar(name: str, value: float, limit: float, at_least: bool = False, unit: str = "", **facts) -> dict:
    held = value >= limit if at_least else value <= limit
    row = {"bar": name, "value": value, "limit": limit, "at_least": at_least, "unit": unit, "held": held, **facts}
    sign = ">=" if at_least else "<="
    print(
        f"{'ok  ' if held else 'MISS'} {name}: {value:.3g}{unit} ({sign} {limit:g}{unit})", file=sys.stderr, flush=True
    )
    return row


def write_report(name: str, title: str, command: str, rounds: int, rows: list[dict]) -> str:
    """Writes results/cpu/<name>.json and .md; returns the latter's text."""
    report = {"command": command, "rounds": rounds, "machine": machine(), "rows": rows}
    folder = RESULTS / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(title, report)
    (folder / f"{name}.md").write_text(text)
    return text


def markdown(title: str, report: dict) -> str:
    facts = report["machine"]
    lines = [
        f"# {title}",
        "",
        f"`{report['command']}` on {facts['processor']}, {facts['threads']} threads, {facts['instruction_set']}, torch "
        f"{facts['versions']['torch']}; medians of {report['rounds']} interleaved rounds.",
        "",
        "| bar | measured | wanted | held |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        sign = "at least" if row["at_least"] else "at most"
        held = "yes" if row["held"] else "**no**"
        lines.append(
            f"| {row['bar']} | {row['value']:.3g}{row['unit']} | {sign} {row['limit']:g}{row['unit']} | {held} |"
        )
    lines += ["", "Milliseconds behind the ratios, with each case's interquartile spread as a share of the median:", ""]
    lines += ["| case | times | spread |", "|---|---|---|"]
    seen = set()
    for row in report["rows"]:
        case = row["bar"].rsplit(":", 1)[0]
        if "ms" in row and case not in seen:
            seen.add(case)
            times = ", ".join(f"{name} {ms:.1f}" for name, ms in row["ms"].items())
            lines.append(f"| {case} | {times} | {row['spread']:.2f} |")
    return "\n".join(lines) + "\n"

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
        "system": platform.platform(terse=True),
    }

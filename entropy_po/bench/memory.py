"""Peak memory of cases, phase by phase, in a process that runs nothing else: `python -m entropy_po.bench.memory CASES NAME`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from entropy_po.bench.implementations import COMPILED, implementations
from entropy_po.bench.problem import Case, Problem
from entropy_po.memory import held_bytes, peak_bytes, reset_peak

# glibc keeps freed blocks for later, which would hide what a second call allocates; these give every block above 1 MiB back.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}

THREADS = torch.get_num_threads()
WARM_UP = 1024  # tokens: enough to have every library loaded; more would only take time


def in_fresh_process(module: str, *arguments: str) -> Any:
    """The JSON that `python -m module arguments` prints last.

    Raises:
        RuntimeError: it fails; the message is the last line that it printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env={**os.environ, **MALLOC}
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Growth of the peak over one call."""
    reset_peak()
    before = held_bytes()
    run()
    return peak_bytes() - before


def phases(case: Case, name: str) -> dict[str, int]:
    """Bytes beside the case's inputs: `forward` and `backward` peaks, `held` between them, `results` (the gradients)."""
    return phases_of([case], name)[0]


def phases_of(cases: Sequence[Case], name: str) -> list[dict[str, int]]:
    """The same of several cases, one after another in one process."""
    if cases[0].device == "cuda":  # its allocator counts for itself
        return [_phases_here(case, name) for case in cases]
    return in_fresh_process("entropy_po.bench.memory", json.dumps([asdict(case) for case in cases]), name)


def known_bytes(size: int) -> int:
    """What this measures of an allocation of `size` bytes that is written to."""
    return in_fresh_process("entropy_po.bench.memory", str(size))


def _phases_here(case: Case, name: str) -> dict[str, int]:
    function = implementations(case)[name]
    torch.set_num_threads(case.threads or THREADS)
    problem = Problem(case if name in COMPILED else case.but(n=min(case.n, WARM_UP)))
    problem.run(function)  # libraries loaded, threads started, code compiled; what cannot run says so here
    if problem.case != case:
        problem = Problem(case)
    reset_peak()
    before = held_bytes()
    with torch.set_grad_enabled(case.backward):
        outputs = function(problem)
    found = {"forward": peak_bytes() - before, "held": held_bytes() - before}
    reset_peak()
    gradients = problem.backward(outputs)
    found["backward"] = peak_bytes() - before
    found["results"] = sum(x.nbytes for x in gradients)
    return found


def main() -> None:
    what, *name = sys.argv[1:]
    if name:
        print(json.dumps([_phases_here(Case(**case), *name) for case in json.loads(what)]))
    else:
        print(peak_extra_bytes(lambda: torch.ones(int(what), dtype=torch.uint8)))


if __name__ == "__main__":
    main()

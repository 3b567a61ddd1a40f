"""Every implementation of a case in one run, and what came of it as one row of plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from entropy_po.bench.implementations import OURS, implementations
from entropy_po.bench.problem import COPY, Case, Problem
from entropy_po.bench.timing import give_back_memory, spread, time_interleaved, typical


def one_line(error: Exception) -> str:
    """How a table says why there is no figure."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def summarised(
    name: str,
    case: dict,
    floor: str,
    scale: float,
    seconds: dict[str, list[float]],
    errors: dict[str, dict[str, float]],
    copy_seconds: float | None = None,
) -> dict:
    """One row from readings in the order of their rounds.

    Args:
        copy_seconds: where the floor is a copy: what it takes at the bandwidth of a whole run. That of one row's copies is by a half more
            or less from minute to minute on a shared machine. By default it is these all the same.

    Returns:
        name, case, floor (whose entry is the bare work itself), rounds, and `who`: per implementation its `readings_ms`, their
        `typical` one `ms`, what that is as a multiple of the floor's and of ours, `times_floor` and `times_ours`, their `spread`, and
        `errors`. Where the floor is a copy, its own entry has `run_ms`, `copy_seconds`, in the place of `times_ours`.
    """
    rounds = min(map(len, seconds.values()))
    seconds = {implementation: values[:rounds] for implementation, values in seconds.items()}
    times = {implementation: typical(values) for implementation, values in seconds.items()}
    bare = times[floor] if floor != COPY or copy_seconds is None else copy_seconds
    who = []
    for implementation, values in seconds.items():
        mean = times[implementation]
        entry: dict[str, Any] = {"name": implementation, "ms": 1e3 * mean, "spread": spread(values)}
        entry["times_floor"] = mean / bare / scale
        if implementation == COPY:
            entry["run_ms"] = 1e3 * bare
        elif OURS in times:
            entry["times_ours"] = mean / times[OURS]
        entry["errors"] = errors.get(implementation, {})
        entry["readings_ms"] = [float(f"{1e3 * value:.5g}") for value in values]
        who.append(entry)
    who.sort(key=lambda entry: (entry["name"] != floor, not entry["name"].startswith(OURS), entry["ms"]))
    return {"name": name, "case": case, "floor": floor, "rounds": rounds, "who": who}


def measure(
    case: Case, rounds: int, names: Iterable[str] | None = None, progress: Callable[[Iterable], Iterable] = iter
) -> tuple[dict, dict[str, str]]:
    """(row, implementation -> why it did not run). `names`: those that take part, all by default."""
    torch.compiler.reset()  # it stops compiling after a few shapes
    problem = Problem(case)
    floor_name, floor, scale = problem.floor
    runs, errors, failed = {floor_name: floor}, {}, {}
    for name, function in implementations(case).items():
        if names is not None and name not in names:
            continue
        run = partial(problem.run, function)
        try:
            errors[name] = problem.errors(*run())
            runs[name] = run
        except Exception as error:
            failed[name] = one_line(error)
    problem.__dict__.pop("truth", None)  # its memory may be what an implementation is short of
    give_back_memory()
    seconds = time_interleaved(runs, rounds, progress)
    return summarised(case.name, case.__dict__, floor_name, scale, seconds, errors), failed

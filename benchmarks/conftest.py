"""Wires the suites into pytest-benchmark: `python -m benchmarks` runs all of them and writes the report.

A test is one reading: one implementation, of one case, in one round. Readings of a round follow one another and every
round starts one implementation further on, so a machine that slows down slows all of them, and the report compares within
rounds. `pytest benchmarks --benchmark-enable -k "pair and TRL"` runs some.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import ClassVar

import pytest
import torch

from benchmarks import report, suites
from benchmarks.step import StepCase, StepProblem
from entropy_po.bench.implementations import implementations
from entropy_po.bench.measure import one_line
from entropy_po.bench.problem import Case, Problem
from entropy_po.bench.timing import give_back_memory, keep_freed_memory, repeats_for, rotated, timed

FLOOR = "floor"
UNAVAILABLE, MEMORY, KEPT = pytest.StashKey[dict](), pytest.StashKey[list](), pytest.StashKey[bool]()


def pytest_addoption(parser):
    group = parser.getgroup("entropy_po")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--rounds", type=int, default=5, help="readings of every implementation")
    group.addoption(
        "--process",
        type=int,
        default=0,
        help="which of those that share the rounds: the first takes what all others leave",
    )
    group.addoption("--long", action="store_true", help="also the cases that take minutes a reading")
    group.addoption(
        "--fresh_memory", action="store_true", help="on a CPU: every call takes its memory from the system; some cases"
    )
    group.addoption("--quick", action="store_true", help="on a GPU: the smaller shapes only")


def pytest_configure(config):
    config.stash[UNAVAILABLE], config.stash[MEMORY] = defaultdict(dict), []
    freed_is_kept = config.getoption("--device") == "cpu" and not config.getoption("--fresh_memory")
    config.stash[KEPT] = freed_is_kept and keep_freed_memory()


def _suites(config) -> dict[str, list[suites.Row]]:
    if config.getoption("--device") == "cuda":
        return suites.cuda(config.getoption("--quick"))
    if config.getoption("--fresh_memory"):
        return suites.fresh()
    return suites.cpu(config.getoption("--long"))


def pytest_generate_tests(metafunc):
    """Readings in the order in which they are made."""
    option = metafunc.config.getoption
    process = option("--process")
    if "memory_row" in metafunc.fixturenames:
        # in processes of their own, the same in both reports
        rows = [] if option("--fresh_memory") or process else suites.memory(option("--device"), option("--long"))
        metafunc.parametrize("memory_row", rows, ids=[f"{case.name}: {who}" for case, who in rows])
    if "reading" not in metafunc.fixturenames:
        return
    readings, ids = [], []
    for suite, rows in _suites(metafunc.config).items():
        for row in rows:
            names = [FLOOR, *(row.who or implementations(row.case))]
            own = slice(process, process + 1) if row.apart else slice(0, 0 if process else None)
            for i in range(min(row.rounds or 99, option("--rounds")))[own]:
                for who in rotated(names, i):
                    readings.append((suite, row.case, who))
                    ids.append(f"{suite}: {row.case.name}: {who}, round {i}")
    metafunc.parametrize("reading", readings, ids=ids)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(report.machine(config.getoption("--device")), keeps_memory=config.stash[KEPT])


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["unavailable"] = config.stash[UNAVAILABLE]
    output_json["memory"] = config.stash[MEMORY]


class Current:
    """The one case that is in memory, and what is known of each implementation of it: repeats and errors."""

    case: Case | StepCase | None = None
    problem: Problem | StepProblem | None = None
    known: ClassVar[dict[str, dict]] = {}

    @classmethod
    def of(cls, case: Case | StepCase) -> Problem | StepProblem:
        if cls.case != case:
            cls.case, cls.problem, cls.known = case, None, {}  # the old one is gone before the new one is made
            torch.compiler.reset()  # it stops compiling after a few shapes
            give_back_memory()
            cls.problem = Problem(case) if isinstance(case, Case) else StepProblem(case)
        return cls.problem


@pytest.fixture
def measure(request, benchmark):
    """Take one reading of a suite's case by an implementation."""
    threads = torch.get_num_threads()

    def take(suite: str, case: Case | StepCase, who: str) -> None:
        unavailable = request.config.stash[UNAVAILABLE][case.name]
        if who in unavailable:
            pytest.skip(unavailable[who])
        torch.set_num_threads(case.threads or threads)
        problem = Current.of(case)
        floor_name, floor, scale = problem.floor
        run = floor if who == FLOOR else partial(problem.run, problem.implementation(who))
        if who not in Current.known:
            try:  # the first call also loads libraries and compiles; its results are checked
                results = run()
                checked = who != FLOOR and not request.config.getoption("--process")
                errors = problem.errors(*results) if checked else {}
            except Exception as error:
                unavailable[who] = one_line(error)
                pytest.skip(unavailable[who])
            # what does more than a floor that fills a reading need not be tried again to know that it does too
            once = Current.known.get(FLOOR, {}).get("repeats") == 1
            del results
            Current.known[who] = {"errors": errors, "repeats": 1 if once else repeats_for(run)}
            if not once:  # a process's first reading of what allocates much is another than all that follow
                timed(run, Current.known[who]["repeats"])
        repeats = Current.known[who]["repeats"]
        benchmark.group = case.name
        benchmark.extra_info.update(
            suite=suite, case=asdict(case), name=case.name,
            who=floor_name if who == FLOOR else who, floor=who == FLOOR, scale=scale, **Current.known[who],
        )  # fmt: skip

        benchmark.pedantic(timed, args=(run, repeats), rounds=1, iterations=1)

    yield take
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def memory_readings(request):
    """(case, implementation) -> its reading to come. Each is of a process of its own, and two of them run at a time: a peak of
    memory does not depend on what else the machine does."""
    rows = suites.memory(request.config.getoption("--device"), request.config.getoption("--long"))
    wanted = {item.callspec.params["memory_row"] for item in request.session.items if "memory_row" in item.fixturenames}
    on_cpu = request.config.getoption("--device") == "cpu"
    with ThreadPoolExecutor(2 if on_cpu else 1) as pool:
        longest_first = sorted(wanted.intersection(rows), key=lambda row: -row[0].n)
        yield {row: pool.submit(report.memory_reading, *row) for row in longest_first}


@pytest.fixture
def remember(request):
    """Keep a memory reading for the report."""
    return request.config.stash[MEMORY].append

"""Wires the suites into pytest-benchmark: `python -m benchmarks` runs all of them and writes the report.

A test is one reading: one implementation, of one case, in one round. Readings of a round follow one another and every
round starts one implementation further on, so a machine that slows down slows all of them. `pytest benchmarks
--benchmark-enable -k "pair and TRL"` runs some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import pytest
import torch

from benchmarks import report, suites
from benchmarks.step import StepCase, StepProblem
from entropy_po.bench.measure import one_line
from entropy_po.bench.problem import Case, Problem
from entropy_po.bench.timing import (
    give_back_memory,
    keep_freed_memory,
    page_faults,
    repeats_for,
    rotated,
    settle,
    stock_memory,
    timed,
)

FLOOR, ROUNDS, SPLIT_ROUNDS = "floor", 5, 4
LONG_FLOPS = 2e12  # many seconds: what a first call does beside is little of them, and it is as good a reading as any
UNAVAILABLE, MEMORY, KEPT = pytest.StashKey[dict](), pytest.StashKey[list](), pytest.StashKey[bool]()


def pytest_addoption(parser):
    group = parser.getgroup("entropy_po")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--rounds", type=int, default=99, help="at most so many readings of every implementation")
    group.addoption("--process", type=int, default=0, help="which of those that share the readings")
    group.addoption("--long", action="store_true", help="on a CPU: the cases that take minutes a reading instead")
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
    return suites.long() if config.getoption("--long") else suites.cpu()


def pytest_generate_tests(metafunc):
    """Readings in the order in which they are made."""
    option = metafunc.config.getoption
    process = option("--process")
    if "memory_row" in metafunc.fixturenames:
        # in processes of their own, the same in both reports
        rows = [] if option("--fresh_memory") or process else suites.memory(option("--device"), option("--long"))
        metafunc.parametrize("memory_row", rows, ids=[f"{case.name}: {who}" for case, who in rows])
    if "growing" in metafunc.fixturenames:
        here = not (option("--fresh_memory") or option("--long") or process or option("--device") == "cuda")
        metafunc.parametrize("growing", suites.GROWING if here else ())
    if "reading" not in metafunc.fixturenames:
        return
    readings, ids = [], []
    for suite, row, i in _rounds(_suites(metafunc.config), process):
        if i < option("--rounds"):
            for who in rotated([FLOOR, *row.names], i):
                readings.append((suite, row, who))
                ids.append(f"{suite}: {row.case.name}: {who}, round {i}")
    metafunc.parametrize("reading", readings, ids=ids)


def _rounds(found: dict[str, list[suites.Row]], process: int) -> Iterator[tuple[str, suites.Row, int]]:
    """(suite, row, round) of one process: its half of the rounds of rows that are split, all of those of its half of the others, and in
    between at even distances its rounds of the rows that are spread. Without such every row has a process: the longest take most of
    a machine's memory, and one that is killed for it takes no other's readings along."""
    every = [(suite, row) for suite, rows in found.items() for row in rows]
    spread = [x for x in every if x[1].visits]
    if not spread:
        yield from ((suite, row, i) for suite, row in every[process : process + 1] for i in range(row.rounds or ROUNDS))
        return
    processes, visits = suites.PROCESSES, suites.VISITS
    if process >= processes:
        return
    compact = [
        (suite, row, range(SPLIT_ROUNDS * process // processes, SPLIT_ROUNDS * (process + 1) // processes))
        for suite, row in every
        if row.split
    ]
    whole = [(suite, row, range(row.rounds or ROUNDS)) for suite, row in every if not row.visits and not row.split]
    compact += whole[len(whole) * process // processes : len(whole) * (process + 1) // processes]
    for visit in range(visits):
        for suite, row in spread:
            turn, off = divmod(visit * row.visits, visits)
            if off < row.visits:
                yield suite, row, process * row.visits + turn
        part = slice(*(len(compact) * stop // visits for stop in (visit, visit + 1)))
        yield from ((suite, row, i) for suite, row, rounds in compact[part] for i in rounds)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(report.machine(config.getoption("--device")), keeps_memory=config.stash[KEPT])


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["unavailable"] = config.stash[UNAVAILABLE]
    output_json["memory"] = config.stash[MEMORY]


@dataclass
class Opened:
    """A case in memory, and what is known of each implementation of it: repeats and errors."""

    row: suites.Row
    problem: Problem | StepProblem
    known: dict[str, dict] = field(default_factory=dict)


_opened: dict[Case | StepCase, Opened] = {}


def _open(row: suites.Row, freed_is_kept: bool) -> Opened:
    """Rows that are read again later stay in memory; of all others only one is."""
    for case, opened in list(_opened.items()):
        if case != row.case:
            opened.problem.__dict__.pop("truth", None)
            if not opened.row.visits and row.case not in _opened:
                del _opened[case], opened  # gone before the new one is made
    if row.case not in _opened:
        if not freed_is_kept:
            give_back_memory()
        _opened[row.case] = Opened(row, (Problem if isinstance(row.case, Case) else StepProblem)(row.case))
    return _opened[row.case]


@pytest.fixture(scope="session")
def prepared(request):
    """What stays in memory is made first, so that it does not lie in between what calls take and free; and every case is compiled
    for its own shape, as if there were no other."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 999
    kept = request.config.stash[KEPT]
    found = (item.callspec.params["reading"] for item in request.session.items if "reading" in item.fixturenames)
    spread = {row.case: row for _, row, _ in found if row.visits}
    for row in spread.values():
        _ = _open(row, kept).problem.floor
    if kept and spread:  # where readings are short; the longest cases take all that there is
        stock_memory()


@pytest.fixture
def measure(request, benchmark, prepared):
    """Take one reading of a suite's case by an implementation."""
    threads = torch.get_num_threads()

    def take(suite: str, row: suites.Row, who: str) -> None:
        case = row.case
        unavailable = request.config.stash[UNAVAILABLE][case.name]
        if who in unavailable:
            pytest.skip(unavailable[who])
        torch.set_num_threads(case.threads or threads)
        opened = _open(row, request.config.stash[KEPT])
        problem, known = opened.problem, opened.known
        floor_name, floor, scale = problem.floor
        run = floor if who == FLOOR else partial(problem.run, problem.implementation(who))
        call = partial(benchmark.pedantic, rounds=1, iterations=1)
        first_counts = isinstance(case, Case) and case.device == "cpu" and case.flops >= LONG_FLOPS
        before, measured = page_faults(), False
        if who not in known:
            try:  # the first call also loads libraries and compiles; its results are checked
                results, measured = call(run) if first_counts else run(), first_counts
                again = (row.visits or row.split) and request.config.getoption("--process")
                checked = who != FLOOR and not again
                errors = problem.errors(*results) if checked else {}
            except Exception as error:
                unavailable[who] = one_line(error)
                pytest.skip(unavailable[who])
            # what does more than a floor that fills a reading need not be tried again to know that it does too
            once = first_counts or known.get(FLOOR, {}).get("repeats") == 1
            del results
            known[who] = {"errors": errors, "repeats": 1 if once else repeats_for(run)}
            # a process's first reading of what allocates much is another than all that follow
            if known[who]["repeats"] > 1:
                timed(run, known[who]["repeats"])
        elif row.visits:  # other rows have been read since
            settle(run, calls=5 if request.config.stash[KEPT] else 1)  # fresh memory never settles
        repeats = known[who]["repeats"]
        benchmark.group = case.name
        benchmark.extra_info.update(
            suite=suite, case=asdict(case), name=case.name,
            who=floor_name if who == FLOOR else who, floor=who == FLOOR, scale=scale, **known[who],
        )  # fmt: skip

        if not measured:
            before = page_faults()
            call(timed, args=(run, repeats))
        benchmark.extra_info["page_faults"] = page_faults() - before

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

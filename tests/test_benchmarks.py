"""What the benchmarks say must be so: fp64 truth against autograd, memory against a known allocation, bars, report, CLI."""

import json
import statistics
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as run
from benchmarks import agreement, bars, charts, report, suites
from entropy_po.bench import context, timing
from entropy_po.bench.command import main as bench
from entropy_po.bench.implementations import OURS, eager_stats, implementations, variants
from entropy_po.bench.measure import measure
from entropy_po.bench.memory import known_bytes, phases, phases_of
from entropy_po.bench.problem import SAMPLED, Case, Problem
from entropy_po.bench.timing import ratio, rotated, spread, time_interleaved, typical

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    Case("logits", 48, 301, peaked=True),
    Case("hidden", 48, 301, 16),
    Case("hidden", 48, 301, 16, entropy=False, trained=False),
    Case("nll", 48, 301, 16),
    Case("pair", 48, 301, 16),
]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_truth_is_that_of_autograd_in_fp64(case):
    problem = Problem(case)
    exact = [x.detach().double().requires_grad_() for x in problem.tensors]
    logits = exact[0] if case.path == "logits" else exact[0] @ exact[1].t()
    log_p = logits.log_softmax(-1)
    logps, entropy = log_p.gather(1, problem.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    outputs = problem.combine(logps, entropy)
    grads = torch.autograd.grad(outputs, exact[: len(problem.inputs)], problem._upstream(outputs))
    values, gradients = problem.truth
    for ours, theirs in zip((*values, *gradients), (*outputs, *grads), strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_implementation_is_exact_or_says_why_not(case):
    row, failed = measure(case, rounds=2)
    assert row["who"][0]["name"] == row["floor"] and {OURS, "eager"} <= {who["name"] for who in row["who"]}
    for who in row["who"][1:]:
        # worst nat: peers that round their logits' own softmax are held to what fp32 allows
        assert who["errors"]["value"] < (1e-3 if who["name"].startswith("TRL") else 1e-4), who["name"]
        assert who["errors"]["gradient"] < 1e-5, who["name"]
        assert who["ms"] > 0 and who["times_floor"] > 0
    # what cannot run without a GPU; of what can, another error is a call that its library no longer takes
    assert failed.keys() <= {"Liger FLCE", "QuACK"} and all(": " in why for why in failed.values())


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_what_is_asked_for_by_name_is_this_library_s_own_and_exact(case):
    problem, named = Problem(case), variants(case)
    assert not named.keys() & implementations(case).keys() and all(name.startswith(OURS) for name in named)
    for name in named:
        errors = problem.errors(*problem.run(problem.implementation(name)))
        assert errors["value"] < 1e-4 and errors["gradient"] < 1e-5, name


def test_suites_name_what_there_is():
    for rows in (suites.cpu(), suites.long(), suites.cuda(quick=False)):
        for row in (row for suite in rows.values() for row in suite if isinstance(row.case, Case)):
            assert set(row.names) <= implementations(row.case).keys() | variants(row.case).keys(), row
            assert len(set(row.names)) == len(row.names)


def test_a_wrong_result_shows_in_the_errors():
    problem = Problem(TINY[1])
    right = problem.errors(*problem.run(implementations(problem.case)["eager"]))
    wrong = problem.errors(
        *problem.run(lambda p: tuple(1.01 * x for x in eager_stats(p.tensors[0] @ p.tensors[1].t(), p.labels)))
    )
    assert right["value"] < 1e-4 < 1e-2 < wrong["value"]
    assert right["gradient"] < 1e-5 < 5e-3 < wrong["gradient"]


def test_long_cases_are_checked_on_some_rows(monkeypatch):
    monkeypatch.setattr("entropy_po.bench.problem.TRUTH_FLOPS", 0)
    problem = Problem(Case("pair", 2 * SAMPLED, 301, 16))
    (hidden, weight) = problem.truth[1]
    assert hidden.shape == (SAMPLED, 16) and weight is None
    errors = problem.errors(*problem.run(implementations(problem.case)[OURS]))
    assert errors["gradient"] < 1e-5


def test_products_count_what_a_method_without_logits_needs():
    hidden = Case("hidden", 8, 8, 8)
    assert [hidden.products, hidden.but(trained=False).products, hidden.but(backward=False).products] == [4, 3, 1]
    assert hidden.but(trained=False, entropy=False).products == 2
    assert [Case("pair", 8, 8, 8).products, Case("nll", 8, 8, 8, trained=False).products] == [3, 2]


def test_rounds_rotate_and_ratios_are_within_a_round(monkeypatch):
    monkeypatch.setattr(timing, "READING_SECONDS", {"cpu": 0.0, "cuda": 0.0})
    order = []
    seconds = time_interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert order[:6] == [*"aabbcc"]  # a first call, and one that tells how often to repeat it
    assert order[6:] == [*"abc", *"bca", *"cab"]
    assert {len(values) for values in seconds.values()} == {3}
    assert rotated("abc", 4) == [*"bca"]
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0  # the slow round was slow for both
    # the faster half, of at least two
    for readings, mean in (
        ([9.0, 1.0, 2.0, 3.0, 6.0, 4.0], 2.0),
        ([9.0, 1.0, 2.0, 4.0, 4.0], 1.5),
        ([9.0, 1.0, 2.0], 1.5),
        ([3.0], 3.0),
    ):
        assert typical(readings) == mean
    assert spread([1.0]) == 0 and spread([1.0, 1.0, 1.0]) == 0 and spread([1.0, 2.0, 3.0]) == 0.5


def test_a_short_call_is_repeated_until_a_reading_has_length(monkeypatch):
    monkeypatch.setattr(timing, "READING_SECONDS", {"cpu": 0.05, "cuda": 0.05})
    assert 5 <= timing.repeats_for(lambda: time.sleep(0.002)) <= 25
    assert timing.repeats_for(lambda: time.sleep(0.1)) == 1


def condensed(*processes):
    """Of (factor, errors) per process, which ours has and which every time is multiplied with: a pair, whose three products take
    1 s and ours 3, and logits of two sizes, of which the larger's copy takes 1 s and ours 3, and the smaller's 1 s and ours 1."""
    pair, small, large = Case("pair", 8, 99, 4), Case("logits", 8, 99), Case("logits", 16, 99)

    def process(factor, errors):
        readings = [
            {
                "extra_info": {"suite": case.path, "name": case.name, "case": case.__dict__, "scale": scale, "repeats": 10,
                               "page_faults": 5000 if errors else 0, "who": who, "floor": who != OURS,
                               "errors": errors if who == OURS else {}},
                "stats": {"data": [10 * seconds * factor]},
            }
            for case, floor, ours, scale in ((pair, "3 bare products", 3.0, 1.0), (small, "copy", 1.0, 0.5), (large, "copy", 3.0, 0.5))
            for who, seconds in ((floor, 1.0), (OURS, ours))
        ]  # fmt: skip
        lacks = {pair.name: {"QuACK": "needs a GPU"} if errors else {}}
        return {"benchmarks": readings, "machine_info": report.machine("cpu"), "memory": [factor], "unavailable": lacks}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "finished", lambda command, *found: found)
        return report.condensed([process(*each) for each in processes], "")


def test_rounds_of_several_processes_make_one_row():
    """Of the first process are the errors; times are of the faster half of all."""
    machine, rows, memory, lacking = condensed((1.0, {"value": 1e-6}), (5.0, {}), (7.0, {}))
    (floor, ours), name = rows[0]["who"], rows[0]["name"]
    assert rows[0]["rounds"] == 3 and memory == [1.0, 5.0, 7.0] and lacking == {name: {"QuACK": "needs a GPU"}}
    assert ours["readings_ms"] == [3000, 15000, 21000] and ours["ms"] == 9000 and floor["ms"] == 3000
    assert ours["times_floor"] == pytest.approx(3) and ours["errors"] == {"value": 1e-6}
    assert floor["times_ours"] == pytest.approx(1 / 3)
    assert machine["readings"] == 18 and machine["of_new_memory"] == 6


def test_a_copy_is_taken_at_the_median_rate_of_all():
    """Of all rounds, 1, 5 and 7 s, of the smaller and of the larger with twice its bytes."""
    _, (_, small, large), *_ = condensed((1.0, {}), (5.0, {}), (7.0, {}))
    rate = statistics.median([1, 1 / 5, 1 / 7, 2, 2 / 5, 2 / 7])  # of the smaller's bytes a second
    for row, size, ours in ((small, 1, 3.0), (large, 2, 9.0)):
        copy, found = row["who"]
        assert copy["ms"] == pytest.approx(3000) and copy["run_ms"] == pytest.approx(1e3 * size / rate)
        assert found["times_floor"] == pytest.approx(ours / (size / rate) / 0.5)


def test_a_failed_reading_costs_no_other(monkeypatch, tmp_path):
    """What was measured is written whatever the status, and a process that none is left for leaves no file."""

    def pytest_run(command, **options):
        path = next(Path(word.split("=", 1)[1]) for word in command if word.startswith("--benchmark-json="))
        first = "--process=0" in command
        if first:
            path.write_text(json.dumps({"benchmarks": []}))
        return SimpleNamespace(returncode=1 if first else 0)

    written = []
    monkeypatch.setattr(run.subprocess, "run", pytest_run)
    monkeypatch.setattr(run.report, "condensed", lambda readings, command: {"readings": readings, "machine": {}})
    monkeypatch.setattr(run.report, "write", lambda found, folder: written.append(found))
    assert run.main(["--output_dir", str(tmp_path)]) == 1
    (found,) = written
    assert found["readings"] == [{"benchmarks": []}] and found["machine"]["minutes"] < 1
    assert run._stolen([5, 0, 0, 5, 0, 0, 0, 1], [8, 0, 0, 9, 0, 0, 0, 4]) == 0.3 and run._stolen([], []) is None


def test_which_process_takes_which_readings():
    """All take rounds of their own of the short ones, with others in between; each of these has one process."""
    spread = [row for rows in suites.cpu().values() for row in rows if row.visits]
    assert len(spread) >= 10

    def ids(process, *options):
        command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "--device", "cpu",
                   f"--process={process}", *options]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return [line.split("[", 1)[1] for line in done.stdout.splitlines() if "::test_time[" in line]

    found = [ids(process) for process in range(suites.PROCESSES)]
    assert ids(suites.PROCESSES) == ["NOTSET]"]  # pytest's for nothing
    every = [name for names in found for name in names]
    assert len(every) == len(set(every))
    rows = suites.long()["pair"]
    for process in (0, len(rows) - 1):
        names = ids(process, "--long")
        assert names and all(f": {rows[process].case.name}: " in name for name in names)
    assert ids(len(rows), "--long") == ["NOTSET]"]
    for row in spread:
        for number, names in enumerate(found):
            at = [i for i, name in enumerate(names) if f": {row.case.name}: floor, round " in name]
            rounds = [int(names[i].rsplit(" ", 1)[1].rstrip("]")) for i in at]
            assert rounds == [*range(number * row.visits, (number + 1) * row.visits)]
            for start, stop in pairwise(at):
                assert any(name.startswith(("hidden", "nll", "pair", "step")) for name in names[start:stop])
    compact = [row for rows in suites.cpu().values() for row in rows if not row.visits]
    assert any(row.split for row in compact) and not all(row.split for row in compact)
    for row in compact:
        rounds = [
            [int(x.rsplit(" ", 1)[1].rstrip("]")) for x in names if f": {row.case.name}: floor, round " in x]
            for names in found
        ]
        assert sum(bool(x) for x in rounds) == (suites.PROCESSES if row.split else 1)
        assert [*chain.from_iterable(rounds)] == [*range(sum(map(len, rounds)))]
        for names in found:  # one after another
            at = [i for i, x in enumerate(names) if f": {row.case.name}: " in x]
            assert not at or at[-1] - at[0] == len(at) - 1


def test_memory_measures_a_known_allocation_and_the_phases():
    size = 100 << 20
    assert abs(known_bytes(size) / size - 1) < 0.05
    case = Case("logits", 256, 32768)  # 32 MiB of logits
    found = phases(case, "eager")
    mib = {name: value / 2**20 for name, value in found.items()}
    assert mib["results"] == 32
    assert 60 < mib["held"] < 140  # log-softmax and its exponential, and what autograd keeps beside
    ours = phases(case, OURS)
    assert ours["held"] < 2 << 20 and ours["forward"] < 4 << 20 and abs(ours["backward"] - ours["results"]) < 4 << 20
    with pytest.raises(RuntimeError, match="KeyError"):
        phases(case, "nobody")


def _report(**machine) -> dict:
    rows = []
    for suite, case in (("logits", Case("logits", 16, 99, backward=False)), ("hidden", Case("hidden", 16, 99, 8)),
                        ("pair", Case("pair", 16, 99, 8)), ("scaling", Case("pair", 512, 16384, 256, "bfloat16"))):  # fmt: skip
        who = [
            {"name": name, "ms": 1.0 * i, "spread": 0.5, "times_floor": 1.0 * i, "times_ours": i / 2,
             "readings_ms": [1.0 * i] * 3, "errors": {"value": 1e-6, "gradient": 1e-6} if i > 1 else {}}
            for i, name in enumerate(("floor", OURS, f"{OURS} recompute", "eager", "torch.compile", "TRL"), 1)
        ]  # fmt: skip
        rows.append(
            {"suite": suite, "name": case.name, "case": case.__dict__, "floor": "floor", "rounds": 3, "who": who}
        )
    larger = json.loads(json.dumps(rows[-1]))
    larger["name"], larger["case"]["d"] = Case("pair", 512, 16384, 512, "bfloat16").name, 512
    reading = {
        "case": "a, b",
        "path": "pair",
        "forward": 3 << 20,
        "held": 1 << 20,
        "backward": 2 << 20,
        "results": 1 << 20,
    }
    memory = [reading | {"n": n, "who": who} for n in (16, 32) for who in (OURS, "TRL")]
    memory.append({"case": "a, b", "path": "pair", "n": 16, "who": "Liger DPO", "error": "RuntimeError: no"})
    grown = {"forward": 5 << 20, "held": 0, "backward": 0, "results": 1 << 20, "who": OURS}
    memory += [grown | {"case": row["name"], "sizes": row["case"]} for row in (rows[-1], larger)]
    return report.finished(
        "a command",
        report.machine("cpu") | machine,
        [*rows, larger],
        memory,
        {"x": {"QuACK": "ModuleNotFoundError: quack"}},
    )


def test_report_names_everything_and_draws_four_pictures(tmp_path):
    found = _report(began="2026-01-01", minutes=19.2, stolen=0.025)
    text = report.write(found, tmp_path)
    folder = tmp_path / "cpu"
    for name in ("time-against-floor", "memory-against-context", "accuracy-against-speed", "scaling"):
        assert (folder / f"{name}.png").stat().st_size > 5000 and f"({name}.png)" in text
    for said in (
        "a command",
        "QuACK: ModuleNotFoundError: quack",
        "RuntimeError: no",
        "too busy to believe",
        "| hidden size, 256 to 512 | entropy_po | +0.00 | +0.00 |",
        "| 2, 50% |",
        "begun 2026-01-01, 19 minutes, in which the host gave 2.5% of the processors' time to others",
        "Promises",
    ):
        assert said in text
    assert json.loads((folder / "report.json").read_text()) == found
    assert (folder / "report.md").read_text() in text


def test_bars_are_held_or_missed():
    # ours is 2 times the floor, eager 2 and torch.compile 2.5 times ours, recompute 1.5 times
    for kept in (True, False):  # plain torch as it comes takes fresh memory, which is what it is held against
        found = _report(keeps_memory=kept)["bars"]
        missed = {bar["name"].rsplit(": ", 1)[1] for bar in found if not bar["held"]}
        products = {"times the four bare products", "times the three bare products"}
        assert missed == (products if kept else products | {"times faster than eager"})
    assert all(bars.Bar("", 1.0, 1.0, at_least).held for at_least in (True, False))
    assert not bars.Bar("", 0.9, 1.0, True).held and not bars.Bar("", 1.1, 1.0).held


def test_two_runs_that_agree_and_a_ratio_that_does_not():
    one, other = _report(), _report()
    row = other["rows"][0]
    eager = next(who for who in row["who"] if who["name"] == "eager")
    eager["times_floor"] *= 1.5
    other["rows"].pop()  # a case that only one of them has
    found = agreement.pairs(one, other)
    apart = [(pair.case, pair.who, pair.unit) for pair in found if pair.apart > agreement.WITHIN]
    assert apart == [(row["name"], "eager", "floor")]
    assert all(pair.who != pair.unit for pair in found)
    text = agreement.page(one, other)
    assert f"Of these {len(found)} ratios {len(found) - 1} (" in text and "| eager | floor |" in text
    rows = {(pair.suite, pair.case, pair.who) for pair in found}
    assert f"Of the {len(rows)} rows that both print, {len(rows) - 1} (" in text
    assert all(pair.who != "floor" for pair in found)


def test_exponent_is_that_of_a_power():
    assert charts.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_longest_context_is_the_last_that_fits():
    for need in context.needs(4096, 151936).values():
        tokens = context.longest(80 * context.GIB, need)
        used = need.fixed + need.per_token * tokens
        assert used <= 80 * context.GIB < used + need.per_token
        assert context.longest(1 << 20, need) == 0


@pytest.mark.parametrize("who, count", [("eager", "eager torch"), ("Liger DPO", "Liger-Kernel DPO, 3 products")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_counted_per_token_is_what_is_measured(who, count, dtype):
    short, long = (Case("pair", n, 32768, 64, dtype) for n in (256, 768))
    peaks = [max(found["forward"], found["backward"]) for found in phases_of([short, long], who)]
    measured = (peaks[1] - peaks[0]) / (long.n - short.n)
    counted = context.needs(64, 32768, getattr(torch, dtype).itemsize)[count].per_token
    assert 0.95 * measured <= counted <= 1.02 * measured  # an upper bound on length: never more than there is


@pytest.mark.parametrize("shape", ["", "1", "a,b,c", "4,0,8", "1,2,3,4"])
def test_bench_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"--shape .*: give N,D,V"):
        bench(["--shape", shape])


def test_bench_says_what_ran_out_of_memory_and_keeps_the_rest(capsys, monkeypatch):
    def failing(case, name):
        if name == "eager":
            raise RuntimeError("Killed")
        return {"forward": 3 << 20, "held": 2 << 20, "backward": 5 << 20, "results": 1 << 20}

    monkeypatch.setattr("entropy_po.bench.command.keep_freed_memory", lambda: None)
    monkeypatch.setattr("entropy_po.bench.command.phases", failing)
    assert bench(["--shape", "8,4,61", "--rounds", "1", "--memory", "16"]) == 0
    text = capsys.readouterr().out
    ours = next(line for line in text.splitlines() if line.startswith("entropy_po "))
    assert ours.split()[-3:] == ["3", "2", "5"]
    assert "eager, memory" in text and "RuntimeError: Killed" in text and "3 bare products" in text
    assert "entropy_po, 3 products" in text and "16 GiB" in text


def test_bench_measures_a_shape(tmp_path, capsys, monkeypatch):
    kept = []  # for good, which tests of memory in this process could not have
    monkeypatch.setattr("entropy_po.bench.command.keep_freed_memory", lambda: kept.append(True))
    with pytest.raises(ValueError, match="make N even"):
        bench(["--shape", "5,4,7"])
    out = tmp_path / "row.json"
    assert bench(["--shape", "8,61", "--dtype", "fp32", "--rounds", "1", "--no-entropy", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert kept and "8 x 61, float32, without entropy" in text and "eager" in text and "MiB: forward" in text
    assert json.loads(out.read_text())["memory"][OURS]["forward"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rival", "limit"),
    [
        # Half of what the bars ask for, and half as much again as they allow: a fast path that is lost costs more.
        (Case("logits", 256, 32768, backward=False), "eager", 6),
        (Case("logits", 256, 32768, dtype="bfloat16", backward=False), "eager", 6),
        (Case("logits", 256, 32768, dtype="bfloat16", backward=False), "torch.compile", 1.1),
        (Case("hidden", 512, 16384, 256), "floor", 1 / 1.6),
        (Case("hidden", 512, 16384, 256, "bfloat16"), "floor", 1 / 2.0),
        (Case("pair", 512, 16384, 256), "floor", 1 / 1.6),
        (Case("pair", 512, 16384, 256, "bfloat16"), "floor", 1 / 2.0),
        (Case("pair", 512, 16384, 256, "bfloat16", trained=False), "floor", 1 / 1.7),
        (Case("nll", 512, 16384, 256), "floor", 1 / 1.6),
        (Case("logits", 256, 32768), "eager", 3),
        (Case("pair", 512, 16384, 256), f"{OURS} recompute", 1.0),
        (Case("pair", 1024, 98304, 128, "bfloat16"), f"{OURS} recompute", 1.1),  # longer than its budget: deferred
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_no_fast_path_was_lost(case, rival, limit):
    """Ratios within one run, with margins for a busy machine; `make bench` measures, this guards."""
    row, _ = measure(case, rounds=5, names=(OURS, rival))
    rivals = {who["name"]: who for who in row["who"]}
    faster = 1 / rivals[OURS]["times_floor"] if rival == "floor" else rivals[rival]["times_ours"]
    assert faster >= limit


def test_freed_memory_is_kept_and_given_back():
    code = (
        "import torch; from entropy_po.bench import timing; from entropy_po.memory import held_bytes\n"
        "kept = timing.keep_freed_memory(); start = held_bytes(); x = torch.ones(1 << 26); del x\n"
        "between = held_bytes() - start; timing.give_back_memory(); print(kept, between, held_bytes() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, between, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no such settings")
    assert int(between) >= 1 << 28 and int(after) < 1 << 26


@pytest.mark.parametrize("new_pages, calls", [([0], 1), ([9000, 50, 0], 2), ([9000] * 9, 3)])
def test_a_call_settles_once_it_takes_no_new_memory(new_pages, calls, monkeypatch):
    taken = [0]
    monkeypatch.setattr(timing, "page_faults", lambda: sum(new_pages[: taken[0]]))

    def run():
        taken[0] += 1

    timing.settle(run, calls=3)
    assert taken == [calls]


def test_a_stock_of_memory_is_what_calls_take_theirs_from():
    code = (
        "import torch; from entropy_po.bench import timing\n"
        "kept = timing.keep_freed_memory(); timing.stock_memory(400 << 20); start = timing.page_faults()\n"
        "x = torch.ones(1 << 26); y = torch.ones(1 << 24); print(kept, timing.page_faults() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, new = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no such settings")
    assert int(new) < 5_000  # of 80,000 pages

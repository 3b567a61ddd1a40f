"""`make gpu-check` on a machine without a GPU: its stages, and the times on this device in place of that one."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_check, gpu_times, report, suites
from entropy_po.bench.problem import Case

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "SKIPPED" in done.stdout


def test_a_stage_that_fails_or_hangs_leaves_the_others_and_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "STAGES", dict.fromkeys(("hangs", "fails", "works", "late"), 2.0))
    monkeypatch.setattr(gpu_check, "TO_FINISH", 1)
    stages = gpu_check.Stages(60, tmp_path / "log")
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(77)'])"
    start = time.monotonic()
    assert not stages.run("hangs", [sys.executable, "-c", f"print('began', flush=True); {child}"])
    assert time.monotonic() - start < 20
    assert not stages.run("fails", [sys.executable, "-c", "raise SystemExit(3)"])
    assert stages.run("works", [sys.executable, "-c", "import os; print(os.environ['MORE'])"], MORE="a variable")
    stages.end = 0
    assert not stages.run("late", ["true"])
    assert stages.results == {
        "hangs": "FAILED (stopped after 2 s)", "fails": "FAILED (3)", "works": "ok", "late": "not begun: no time left",
    }  # fmt: skip
    log = (tmp_path / "log").read_text()
    assert "began" in log and "a variable" in log
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if b"time.sleep(77)" in line], "what a stage started outlives it"


def test_what_a_stage_leaves_goes_to_those_after_it(tmp_path):
    stages = gpu_check.Stages(570, tmp_path / "log")
    assert sum(gpu_check.STAGES.values()) <= 570 - gpu_check.TO_FINISH
    assert stages.limit("build") == pytest.approx(gpu_check.STAGES["build"], abs=5)
    assert stages.run("build", ["true"])
    assert stages.limit("operators") == pytest.approx(gpu_check.STAGES["build"] + gpu_check.STAGES["operators"], abs=5)
    due = stages.due
    stages.run("build", ["true"])  # once more: within what is left of the same time
    assert stages.due == due
    stages.due = stages.end = time.monotonic()
    assert stages.limit("tune") < 0


@pytest.mark.parametrize("broken", [(), ("triton",), ("cuda",), ("triton", "cuda")])
def test_nothing_is_spent_on_a_backend_that_does_not_launch(broken, tmp_path, monkeypatch):
    ran, commands = {}, {}

    def run(self, name, command, **environment):
        if name == "build":
            (gpu_check.SITE / "entropy_po" / "kernels").mkdir(parents=True)
        ran[name], commands[name] = environment, command
        self.results[name] = "FAILED (1)" if name in broken else "ok"
        return name not in broken

    monkeypatch.setattr(gpu_check.Stages, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for name in ("SITE", "ROOT"):
        monkeypatch.setattr(gpu_check, name, tmp_path / name)
    package = gpu_check.SITE / "entropy_po"
    tables = {path.name: folder for path, folder in gpu_check.TABLES.items()}
    monkeypatch.setattr(gpu_check, "TABLES", {tmp_path / name: folder for name, folder in tables.items()})
    for table in gpu_check.TABLES:
        table.write_text("{}")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output_dir", str(tmp_path / "out")])
    assert gpu_check.main() == bool(broken)
    every = [*gpu_check.STAGES]
    if len(broken) == 2:
        assert [*ran] == ["build", "triton", "cuda"]
        return
    assert [*ran] == [name for name in every if name not in [gpu_check.NEEDED_BY[backend] for backend in broken]]
    left_out = {"ENTROPY_PO_WITHOUT": broken[0]} if broken else {}
    assert ran["operators"] == ran["times"] == ran["kernels"] == ran.get("tune", left_out) == left_out
    assert "triton" in broken or all((package / folder / name).exists() for name, folder in tables.items())
    assert [path for path in commands["kernels"] if "kernels_" in path] == [
        f"tests/test_kernels_{backend}.py" for backend in ("cuda", "triton") if backend not in broken
    ]


def test_the_smoke_test_sees_a_wrong_result(monkeypatch, capsys):
    """On this device: that backends agree is shown, and that one that does not is refused."""
    from benchmarks import gpu_smoke

    randn, randint, generator = torch.randn, torch.randint, torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch, "randn", lambda *shape, generator, device: randn(*shape, generator=generator))
    monkeypatch.setattr(torch, "randint", lambda *shape, generator, device: randint(*shape, generator=generator))
    gpu_smoke.main("cpp")
    assert capsys.readouterr().out.count("from torch") == 6
    right = gpu_smoke.results
    for wrong in (1.1, torch.nan):  # in the second of several results

        def results(*call, wrong=wrong):
            return [x * wrong if call[1] == "cpp" and i == 1 else x for i, x in enumerate(right(*call))]

        monkeypatch.setattr(gpu_smoke, "results", results)
        with pytest.raises(SystemExit, match=r"cpp: token_stats of .* is wrong"):
            gpu_smoke.main("cpp")


def test_peers_that_the_caller_brought_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/wheels/of/peers")
    stages = gpu_check.Stages(60, tmp_path / "log")
    assert stages.run("build", [sys.executable, "-c", "import sys; print(*sys.path)"])
    said = (tmp_path / "log").read_text()
    assert str(gpu_check.SITE) in said and "/wheels/of/peers" in said


@pytest.mark.parametrize(
    "costs, most",
    [
        ({32: (1, 2), 64: (1, 2), 4096: (3, 2)}, 64),
        ({32: (2, 1), 64: (3, 1), 4096: (3, 2)}, 0),
        ({32: (1, 2), 64: (1.01, 1), 4096: (1, 2)}, None),  # a little slower at one size of three
    ],
)
def test_cuda_goes_first_up_to_where_that_takes_least(costs, most):
    pytest.importorskip("triton")
    from benchmarks import gpu_tune

    assert gpu_tune.rows_of_cuda(costs) == most


def test_two_streams_make_what_one_does():
    from benchmarks import gpu_streams

    made = gpu_streams.runs(300, 32, 301, "cpu", "cpp", workspace=256 * 4 * 301)
    for run in made.values():
        run()
    one, two = (run.args for run in made.values())
    assert (len(one[0]), len(two[0])) == (1, 2) and (one[2], two[2]) == (256, 128)
    for ours, theirs in zip(two[3:], one[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_blocks_are_tuned_over_all_sizes(tmp_path):
    """In Triton's interpreter, whose times mean nothing, a kernel of each kind at two sizes, on a table of its own."""
    pytest.importorskip("triton")
    code = f"""
import json, sys, torch
from pathlib import Path
from types import SimpleNamespace
from benchmarks import gpu_tune
torch.cuda.current_device = lambda: 0
gpu_tune.torch.device = lambda *_: "cpu"
gpu_tune.dispatch.architecture = lambda device: "sm_99"
table = Path({str(tmp_path / "blocks.json")!r})
table.write_text(gpu_tune.TABLE.read_text())
rule = Path({str(tmp_path / "dispatch.json")!r})
rule.write_text(gpu_tune.RULE.read_text())
gpu_tune.TABLE, gpu_tune.RULE, gpu_tune.SHAPES = table, rule, [(2, 300), (3, 200)]
gpu_tune.tiles.unavailable_reason = lambda backend: None
# CUDA C++ is faster at few rows, and where rows are not aligned
gpu_tune.both_backends = lambda name, n, aligned, device, blocks: ((n / 200 if aligned else 0.5), 1.0)
tried = gpu_tune.candidates("fold", torch.float32, gpu_tune.LaunchConfig(1, 1, 1))
assert len(tried) == 1 + len(gpu_tune.BLOCKS) and {{x.block_v for x in tried[1:7]}} == {{2048, 4096, 8192}}, tried
gpu_tune.BLOCKS = gpu_tune.BLOCKS[:1]
compiled = []
gpu_tune.compile_all = lambda jobs, seconds: compiled.extend(jobs)
sys.argv = ["gpu_tune"]
assert gpu_tune.main() == 0
assert len(compiled) >= 4
for job in compiled[:2]:
    gpu_tune.launch(job[0], job[2], *gpu_tune.problem(2, 300, job[1], "cpu"))[0]()
made = json.loads(table.read_text())["sm_99"]
assert made.keys() == {{"fold", "grad"}} and all(made[kernel].keys() >= {{"2", "4"}} for kernel in made)
made = json.loads(rule.read_text())["sm_99"]
assert made["fold 2"] == made["grad 4 into 2"] == 128 and made["grad 4 unaligned"] is None, made
assert made.keys() == json.loads(rule.read_text())["default"].keys()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 tried" in done.stdout


def test_every_test_of_a_gpu_is_in_a_stage():
    found = {path.name for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()}
    assert found - {"test_gpu_check.py"} == {
        Path(path).name for path in (*gpu_check.KERNEL_TESTS, "test_operators_gpu.py")
    }


def test_tests_run_where_only_pytest_is(tmp_path):
    """Without the plugins that the project's own options name: those of pytest-benchmark."""
    command = gpu_check.pytest_command("gpu", *gpu_check.KERNEL_TESTS, "tests/test_operators_gpu.py")
    command = [*command[: command.index("-n")], *command[command.index("-n") + 2 :]] if "-n" in command else command
    hidden = {"hypothesis", "scipy", "pytest_benchmark", "transformers", "peft", "datasets", "trl"}
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(hidden)!r}))\n"  # an ImportError for whoever asks
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "tests collected" in done.stdout, done.stdout + done.stderr


def test_times_are_kept_after_every_case(tmp_path, monkeypatch, capsys):
    case = Case("pair", 8, 64, 16)
    rows = {
        "logits": [suites.Row(Case("logits", 8, 64)), suites.Row(case.but(v=128), suites.NO_PEERS)],
        "pair": [suites.Row(case, suites.NO_PEERS), suites.Row(case.but(dtype="float3"))],
    }
    monkeypatch.setattr(suites, "cuda", lambda quick: rows)
    monkeypatch.setattr(suites, "memory", lambda device, long: [])
    monkeypatch.setattr(report, "machine", lambda device, machine=report.machine: machine("cpu"))
    suites_after_each, save = [], report.save

    def saved(found, folder):
        suites_after_each.append([row["suite"] for row in found["rows"]])
        return save(found, folder)

    monkeypatch.setattr(report, "save", saved)
    monkeypatch.setattr(sys, "argv", ["gpu_times", "--rounds", "1", "--output_dir", str(tmp_path)])
    assert gpu_times.main() == 1  # float3
    assert suites_after_each[:3] == [
        ["pair"],
        ["pair", "logits"],
        ["pair", "logits", "logits"],
    ]  # promises' cases first
    kept = json.loads((tmp_path / "cpu" / "report.json").read_text())
    assert len(kept["rows"]) == 3 and "the case itself" in str(kept["unavailable"])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seconds", "0"])
    assert gpu_times.main() == 1
    assert "not begun: 0 s were over" in capsys.readouterr().out


def test_what_does_not_compile_costs_nothing_else(capsys, monkeypatch):
    """A process that dies takes its pool along; the blocks are then compiled as they are timed."""
    pytest.importorskip("triton")
    from benchmarks import gpu_tune

    monkeypatch.setattr(gpu_tune, "compile_one", os._exit)
    gpu_tune.compile_all([(1,), (2,), (3,)], 60)
    assert re.fullmatch(r"(\d) blocks compiled, \1 of them in vain, of 3\n", capsys.readouterr().out)
    config = gpu_tune.LaunchConfig(1024, 4, 1)
    monkeypatch.setattr(gpu_tune, "launch", lambda *args: (lambda: 1 / 0, 1))
    monkeypatch.setattr(gpu_tune, "median_ms", mock.Mock(side_effect=RuntimeError("PassManager::run failed")))
    assert gpu_tune.timed("fold", torch.float32, config, [()]) == math.inf

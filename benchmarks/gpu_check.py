"""`make gpu-check`: everything that only a GPU can show, in one command of at most ten minutes and no network.

Builds the package with its CUDA kernels into a folder of its own and tries whether either backend launches at all
(benchmarks.gpu_smoke): nothing is spent on one that does not. Then, what matters most first, tests the operators, re-tunes
Triton's blocks and which tiles are whose (benchmarks.gpu_tune), times both backends with them against their floors and peers
(benchmarks.gpu_times), tests the kernels, times a second stream (benchmarks.gpu_streams), and runs the kernels of CUDA C++ under
compute-sanitizer where it is installed. A stage that fails, or runs out of time, does not keep the next from running; the exit
status tells. What there is of the report, the tables and a log is in --output_dir after every stage, so that nothing is lost when
the whole is cut short. Needs Python 3.11 or newer with torch, triton, pybind11, setuptools and pytest, and takes peers from the
caller's PYTHONPATH; without a CUDA device it says so and exits 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE, RESULTS = ROOT / "build" / "gpu", ROOT / "benchmarks" / "results"
# written by the stage "tune": the file, and its folder in the package
TABLES = {ROOT / "kernels" / "blocks.json": "kernels", ROOT / "entropy_po" / "dispatch.json": ""}
# seconds; what a stage leaves goes to those after it
STAGES = {
    "build": 95, "triton": 30, "cuda": 20, "operators": 50, "tune": 85, "times": 145, "kernels": 65, "streams": 20, "sanitizer": 45
}  # fmt: skip
BACKENDS = ("triton", "cuda")
NEEDED_BY = {"triton": "tune", "cuda": "sanitizer"}  # the stage that is about one alone
TO_FINISH = 15  # seconds, for a stage that is asked to stop to say how far it came
KERNEL_TESTS = (
    "tests/test_kernels_cuda.py",
    "tests/test_kernels_triton.py",
    "tests/test_parallel_gpu.py",
)


class Stages:
    """Runs stages one after another until the time is up; shows and keeps what they print."""

    def __init__(self, seconds: float, log: Path):
        self.due = time.monotonic()  # when the stages so far should have ended
        self.end, self.log = self.due + seconds, log
        self.results: dict[str, str] = {}

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(text + "\n")

    def limit(self, name: str) -> float:
        """Seconds that a stage begun now may take: its own, whatever those before it took, and what they left."""
        left = max(self.due - time.monotonic(), 0)
        return min(STAGES[name] + left, self.end - TO_FINISH - time.monotonic())

    def run(self, name: str, command: list[str], **environment: str) -> bool:
        """Whether the stage succeeded. It, and all that it started, is ended where its time is."""
        limit = self.limit(name)
        self.due += 0 if name in self.results else STAGES[name]  # a second try has what is left of the first's
        self.say(f"\n== {name}, {limit:.0f} s at most: {' '.join(command)}")
        if limit < min(TO_FINISH, STAGES[name] / 2):
            self.results[name] = "not begun: no time left"
            return False
        start = time.monotonic()
        # -P keeps this folder off sys.path: what is tested is what was built, in SITE.
        paths = os.pathsep.join(
            filter(None, [str(SITE), str(ROOT / "build" / "benchmarks"), os.environ.get("PYTHONPATH")])
        )
        variables = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment}
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=lambda: [self.say(line.rstrip("\n")) for line in process.stdout], daemon=True)
        reader.start()
        status: int | str
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
            with_group(process, signal.SIGINT)  # pytest prints its failures when interrupted
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TO_FINISH)
        with_group(process, signal.SIGKILL)  # what is left of it would disturb the next
        reader.join(TO_FINISH)
        self.results[name] = "ok" if status == 0 else f"FAILED ({status})"
        self.say(f"== {name}: {self.results[name]} in {time.monotonic() - start:.0f} s")
        return status == 0


def with_group(process: subprocess.Popen, sent: signal.Signals) -> None:
    """Send a signal to the process and to all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sent)


def pytest_command(marks: str, *more: str) -> list[str]:
    # without the project's own options, some of which are a plugin's
    command = [sys.executable, "-P", "-m", "pytest", "-o", "addopts=", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", marks, *more]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "6"]
    return command


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--only", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--quick", action="store_true", help="the smaller shapes only")
    parser.add_argument("--seconds", type=float, default=570, help="of all stages together")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="results go to <device>/ in it")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("gpu-check: SKIPPED, torch finds no CUDA device on this machine.")
        return 0
    output_dir = arguments.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    stages = Stages(arguments.seconds, output_dir / "gpu-check.log")
    stages.say(f"gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    # benchmarks/ is no part of the package: a link to it alone, so that the source tree itself stays off the path
    link = ROOT / "build" / "benchmarks" / "benchmarks"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)  # of a checkout that lay elsewhere
    link.symlink_to(ROOT / "benchmarks", target_is_directory=True)
    if "CUDA_HOME" not in os.environ and shutil.which("nvcc") is None and Path("/usr/local/cuda/bin/nvcc").exists():
        os.environ["CUDA_HOME"] = "/usr/local/cuda"
    quick = ["--quick"] if arguments.quick else []
    tools = os.pathsep.join([os.environ["PATH"], os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")])
    dead: list[str] = []  # backends
    without: dict[str, str] = {}
    for name in (name for name in STAGES if name in arguments.only):
        if name == "build":
            shutil.rmtree(SITE, ignore_errors=True)
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index",
                       "--no-build-isolation", "--target", str(SITE), "."]  # fmt: skip
            if not stages.run(name, install, ENTROPY_PO_CUDA="1"):
                stages.say("== the CUDA C++ kernels could not be built: the rest is Triton's alone")
                shutil.rmtree(SITE, ignore_errors=True)
                failed = stages.results[name]
                stages.run(name, install, ENTROPY_PO_CUDA="0")
                if not (SITE / "entropy_po").exists():  # Triton needs no build
                    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
                stages.results[name] = f"with CUDA {failed}, without {stages.results[name]}"
        elif name in BACKENDS:
            if not stages.run(name, [sys.executable, "-P", "-m", "benchmarks.gpu_smoke", name]):
                dead.append(name)
                # an illegal access would be the end of the other in the same process, too
                without = {"ENTROPY_PO_WITHOUT": ",".join(dead)}
        elif len(dead) == len(BACKENDS) or name in [NEEDED_BY[backend] for backend in dead]:
            stages.results[name] = f"not begun: {' and '.join(dead)} cannot run"
        elif name == "operators":
            stages.run(name, pytest_command("gpu", "tests/test_operators_gpu.py"), **without)
        elif name == "times":
            # the case that is begun last, and the pictures
            seconds = ["--seconds", str(stages.limit(name) - 3 * TO_FINISH), "--output_dir", str(output_dir)]
            stages.run(name, [sys.executable, "-P", "-m", "benchmarks.gpu_times", *seconds, *quick], **without)
        elif name == "streams":
            stages.run(name, [sys.executable, "-P", "-m", "benchmarks.gpu_streams"], **without)
        elif name == "kernels":
            tests = [path for path in KERNEL_TESTS if not any(f"kernels_{backend}" in path for backend in dead)]
            stages.run(name, pytest_command("gpu and not compiler", *tests), **without)
        elif name == "tune":
            seconds = ["--seconds", str(stages.limit(name) - TO_FINISH)]
            stages.run(name, [sys.executable, "-P", "-m", "benchmarks.gpu_tune", *seconds, *quick], **without)
            for table, folder in TABLES.items():
                shutil.copy(table, output_dir)
                if (SITE / "entropy_po").is_dir():  # not where nothing could be built
                    shutil.copy(table, SITE / "entropy_po" / folder)
        elif (sanitizer := shutil.which("compute-sanitizer", path=tools)) is None:
            stages.results[name] = "SKIPPED: compute-sanitizer is not installed"
        else:
            # it knows an allocation, not what torch's allocator makes of one; and torch itself asks for what fails
            memcheck = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
            one = [sys.executable, "-P", "-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider",
                   "-k", "everything", "tests/test_kernels_cuda.py"]  # fmt: skip
            stages.run(name, [*memcheck, *one], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            if stages.results[name] != "ok" and "Device not supported" in stages.log.read_text():
                stages.results[name] = "SKIPPED: compute-sanitizer does not support this device"
    stages.say("\n" + "\n".join(f"{name:10} {found}" for name, found in stages.results.items()))
    return 0 if all(found == "ok" or found.startswith("SKIPPED") for found in stages.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

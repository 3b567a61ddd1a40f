"""`make gpu-check`: everything that only a GPU can show, in one command of at most ten minutes and no network.

Builds the package with its CUDA kernels into a folder of its own, runs the tests marked `gpu` there, the CUDA kernels under
compute-sanitizer where it is installed, re-tunes Triton's blocks (benchmarks.gpu_tune), and times both backends against
their floors and peers (benchmarks.gpu_times). A stage that fails does not keep the next from running; the exit status tells.
Results go to benchmarks/results/<device>/. Needs torch, triton, pybind11, setuptools and pytest in the Python that runs it;
without a CUDA device it says so and exits 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
STAGES = ("build", "tests", "sanitizer", "tune", "times")


def stage(name: str, command: list[str], limit: float, **environment: str) -> bool:
    """Run one stage within `limit` seconds, showing what it prints; whether it succeeded."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    # -P keeps this folder off sys.path: what is tested is what was built, in SITE.
    paths = os.pathsep.join([str(SITE), str(ROOT / "build" / "benchmarks")])
    variables = {**os.environ, "PYTHONPATH": paths, **environment}
    try:
        status = subprocess.run(command, cwd=ROOT, env=variables, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    print(
        f"== {name}: {'ok' if status == 0 else f'FAILED ({status})'} in {time.perf_counter() - start:.0f} s", flush=True
    )
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--only", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--quick", action="store_true", help="the smaller shapes only")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("gpu-check: SKIPPED, torch finds no CUDA device on this machine.")
        return 0
    print(f"gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    python = [sys.executable, "-P"]
    # benchmarks/ is no part of the package: a link to it alone, so that the source tree itself stays off the path
    link = ROOT / "build" / "benchmarks" / "benchmarks"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT / "benchmarks", target_is_directory=True)
    results: dict[str, bool] = {}
    for name in arguments.only:
        if name == "build":
            shutil.rmtree(SITE, ignore_errors=True)
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            wanted = "1" if shutil.which("nvcc") else ""
            results[name] = stage(name, [*install, "--target", str(SITE), "."], 240, ENTROPY_PO_CUDA=wanted)
            if not results[name]:
                break
        elif name == "tests":
            tests = [*python, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20", "-p", "no:cacheprovider", "tests"]
            results[name] = stage(name, tests, 240)
        elif name == "sanitizer":
            sanitizer = shutil.which("compute-sanitizer")
            if sanitizer is None:
                print("\n== sanitizer: SKIPPED, compute-sanitizer is not installed")
                continue
            one = [*python, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", "-k", "everything",
                   "tests/test_kernels_cuda.py"]  # fmt: skip
            results[name] = stage(name, [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *one], 120)
        else:
            command = [*python, "-m", f"benchmarks.gpu_{name}", *(["--quick"] if arguments.quick else [])]
            results[name] = stage(name, command, 300)
            if name == "tune":  # the times are those of the blocks just chosen
                shutil.copy(ROOT / "kernels" / "blocks.json", SITE / "entropy_po" / "kernels")
    print("\n" + "\n".join(f"{name:10} {'ok' if done else 'FAILED'}" for name, done in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

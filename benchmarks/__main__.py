"""`python -m benchmarks`, or `make bench`: run every suite, and write the report, its tables and its pictures.

Writes <--output_dir>/<device>/report.json, report.md and its pictures. Other options are those of conftest.py, and pytest's:
`python -m benchmarks --long --output_dir benchmarks/results/long` runs what `make bench` leaves out, in an hour and a quarter.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.suites import PROCESSES

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=report.RESULTS)
    arguments, options = parser.parse_known_args(argv)
    readings: list[dict] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for process in range(PROCESSES):
            path = Path(folder) / f"{process}.json"
            command = [sys.executable, "-m", "pytest", str(HERE), "--benchmark-enable", "--benchmark-quiet", "--no-header",
                       "-q", "-p", "no:cacheprovider", "-W", "ignore", "-r", "fE", f"--benchmark-json={path}",
                       f"--process={process}", *options]  # fmt: skip
            status = subprocess.run(command, cwd=HERE.parent).returncode
            if status != pytest.ExitCode.NO_TESTS_COLLECTED:
                failed = failed or status
            if path.exists():  # not if nothing was left for this process, or it died
                readings.append(json.loads(path.read_text()))
    if not readings:
        return failed or status or 1
    found = report.condensed(readings, shlex.join(["python", "-m", "benchmarks", *argv]))
    print(report.write(found, arguments.output_dir))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

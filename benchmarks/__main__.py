"""`python -m benchmarks`, or `make bench`: run every suite, and write the report, its tables and its pictures.

Writes <--output_dir>/<device>/report.json, report.md and its pictures. Other options are those of conftest.py, and pytest's:
`python -m benchmarks --long --output_dir benchmarks/results/long` runs what `make bench` leaves out, in 70 minutes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import pytest

from benchmarks import report, suites

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=report.RESULTS)
    arguments, options = parser.parse_known_args(argv)
    readings: list[dict] = []
    failed = 0
    began, before = datetime.now(timezone.utc), _processor_time()
    with tempfile.TemporaryDirectory() as folder:
        for process in range(len(suites.long()["pair"]) if "--long" in options else suites.PROCESSES):
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
    found["machine"] |= {
        "began": began.strftime("%Y-%m-%d %H:%M UTC"),
        "minutes": (datetime.now(timezone.utc) - began).total_seconds() / 60,
        "stolen": _stolen(before, _processor_time()),
    }
    print(report.write(found, arguments.output_dir))
    return failed


def _processor_time() -> list[int]:
    """Ticks of all processors since the start of the system, by what they did; none where the system does not tell."""
    try:
        return [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return []


def _stolen(before: list[int], after: list[int]) -> float | None:
    """The share of the processors' time that a virtual machine's host gave to others."""
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return spent[7] / sum(spent) if sum(spent) > 0 else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

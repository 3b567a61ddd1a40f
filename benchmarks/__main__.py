"""`python -m benchmarks`, or `make bench`: run every suite, and write the report, its tables and its pictures.

Writes <--output_dir>/<device>/report.json, report.md and its pictures. Other options are those of conftest.py, and pytest's:
`python -m benchmarks --long -k "8192 and 151936" --output_dir benchmarks/results/long` runs some of what `make bench` leaves out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=report.RESULTS)
    arguments, options = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        readings = Path(folder) / "readings.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "--benchmark-enable", "--benchmark-quiet", "--no-header",
                   "-q", "-p", "no:cacheprovider", "-W", "ignore", "-r", "fE", f"--benchmark-json={readings}", *options]  # fmt: skip
        status = subprocess.run(command, cwd=HERE.parent).returncode
        if not readings.exists():
            return status or 1
        found = report.condensed(json.loads(readings.read_text()), shlex.join(["python", "-m", "benchmarks", *argv]))
    print(report.write(found, arguments.output_dir))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

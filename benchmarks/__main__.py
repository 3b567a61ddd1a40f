"""`python -m benchmarks`, or `make bench`: run every suite, and write the report, its tables and its pictures.

Writes benchmarks/results/<device>/report.json, report.md and four pictures. Options are those of conftest.py, and pytest's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        readings = Path(folder) / "readings.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "--benchmark-enable", "--benchmark-quiet", "--no-header",
                   "-q", "-p", "no:cacheprovider", "-W", "ignore", "-r", "fE", f"--benchmark-json={readings}", *argv]  # fmt: skip
        status = subprocess.run(command, cwd=HERE.parent).returncode
        if not readings.exists():
            return status or 1
        found = report.condensed(json.loads(readings.read_text()), " ".join(["python -m benchmarks", *argv]))
    print(report.write(found))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The suites on a CUDA device with torch alone, without pytest-benchmark: `python -m benchmarks.gpu_times`.

Times, floors measured in the same run, errors, allocator peaks, and the same report: <output_dir>/<device>/. The cases that
promises are about come first, and report.json is written after each, so that what was measured is not lost.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks import report, suites
from benchmarks.bars import CUDA_SHAPE
from entropy_po.bench.implementations import OURS
from entropy_po.bench.measure import measure, one_line

FIRST = ("pair", "hidden", "logits", "nll")


def main() -> int:
    """The exit status: 1 where nothing could be measured, or something of this library failed that had time and memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_times", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smaller shapes only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these no further case is begun")
    parser.add_argument("--output_dir", type=Path, default=report.RESULTS)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    rows, memory, unavailable, incomplete = [], [], {}, False
    command = "python -m benchmarks.gpu_times" + (" --quick" * arguments.quick)

    def found() -> dict:
        return report.finished(command, report.machine("cuda"), rows, memory, unavailable)

    waiting = list(suites.memory("cuda", long=not arguments.quick))

    def measure_memory() -> None:
        while waiting and time.monotonic() < end:
            memory.append(report.memory_reading(*waiting.pop(0)))
            report.save(found(), arguments.output_dir)

    def promised(row: suites.Row) -> bool:
        return (row.case.n, row.case.v) == CUDA_SHAPE

    cases = [(suite, row) for suite, rows_of in suites.cuda(arguments.quick).items() for row in rows_of]
    cases.sort(key=lambda pair: (not promised(pair[1]), FIRST.index(pair[0])))
    for suite, row in cases:
        if not promised(row):  # the promises about memory before all that nothing is promised of
            measure_memory()
        left = end - time.monotonic()
        if left < 0:
            unavailable[row.case.name] = {"the case itself": f"not begun: {arguments.seconds:.0f} s were over"}
            continue
        print(f"{suite}: {row.case.name} ({left:.0f} s left)", flush=True)
        try:
            figures, failed = measure(row.case, min(arguments.rounds, row.rounds or 99), row.who)
        except Exception as error:  # such as no memory for the inputs: the other cases are still worth having
            unavailable[row.case.name] = {"the case itself": one_line(error)}
            incomplete |= not isinstance(error, torch.OutOfMemoryError)
            continue
        rows.append({"suite": suite, **figures})
        unavailable[row.case.name] = failed
        report.save(found(), arguments.output_dir)
        if any(who.startswith(OURS) for who in failed):
            print(f"FAILED: {failed}", flush=True)
            incomplete = True
            # After an illegal access nothing in this process runs any more: raises, and what was measured is kept.
            torch.cuda.synchronize()
    measure_memory()
    print(report.write(found(), arguments.output_dir))
    return int(incomplete or not rows)


if __name__ == "__main__":
    sys.exit(main())

"""The suites on a CUDA device with torch alone, without pytest-benchmark: `python -m benchmarks.gpu_times`.

Times, floors measured in the same run, errors, allocator peaks, and the same report: benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse

from benchmarks import report, suites
from entropy_po.bench.measure import measure, one_line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_times", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smaller shapes only")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows, unavailable = [], {}
    for suite, cases in suites.cuda(arguments.quick).items():
        for row in cases:
            print(f"{suite}: {row.case.name}", flush=True)
            try:
                found, failed = measure(row.case, min(arguments.rounds, row.rounds or 99), row.who)
            except Exception as error:  # such as no memory for the inputs: the other cases are still worth having
                unavailable[row.case.name] = {"the case itself": one_line(error)}
                continue
            rows.append({"suite": suite, **found})
            unavailable[row.case.name] = failed
    memory = [report.memory_reading(*row) for row in suites.memory("cuda", long=not arguments.quick)]
    command = "python -m benchmarks.gpu_times" + (" --quick" if arguments.quick else "")
    found = report.finished(command, report.machine("cuda"), rows, memory, unavailable)
    print(report.write(found))


if __name__ == "__main__":
    main()

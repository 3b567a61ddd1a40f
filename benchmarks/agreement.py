"""Whether two runs of `make bench` on one machine agree: `python -m benchmarks.agreement FOLDER`.

FOLDER/report.json is of another run than the committed one (`python -m benchmarks --output_dir ...`); writes agreement.md beside
the committed one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import RESULTS, TITLES
from entropy_po.bench.implementations import OURS

WITHIN = 0.10


class Pair(NamedTuple):
    """A ratio that both reports print."""

    suite: str
    case: str
    who: str
    unit: str
    one: float
    other: float

    @property
    def apart(self) -> float:
        return max(self.one, self.other) / min(self.one, self.other) - 1


def pairs(one: dict, other: dict) -> list[Pair]:
    again = {(row["suite"], row["name"], who["name"]): who for row in other["rows"] for who in row["who"]}
    found = []
    for row in one["rows"]:
        for who in row["who"]:
            second = again.get((row["suite"], row["name"], who["name"]), {})
            for key, unit in (("times_floor", row["floor"]), ("times_ours", OURS)):
                # a floor's multiple of ours is that of ours turned over
                if key in who and key in second and who["name"] not in (unit, row["floor"]):
                    found.append(Pair(row["suite"], row["name"], who["name"], unit, who[key], second[key]))
    return found


def page(one: dict, other: dict) -> str:
    found = pairs(one, other)
    agreeing = sum(pair.apart <= WITHIN for pair in found)
    rows = defaultdict(list)
    for pair in found:
        rows[pair.suite, pair.case, pair.who].append(pair.apart)
    whole = sum(max(apart) <= WITHIN for apart in rows.values())
    lines = [
        "# Two runs of the report",
        "",
        f"`python -m benchmarks.agreement FOLDER`, where FOLDER holds a run begun {_began(other)}; the committed one was begun {_began(one)}. "
        f"Of the {len(rows)} rows that both print, {whole} ({whole / max(len(rows), 1):.0%}) agree within {WITHIN:.0%} in all of their ratios: "
        f"times the floor, and times {OURS}. Of these {len(found)} ratios {agreeing} ({agreeing / max(len(found), 1):.0%}) do.",
        "",
        f"| suite | of | ratios | within {WITHIN:.0%} | median difference | largest |",
        "|---|---|---:|---:|---:|---:|",
    ]
    groups = defaultdict(list)
    for pair in found:
        groups[pair.suite, "this library" if pair.who.startswith(OURS) else "others"].append(pair.apart)
    for (suite, whose), apart in groups.items():
        held = sum(x <= WITHIN for x in apart)
        lines.append(
            f"| {TITLES[suite][0]} | {whose} | {len(apart)} | {held} | {statistics.median(apart):.1%} | {max(apart):.0%} |"
        )
    lines += [
        "",
        "Those that do not:",
        "",
        "| case | who | as a multiple of | one run | the other |",
        "|---|---|---|---:|---:|",
    ]
    for pair in sorted(found, key=lambda pair: -pair.apart):
        if pair.apart > WITHIN:
            lines.append(f"| {pair.case} | {pair.who} | {pair.unit} | {pair.one:.2f} | {pair.other:.2f} |")
    return "\n".join(lines) + "\n"


def _began(report: dict) -> str:
    return report["machine"].get("began", "earlier")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("folder", type=Path, help="where report.json of the other run is")
    one, other = (
        json.loads((path / "report.json").read_text()) for path in (RESULTS / "cpu", parser.parse_args().folder)
    )
    text = page(one, other)
    (RESULTS / "cpu" / "agreement.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

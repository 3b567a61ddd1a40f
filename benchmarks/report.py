"""From pytest-benchmark's readings to one small JSON, and from that to a page of tables.

`python -m benchmarks.report` writes the pages and pictures of the committed JSONs again.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import charts
from benchmarks.bars import bars, beside
from entropy_po import describe
from entropy_po.bench.implementations import OURS
from entropy_po.bench.measure import one_line, summarised
from entropy_po.bench.memory import phases, phases_of
from entropy_po.bench.problem import COPY, SAMPLED, TRUTH_FLOPS, Case
from entropy_po.bench.timing import FEW_FAULTS, NOISY

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "logits": ("Logits path", "Log-probs and entropy of logits that exist. Floor: one read forward; with a gradient, one read "
               "and one write more, at the rate of a copy."),
    "hidden": ("Hidden path", "Log-probs and entropy per token from hidden states and the head's weight; their upstream "
               "gradients come later. Floor: the bare products of a method that holds no logits."),
    "nll": ("Mean negative log-prob", "A loss that is one number, whose gradients can be made in the forward. Floor: three "
            "bare products."),
    "pair": ("Preference loss of one pair", "DPO's loss, without a reference so that every peer computes the same. Floor: "
             "three bare products, two with a frozen head."),
    "step": ("A whole training step", "H-DPO on a real model, optimiser included. Floor: the backbone's forward and backward, "
             "three bare products, the optimiser. Eager: logits of all positions, as the model's own forward gives them. "
             "The error is that of the tied embedding's gradient against the model in fp32, not fp64: how much bf16 costs a model."),
    "scaling": ("How time and memory grow", "The pair's loss, one size changed at a time."),
}  # fmt: skip


def condensed(processes: list[dict], command: str) -> dict:
    """The report of pytest-benchmark's own JSON, of each process. Of a case that several have, the first one has the errors."""
    every = [reading for process in processes for reading in process["benchmarks"]]
    cases: dict[tuple[str, str], dict] = {}
    for reading in every:
        info = reading["extra_info"]
        row = cases.setdefault(
            (info["suite"], info["name"]), {"info": info, "seconds": defaultdict(list), "errors": {}}
        )
        (seconds,) = reading["stats"]["data"]
        row["seconds"][info["who"]].append(seconds / info["repeats"])
        row["errors"].setdefault(info["who"], info["errors"])
        if info["floor"]:
            row["floor"] = info["who"]
    copies = _copies(cases)
    rows = [
        {
            "suite": suite,
            **summarised(
                name, row["info"]["case"], row["floor"], row["info"]["scale"], row["seconds"], row["errors"],
                copies.get((suite, name)),
            ),
        }
        for (suite, name), row in cases.items()
    ]  # fmt: skip
    memory = [reading for process in processes for reading in process["memory"]]
    unavailable: dict[str, dict] = defaultdict(dict)
    for process in processes:
        for case, whys in process["unavailable"].items():
            unavailable[case] |= whys
    of_new_memory = sum(reading["extra_info"]["page_faults"] >= FEW_FAULTS for reading in every)
    machine = processes[0]["machine_info"] | {"readings": len(every), "of_new_memory": of_new_memory}
    return finished(command, machine, rows, memory, unavailable)


def _copies(cases: dict[tuple[str, str], dict]) -> dict[tuple[str, str], float]:
    """Seconds of the copies of the cases that have them for a floor, at the median rate of all of them: the faster half, or the best, would
    be those of the minutes in which a shared machine's others stood still, of which one run has more than another."""
    moved = {key: Case(**row["info"]["case"]).copied_bytes for key, row in cases.items() if row["floor"] == COPY}
    rates = [moved[key] / seconds for key in moved for seconds in cases[key]["seconds"][COPY]]
    return {key: num_bytes / statistics.median(rates) for key, num_bytes in moved.items()}


def memory_reading(case: Case, who: str) -> dict:
    """The phases of one implementation's memory, or why there are none."""
    reading = {"case": case.name, "n": case.n, "path": case.path, "who": who}
    try:
        return reading | phases(case, who)
    except Exception as error:
        return reading | {"error": one_line(error)}


def memory_growth(cases: Sequence[Case], who: str) -> list[dict]:
    """The same of cases that differ in one size or another, made in one process; each reading has all of its `sizes`."""
    found = zip(cases, phases_of(cases, who), strict=True)
    return [{"case": case.name, "sizes": asdict(case), "who": who} | reading for case, reading in found]


def machine(device: str) -> dict:
    """Facts that a time depends on; no name of the machine."""
    facts = describe()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "processor": facts["cpu"]["processor"],
        "instruction_set": (facts["cpu"]["instruction_sets"] or ["none"])[0],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "clock_mhz": _clock(),
        "backends": facts["backends"],
        "versions": {name: version for name, version in facts["versions"].items() if version},
    }


def _clock() -> int | None:
    """What /proc/cpuinfo says now, in MHz, as a mean over cores."""
    try:
        with open("/proc/cpuinfo") as lines:
            clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except OSError:
        return None
    return round(sum(clocks) / len(clocks)) if clocks else None


def save(report: dict, folder: Path = RESULTS) -> Path:
    """Writes report.json into <folder>/<device>, and returns that."""
    folder = folder / re.sub(r"[^a-z0-9]+", "-", report["machine"]["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    readings_in_a_line = re.sub(r"(?<=[\[,])\s+(?=-?\d)|(?<=\d)\s+(?=\])", " ", text)
    (folder / "report.json").write_text(readings_in_a_line + "\n")
    return folder


def write(report: dict, folder: Path = RESULTS) -> str:
    """Writes report.json, report.md and the pictures into <folder>/<device>; returns the page."""
    folder = save(report, folder)
    (folder / "report.md").write_text(markdown(report, {}))  # is there even if nothing can be drawn
    text = markdown(report, charts.draw(report, folder))
    (folder / "report.md").write_text(text)
    return f"{text}\nwritten to {folder}"


def finished(command: str, machine: dict, rows: list[dict], memory: list[dict], unavailable: dict) -> dict:
    """The report: what was measured, where, and which promises it keeps."""
    unavailable = {name: reasons for name, reasons in unavailable.items() if reasons}
    report = {"command": command, "machine": machine, "rows": rows, "memory": memory, "unavailable": unavailable}
    report["bars"] = [{**bar._asdict(), "held": bar.held} for bar in bars(report)]
    return report


def markdown(report: dict, pictures: dict[str, str]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# Benchmarks on {machine['device'] if machine['device'] != 'CPU' else machine['processor']}",
        "",
        f"`{report['command']}`: {machine['threads']} threads of {machine['cores']} cores, {machine['instruction_set']}, "
        f"{machine['clock_mhz'] or 'unknown'} MHz{_when(machine)}. {versions}.",
        "",
        "Times are means of the faster half of interleaved rounds, at least of two, for what else a machine does only ever adds to them; beside them "
        "are the median of all rounds and their spread, from the first to the third quartile. "
        + (
            "Where a call takes milliseconds the rounds are spread over the whole run and several processes. Ratios are of these times, but "
            "for those to a copy: that is taken at the median rate of all copies of the run. "
            if machine["device"] == "CPU"
            else "Ratios are of these times. "
        )
        + "Errors are against fp64: the worst output, in nats, and the relative norm of the worst gradient. Where another is faster than this library, that is in "
        "bold.",
        *_sampled(report["rows"]),
        *_allocation(machine),
        *_noise(report),
        *_bars(report["bars"]),
    ]
    for suite, (title, about) in TITLES.items():
        rows = [row for row in report["rows"] if row["suite"] == suite]
        if rows:
            lines += ["", f"## {title}", "", about]
            if suite in pictures:
                lines += ["", f"![{title}]({pictures[suite]})"]
            lines += ["", *_times(rows)]
        if suite == "scaling" and rows:
            lines += _exponents(report)
    lines += _memory([row for row in report["memory"] if "sizes" not in row], pictures)
    if "accuracy" in pictures:
        lines += ["", "## Accuracy against speed", "", f"![Accuracy against speed]({pictures['accuracy']})"]
    lines += _unavailable(report["unavailable"])
    return "\n".join(lines) + "\n"


def _when(machine: dict) -> str:
    if "began" not in machine:
        return ""
    said = f"; begun {machine['began']}, {machine['minutes']:.0f} minutes"
    if machine["stolen"] is not None:
        said += f", in which the host gave {machine['stolen']:.1%} of the processors' time to others"
    return said


def _sampled(rows: list[dict]) -> list[str]:
    cases = [Case(**row["case"]) for row in rows if row["suite"] not in ("step", "logits")]
    if not any(case.backward and case.flops >= TRUTH_FLOPS for case in cases):
        return []
    return [
        "",
        f"Of cases above {TRUTH_FLOPS:g} FLOPs the gradient that is checked is that of the first {SAMPLED} hidden states.",
    ]


def _allocation(machine: dict) -> list[str]:
    if "keeps_memory" not in machine:  # a GPU's allocator keeps memory by itself
        return []
    if machine["keeps_memory"]:
        return ["", "Freed memory stays with the process, as with jemalloc, which torch's tuning guide advises on a CPU. glibc's own settings "
                "return it, and the system then clears new pages in every call: `--fresh_memory` measures that. "
                f"Of {machine['readings']} readings here {machine['of_new_memory']} took new pages all the same."]  # fmt: skip
    return ["", "Every call takes its memory from the system, which clears it first, as glibc has it unless told otherwise. Whoever "
            "allocates most then takes longest, and times change with the state of the machine's memory from hour to hour."]  # fmt: skip


def _noise(report: dict) -> list[str]:
    spreads = [who["spread"] for row in report["rows"] for who in row["who"] if row["rounds"] > 2]
    noisy = sum(value > NOISY for value in spreads)
    if not noisy:
        return []
    lines = [
        "",
        f"{noisy} of {len(spreads)} times spread over more than {NOISY:.0%} of their median.",
    ]
    if noisy > len(spreads) / 4:
        lines[-1] = f"**The machine was too busy to believe a few percent:** {lines[-1]}"
    return lines


def _bars(found: list[dict]) -> list[str]:
    lines = ["", f"## Promises: {sum(bar['held'] for bar in found)} of {len(found)} held", ""]
    lines += ["| | measured | promised | held |", "|---|---:|---:|---|"]
    for bar in found:
        sign, held = ("at least" if bar["at_least"] else "at most"), "yes" if bar["held"] else "**no**"
        lines.append(f"| {bar['name']} | {bar['value']:.3g} | {sign} {bar['limit']:g} | {held} |")
    return lines if found else []


def _times(rows: list[dict]) -> list[str]:
    lines = ["| case | who | ms | median, spread | times the floor | times entropy_po | error, nats | gradient error |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        for i, who in enumerate(row["who"]):
            errors = who["errors"]
            cells = [
                row["name"] if i == 0 else "",
                f"*{who['name']}*" if who["name"] == row["floor"] else who["name"],
                _ms(who["ms"])
                + (f", in the whole run {_ms(who['run_ms'])}" if who.get("run_ms", who["ms"]) != who["ms"] else ""),
                _middle(who),
                f"{who['times_floor']:.2f}" if "times_floor" in who and who["name"] != row["floor"] else "",
                _against_ours(who, is_floor=who["name"] == row["floor"]),
                f"{errors['value']:.1e}" if "value" in errors else "",
                f"{errors['gradient']:.1e}" if "gradient" in errors else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _middle(who: dict) -> str:
    readings = who["readings_ms"]
    return f"{_ms(statistics.median(readings))}, {who['spread']:.0%}" if len(readings) > 1 else "one reading"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _against_ours(who: dict, is_floor: bool) -> str:
    if "times_ours" not in who:
        return ""
    figure = f"{who['times_ours']:.2f}"
    return figure if is_floor or who["name"].startswith(OURS) or who["times_ours"] >= 1 else f"**{figure}**"


def _memory(rows: list[dict], pictures: dict[str, str]) -> list[str]:
    if not rows:
        return []
    lines = ["", "## Memory against context", "", "Peak MiB beside the inputs, of a process that does nothing else; what is "
             "held between forward and backward; and the peak beside inputs and gradients."]  # fmt: skip
    if "memory" in pictures:
        lines += ["", f"![Memory against context]({pictures['memory']})"]
    lines += [
        "",
        "| tokens | who | forward | held between | backward | beside gradients |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        who = row["who"] if row["path"] == "pair" else f"{row['who']} linear_token_stats"
        if "error" in row:
            lines.append(f"| {row['n']} | {who} | {row['error']} | | | |")
            continue
        cells = [f"{round(value / 2**20)}" for value in (row["forward"], row["held"], row["backward"], beside(row))]
        lines.append(f"| {row['n']} | {who} | " + " | ".join(cells) + " |")
    return lines


def _exponents(report: dict) -> list[str]:
    lines = ["", "Of the power of the size that fits best, by least squares in logarithms: 1 is proportional. Memory is the peak beside inputs and "
             "gradients.", "", "| what changes | who | time | memory |", "|---|---|---:|---:|"]  # fmt: skip
    for grown in charts.growth(report):
        cells = (f"{charts.exponent(grown.sizes, y):+.2f}" if y else "" for y in (grown.ms, grown.mib))
        lines.append(
            f"| {grown.axis}, {grown.sizes[0]:,} to {grown.sizes[-1]:,} | {grown.who} | " + " | ".join(cells) + " |"
        )
    return lines


def _unavailable(unavailable: dict[str, dict[str, str]]) -> list[str]:
    reasons = {(who, why) for found in unavailable.values() for who, why in found.items()}
    if not reasons:
        return []
    return ["", "## What could not run here, with its own words", ""] + [
        f"* {who}: {why}" for who, why in sorted(reasons)
    ]


if __name__ == "__main__":
    for path in RESULTS.glob("**/report.json"):
        print(write(json.loads(path.read_text()), path.parent.parent).splitlines()[-1])

"""The report's pictures: time against the floor, memory against context, accuracy against speed, how time grows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.bars import MEMORY_BAR, beside
from benchmarks.suites import AXES, GROWING
from entropy_po.bench.implementations import DEFERRED, OURS, RECOMPUTE, RESIDENT, TORCH

# colours of Okabe and Ito, told apart without colour vision; ours is drawn last and largest
STYLE = {
    OURS: ("#D55E00", "o"),
    RECOMPUTE: ("#E69F00", "o"),
    RESIDENT: ("#E69F00", "<"),
    DEFERRED: ("#E69F00", ">"),
    TORCH: ("#E69F00", "D"),
    f"{OURS} linear_token_stats": ("#E69F00", "s"),
    "eager": ("#000000", "x"),
    "torch.compile": ("#999999", "P"),
    "TRL": ("#0072B2", "^"),
    "Liger FLSCE": ("#009E73", "v"),
    "Liger DPO": ("#009E73", "D"),
    "Liger FLCE": ("#009E73", "s"),
    "F.linear_cross_entropy": ("#CC79A7", "*"),
    "cut-cross-entropy": ("#56B4E9", "d"),
}
OTHER = ("#777777", ".")
FLOOR = "bare products"
PANELS = {
    "logits": "Logits path",
    "hidden": "Hidden path",
    "nll": "Mean NLL",
    "pair": "Preference loss",
    "step": "Step",
}


def draw(report: dict, folder: Path) -> dict[str, str]:
    """Draws what the report has figures for; suite or topic -> file name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130})
    pictures = {}
    for topic, name, picture in (
        ("logits", "time-against-floor.png", _time),
        ("memory", "memory-against-context.png", _memory),
        ("accuracy", "accuracy-against-speed.png", _accuracy),
        ("scaling", "scaling.png", _scaling),
    ):
        figure = picture(plt, report)
        if figure is not None:
            figure.savefig(folder / name, bbox_inches="tight", facecolor="white")
            plt.close(figure)
            pictures[topic] = name
    return pictures


def _style(name: str) -> dict:
    color, marker = STYLE.get(name, OTHER)
    return {"color": color, "marker": marker}


def _legend(figure, names: Iterable[str], **options) -> None:
    from matplotlib.lines import Line2D

    names = sorted(set(names), key=lambda name: list(STYLE).index(name) if name in STYLE else len(STYLE))
    handles = [Line2D([], [], linestyle="", label=name, **_style(name)) for name in names]
    figure.legend(handles=handles, frameon=False, **options)


def _log_ticks(axis, values: Iterable[float]) -> None:
    from matplotlib.ticker import NullFormatter

    low, high = min(values), max(values)
    ticks: list[float] = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 1.3 <= t <= high * 1.3]
    if len(ticks) < 3:  # tenths of what lies close together, as long as they are few
        step = math.ceil((10 * high - 10 * low) / 8)
        ticks = [t / 10 for t in range(math.floor(10 * low), math.ceil(10 * high) + 1) if t % max(step, 1) == 0]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_minor_formatter(NullFormatter())


def _time(plt, report: dict):
    panels = {
        suite: [row for row in report["rows"] if row["suite"] == suite and row["floor"]] for suite in PANELS
    }  # fmt: skip
    panels = {suite: rows for suite, rows in panels.items() if rows}
    if not panels:
        return None
    heights = [len(rows) + 0.9 for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(9, 0.36 * sum(heights) + 1.2), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.9 * len(panels) / sum(heights)},
    )  # fmt: skip
    seen, values = set(), []
    for axis, (suite, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for y, row in enumerate(rows):
            axis.axhspan(y - 0.45, y + 0.45, color="#f4f4f4", zorder=0)
            found = [who for who in row["who"] if who["name"] != row["floor"]]
            for place, who in enumerate(sorted(found, key=lambda who: who["times_floor"])):
                # one below the other, so that those of about the same time are all seen
                lane = y + 0.7 * ((place + 0.5) / len(found) - 0.5)
                big = 60 if who["name"] == OURS else 28
                axis.scatter(
                    who["times_floor"], lane, s=big, zorder=4 if who["name"] == OURS else 3, **_style(who["name"])
                )
                seen.add(who["name"])
                values.append(who["times_floor"])
        axis.axvline(1, color="#555555", linewidth=1)
        axis.set(xscale="log", ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7.5)
        axis.tick_params(axis="y", length=0)
        axis.set_title(PANELS[suite], loc="left", fontsize=9.5, fontweight="bold", pad=3)
    _log_ticks(axes[-1, 0].xaxis, values)
    axes[-1, 0].set_xlabel(
        "time, as a multiple of the floor\n1 is the bare work: a copy's bytes, torch's own matrix products, or a step without its loss; "
        "left of 1\nare faster products than torch's, or one product fewer, with all logits held\n" + _where(report), fontsize=8,
    )  # fmt: skip
    figure.suptitle(
        "Time against the floor: left is better (N: tokens, D: hidden size, V: vocabulary)",
        x=0.125, y=0.88 + 0.5 / figure.get_figheight(), ha="left", va="bottom", fontsize=11,
    )  # fmt: skip
    _legend(figure, seen, loc="center left", bbox_to_anchor=(0.91, 0.5))
    return figure


def _where(report: dict) -> str:
    machine = report["machine"]
    device = (
        machine["device"] if machine["device"] != "CPU" else f"{machine['processor']}, {machine['instruction_set']}"
    )
    return f"{device}, {machine['threads']} threads, torch {machine['versions']['torch']}"


def _memory(plt, report: dict):
    rows = [row for row in report["memory"] if row.get("path") == "pair" and "error" not in row]
    if len({row["n"] for row in rows}) < 2:  # no line
        return None
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    ends: dict[tuple[int, int], list[str]] = {}
    for name in dict.fromkeys(row["who"] for row in rows):
        points = [(row["n"], max(beside(row), 1 << 20) / 2**20) for row in rows if row["who"] == name]
        style = _style(name) | {"linewidth": 2.5 if name == OURS else 1.3}
        axis.plot(*zip(*points, strict=True), **style)
        n, mib = points[-1]
        ends.setdefault((n, round(8 * math.log2(mib))), []).append(name)  # lines that end together share a label
    lengths = sorted({row["n"] for row in rows})
    for (n, place), names in ends.items():
        longest = n == lengths[-1]
        axis.annotate(
            ", ".join(names) + ("" if longest else f"\n(all logits held:\nnot tried beyond {n:,})"), (n, 2 ** (place / 8)), xytext=(7, 0),
            textcoords="offset points", va="center", color=_style(names[0])["color"], fontsize=9 if longest else 8,
        )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel=f"tokens in one pair, both answers\n{_where(report)}",
        ylabel="peak MiB of forward and backward,\nbeside inputs and gradients",
    )  # fmt: skip
    if report["machine"]["device"] == "CPU":
        limit = MEMORY_BAR / 2**20
        axis.axhline(limit, color=_style(OURS)["color"], linewidth=0.8, linestyle=":")
        axis.annotate(f"promised: {limit:.0f}", (lengths[0], limit), xytext=(0, 3), textcoords="offset points", fontsize=8,
                      color=_style(OURS)["color"])  # fmt: skip
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    low, high = axis.get_ylim()
    mibs = [2**k for k in range(30) if low <= 2**k <= 1.5 * high]
    axis.set_yticks(mibs, [f"{mib:,}" for mib in mibs])
    axis.minorticks_off()
    axis.set_ylim(low, 1.5 * high)
    axis.grid(alpha=0.25)
    case = next(row["case"] for row in rows)
    axis.set_title(f"Memory against context: {case.split(', ', 1)[1]}", loc="left", fontsize=11)
    return figure


def _accuracy(plt, report: dict):
    groups = {"float32": [], "bfloat16": []}
    for row in report["rows"]:
        if row["suite"] in ("hidden", "nll", "pair") and row["case"]["backward"]:
            for who in row["who"]:
                if "gradient" in who["errors"] and "times_floor" in who:
                    groups.setdefault(row["case"]["dtype"], []).append(who)
    groups = {dtype: found for dtype, found in groups.items() if found}
    if not groups:
        return None
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.8), squeeze=False)
    for axis, (dtype, found) in zip(axes[0], groups.items(), strict=True):
        for who in sorted(found, key=lambda who: who["name"] == OURS):
            axis.scatter(
                who["times_floor"],
                who["errors"]["gradient"],
                s=50 if who["name"] == OURS else 30,
                **_style(who["name"]),
            )
        axis.set(xscale="log", yscale="log", xlabel="time, as a multiple of torch's bare products", title=dtype)
        _log_ticks(axis.xaxis, [who["times_floor"] for who in found])
        errors = [who["errors"]["gradient"] for who in found]
        axis.set_ylim(
            min(errors) / 10, max(errors) * 10
        )  # so that a difference of digits is not drawn as one of decades
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("relative gradient error against fp64")
    figure.suptitle(
        "Accuracy against speed: lower left is better. One point per implementation and case with a backward:\n"
        f"hidden path, mean NLL, preference loss. {_where(report)}",
        x=0.06, y=1.06, ha="left", fontsize=10,
    )  # fmt: skip
    _legend(
        figure,
        [who["name"] for found in groups.values() for who in found],
        loc="center left",
        bbox_to_anchor=(0.92, 0.5),
    )
    return figure


class Grown(NamedTuple):
    """What grows with one size of a case: ms, and MiB beside inputs and gradients, [] where not measured."""

    axis: str
    fixed: str  # the other sizes
    who: str
    sizes: list[int]
    ms: list[float]
    mib: list[float]


FIELDS = {"tokens": "n", "vocabulary": "v", "hidden size": "d", "threads": "threads"}


def growth(report: dict) -> list[Grown]:
    """Of every axis and implementation that all sizes were measured of, the floor (`FLOOR`) among them."""
    ms = {
        row["name"]: {FLOOR if who["name"] == row["floor"] else who["name"]: who["ms"] for who in row["who"]}
        for row in report["rows"]
        if row["suite"] == "scaling"
    }
    letters = {"N": "tokens", "V": "vocabulary", "D": "hidden size"}
    peaks = {(row["case"], row["who"]): beside(row) / 2**20 for row in report["memory"] if "sizes" in row}
    found = []
    for axis, cases in AXES.items():
        cases = [case for case in cases if case.name in ms]
        if len(cases) < 2:
            continue
        fixed = ", ".join(f"{x} {getattr(cases[0], FIELDS[size])}" for x, size in letters.items() if size != axis)
        for who in (FLOOR, *GROWING):
            times = [ms[case.name].get(who) for case in cases]
            mib = [peaks.get((case.name, who)) for case in cases]
            if None not in times:
                sizes = [getattr(case, FIELDS[axis]) for case in cases]
                found.append(Grown(axis, fixed, who, sizes, times, [] if None in mib else mib))
    return found


def _scaling(plt, report: dict):
    found = growth(report)
    names = list(dict.fromkeys(grown.axis for grown in found))
    if not names:
        return None
    measured = ["ms"] + ["mib"] * any(grown.mib for grown in found)
    figure, axes = plt.subplots(
        len(measured), len(names), figsize=(3.1 * len(names), 3.0 * len(measured)), squeeze=False, sharex="col", sharey="row"
    )  # fmt: skip
    for place, name in enumerate(names):
        for axis, what in zip(axes[:, place], measured, strict=True):
            lines = [grown for grown in found if grown.axis == name and getattr(grown, what)]
            for grown in lines:
                values = getattr(grown, what)
                axis.plot(
                    grown.sizes, values, label=f"{grown.who}: {exponent(grown.sizes, values):+.2f}", linewidth=1.3,
                    **(_style(grown.who) if grown.who != FLOOR else {"color": "#555555", "linestyle": ":"}),
                )  # fmt: skip
            axis.set(xscale="log", yscale="log")
            if lines:
                axis.set_xticks(lines[0].sizes, [f"{size:,}" for size in lines[0].sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.margins(x=0.1)
            axis.legend(frameon=False, fontsize=7.5, title="fitted exponent", title_fontsize=7.5, loc="upper left")
        axes[0, place].set_title(f"{name} ({next(grown.fixed for grown in found if grown.axis == name)})", fontsize=9)
        axes[-1, place].set_xlabel(name)
    for axis, label in zip(
        axes[:, 0], ("ms, forward and backward", "peak MiB beside inputs and gradients"), strict=False
    ):
        axis.set_ylabel(label)
        low, high = axis.get_ylim()
        high *= 25  # room for the legends
        axis.set_ylim(low, high)
        ticks = [x * 10**k for k in range(6) for x in (1, 2, 5) if low <= x * 10**k <= high]
        axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    figure.suptitle(
        "How the loss of one pair grows (bf16; N: tokens of both answers, V: vocabulary, D: hidden size)",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.supxlabel(_where(report), fontsize=8)
    figure.tight_layout()
    return figure


def exponent(sizes: list[float], times: list[float]) -> float:
    """Of the power of the size that fits the times best: least squares in logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)

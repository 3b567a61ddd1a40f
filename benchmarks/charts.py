"""The report's pictures: time against the floor, memory against context, accuracy against speed, how time grows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from benchmarks.bars import beside
from benchmarks.suites import AXES
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
    if len(ticks) < 3:  # tenths of what lies close together
        ticks = [t / 10 for t in range(math.floor(10 * low), math.ceil(10 * high) + 1)]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_minor_formatter(NullFormatter())


def _time(plt, report: dict):
    panels = {
        suite: [row for row in report["rows"] if row["suite"] == suite and row["floor"]] for suite in PANELS
    }  # fmt: skip
    panels = {suite: rows for suite, rows in panels.items() if rows}
    if not panels:
        return None
    heights = [len(rows) + 0.6 for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(9, 0.27 * sum(heights) + 1.2), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.12},
    )  # fmt: skip
    seen, values = set(), []
    for axis, (suite, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for y, row in enumerate(rows):
            axis.axhline(y, color="#eeeeee", zorder=0)
            for who in sorted(row["who"], key=lambda who: who["name"] == OURS):
                if who["name"] != row["floor"]:
                    big = 60 if who["name"] == OURS else 32
                    axis.scatter(who["times_floor"], y, s=big, zorder=3, **_style(who["name"]))
                    seen.add(who["name"])
                    values.append(who["times_floor"])
        axis.axvline(1, color="#555555", linewidth=1)
        axis.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7.5)
        axis.set_ylabel(PANELS[suite], fontweight="bold")
    _log_ticks(axes[-1, 0].xaxis, values)
    axes[-1, 0].set_xlabel("time, as a multiple of the floor (1: nothing but the copy or the bare matrix products)")
    axes[0, 0].set_title("Time against the floor: left is better", loc="left", fontsize=11)
    _legend(figure, seen, loc="center left", bbox_to_anchor=(0.91, 0.5))
    return figure


def _memory(plt, report: dict):
    rows = [row for row in report["memory"] if row["path"] == "pair" and "error" not in row]
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
    for (n, place), names in ends.items():
        axis.annotate(
            ", ".join(names), (n, 2 ** (place / 8)), xytext=(7, 0), textcoords="offset points", va="center",
            color=_style(names[0])["color"],
        )  # fmt: skip
    lengths = sorted({row["n"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="tokens in one pair", ylabel="peak MiB beside inputs and gradients")
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
        axis.set(xscale="log", yscale="log", xlabel="time, as a multiple of the bare products", title=dtype)
        _log_ticks(axis.xaxis, [who["times_floor"] for who in found])
        errors = [who["errors"]["gradient"] for who in found]
        axis.set_ylim(
            min(errors) / 10, max(errors) * 10
        )  # so that a difference of digits is not drawn as one of decades
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("relative gradient error against fp64")
    figure.suptitle("Accuracy against speed: lower left is better", x=0.06, y=1.02, ha="left", fontsize=11)
    _legend(
        figure,
        [who["name"] for found in groups.values() for who in found],
        loc="center left",
        bbox_to_anchor=(0.92, 0.5),
    )
    return figure


def _scaling(plt, report: dict):
    rows = {row["name"]: row for row in report["rows"] if row["suite"] == "scaling"}
    axes_with = {axis: [rows[case.name] for case in cases if case.name in rows] for axis, cases in AXES.items()}
    axes_with = {axis: found for axis, found in axes_with.items() if len(found) > 1}
    if not axes_with:
        return None
    figure, axes = plt.subplots(1, len(axes_with), figsize=(3.1 * len(axes_with), 3.2), squeeze=False)
    fields = {"tokens": "n", "vocabulary": "v", "hidden size": "d", "threads": "threads"}
    for axis, (name, found) in zip(axes[0], axes_with.items(), strict=True):
        sizes = [row["case"][fields[name]] for row in found]
        for who in [OURS, "eager", "TRL"]:
            times = [next((w["ms"] for w in row["who"] if w["name"] == who), math.nan) for row in found]
            if not any(map(math.isnan, times)):
                label = f"{who}: {exponent(sizes, times):+.2f}"
                axis.plot(sizes, times, label=label, linewidth=1.3, **_style(who))
        axis.set(xscale="log", yscale="log", xlabel=name, title=f"{name} {sizes[0]} to {sizes[-1]}")
        axis.set_xticks(sizes, [f"{size}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.set_ylim(top=axis.get_ylim()[1] * 8)  # room for the legend
        axis.legend(frameon=False, fontsize=7.5, title="fitted exponent", title_fontsize=7.5, loc="upper left")
    axes[0, 0].set_ylabel("ms")
    figure.suptitle("How the time of a pair's loss grows, forward and backward, bf16", x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    return figure


def exponent(sizes: list[float], times: list[float]) -> float:
    """Of the power of the size that fits the times best: least squares in logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)

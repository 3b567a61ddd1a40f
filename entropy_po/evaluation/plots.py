"""Pictures: loss curves, and quality against diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: a machine that trains may have no display

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from entropy_po.evaluation.metrics import paired_interval

# Okabe and Ito's colours, which colour-blind readers can tell apart, and two more; the first row, the untrained model, is black.
COLORS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#882255", "#8A8A00")
SMOOTHING = 5  # steps of the running mean


def loss_curves(curves: dict[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Training loss by step, one line a run: name -> [(step, loss)]. Thin: every step; thick: running mean."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    ends = []
    for i, (name, points) in enumerate(curves.items(), 1):
        color = COLORS[i % len(COLORS)]
        steps, losses = zip(*points, strict=True)
        window = [losses[max(0, k - SMOOTHING + 1) : k + 1] for k in range(len(losses))]
        smooth = [sum(w) / len(w) for w in window]
        axes.plot(steps, losses, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth, color=color, linewidth=2.2)
        ends.append((name, steps[-1], smooth[-1], color))
    axes.axhline(math.log(2), color="0.4", linewidth=1, linestyle=":")
    axes.annotate(
        "log 2: a margin of 0", (1, math.log(2)), xycoords=("axes fraction", "data"), xytext=(-2, 3),
        textcoords="offset points", fontsize=9, color="0.35", ha="right",
    )  # fmt: skip
    axes.set(xlabel="optimiser step", ylabel="pair loss")
    axes.set_title(
        f"Training loss on the same batches in the same order (thick: mean of the last {SMOOTHING} steps)\n"
        "The runs start from the same weights; at step 0 the loss is log 2 only for alpha = 1",
        fontsize=10.5,
        loc="left",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    _label_in_margin(axes, ends)
    _finish(figure, axes, path)


def quality_diversity(rows: dict[str, dict], path: Path) -> None:
    """Quality against entropy per token: name -> `Evaluation.row()`, all on the same prompts.

    The bars are 95 % intervals of the difference to the first row, paired by prompt; the first row has none.
    """
    figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
    (base_name, base), *_ = rows.items()
    points = {name: (row["entropy_per_token"], row["quality"]) for name, row in rows.items()}
    for i, (name, row) in enumerate(rows.items()):
        color, (x, y) = COLORS[i % len(COLORS)], points[name]
        bars: dict[str, Any] = {}
        if name != base_name:
            across = entropy_change(row, base)
            up = quality_change(row, base)
            dx, dy = x - base["entropy_per_token"], y - base["quality"]
            # A percentile interval need not hold its point; a bar cannot be negative.
            bars["xerr"] = [[max(dx - across[0], 0)], [max(across[1] - dx, 0)]]
            bars["yerr"] = [[max(dy - up[0], 0)], [max(up[1] - dy, 0)]]
        axes.errorbar(x, y, fmt="s" if name == base_name else "o", color=color, markersize=9, elinewidth=1.2, **bars)
    alike = len({row["temperature"] for row in rows.values()}) == 1
    drawn_at = f", temperature {base['temperature']:g}" if alike else ""
    axes.set(xlabel="entropy of the policy, nats per token  (right: more varied)", ylabel="quality  (up: better)")
    axes.set_title(
        f"Quality against diversity: {base['num_prompts']} prompts x {base['answers_per_prompt']} answers{drawn_at}\n"
        f"Bars: 95 % interval of the change from “{base_name}” on the same prompts; one training seed",
        fontsize=10.5,
        loc="left",
    )
    axes.margins(0.08)
    _label_in_margin(axes, [(name, *points[name], COLORS[i % len(COLORS)]) for i, name in enumerate(rows)])
    _finish(figure, axes, path)


def quality_change(row: dict, base: dict) -> tuple[float, float]:
    """95 % interval of the difference in quality, paired by prompt."""
    return paired_interval(row["quality_by_prompt"], base["quality_by_prompt"])


def entropy_change(row: dict, base: dict) -> tuple[float, float]:
    """95 % interval of the difference in entropy per token, paired by prompt."""
    return paired_interval(
        row["entropy_by_prompt"], base["entropy_by_prompt"], row["draws_by_prompt"], base["draws_by_prompt"]
    )


def _label_in_margin(axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Names of (name, x, y, colour) right of the axes, in the order of y, each with a thin line to its point."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = _spread([y for _, _, y, _ in points], gap=(high - low) * 0.055)
    for (name, x, y, color), height in zip(points, heights, strict=True):
        axes.annotate(
            name, (x, y), xytext=(1.03, height), textcoords=axes.get_yaxis_transform(), color=color, fontsize=10,
            weight="bold", va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "alpha": 0.7, "linestyle": ":"},
        )  # fmt: skip


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved apart, in their order, until neighbours are `gap` from one another."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = list(values)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    shift = (sum(placed) - sum(values)) / max(len(values), 1)
    return [value - shift for value in placed]


def _finish(figure, axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)

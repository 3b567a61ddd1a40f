"""The demo's two pictures: loss curves, and quality against diversity."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: a machine that trains may have no display

import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers can tell apart; the untrained model is black.
COLORS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


def loss_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Training loss by step, one line a run: name -> [(step, loss)]."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for (name, points), color in zip(curves.items(), COLORS[1:], strict=False):
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=color, linewidth=2, marker="o", markersize=3, label=name)
    axes.set(xlabel="optimiser step", ylabel="pair loss (nats), mean since the last point")
    axes.set_title(
        "Training loss. At step 0 it is log 2 only for alpha = 1: the objectives differ, not the models.", fontsize=10
    )
    axes.legend(frameon=False)
    _finish(figure, axes, path)


def quality_diversity(points: dict[str, dict], path: Path) -> None:
    """Quality (constraints met) against entropy per token, with 95 % intervals: name -> Evaluation.row()."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for i, ((name, row), color) in enumerate(zip(points.items(), COLORS, strict=False)):
        x, y = row["entropy_per_token"], row["quality"]
        low, high = row["quality_interval"]
        left, right = row["entropy_interval"]
        # the interval is of the mean over prompts, the point the mean over tokens: clip, so that no bar is negative
        axes.errorbar(
            x,
            y,
            xerr=[[max(x - left, 0)], [max(right - x, 0)]],
            yerr=[[max(y - low, 0)], [max(high - y, 0)]],
            fmt="s" if i == 0 else "o",
            color=color,
            markersize=8,
            elinewidth=1,
            alpha=0.9,
        )
        axes.annotate(name, (x, y), xytext=(8, 7), textcoords="offset points", color=color, fontsize=10, weight="bold")
    first = next(iter(points.values()))
    axes.set(xlabel="entropy of the policy, nats per token (right: more varied)", ylabel="constraints met (up: better)")
    axes.set_title(
        f"Quality against diversity on {first['num_prompts']} held-out prompts x {first['answers_per_prompt']} answers; "
        "bars: 95 % bootstrap over prompts",
        fontsize=10,
    )
    axes.margins(0.15)
    _finish(figure, axes, path)


def _finish(figure, axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""Pictures of the studies."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: a machine that trains may have no display

import matplotlib.pyplot as plt

from entropy_po.evaluation.plots import COLORS


def exact_figure(results: dict, path: Path) -> None:
    """Four panels: frontiers, offline, online, H-DPO against a sampling temperature."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    frontier, offline, online, temperature = axes.flat
    colors = dict(zip(results["frontiers"], COLORS, strict=False))
    for name, points in results["frontiers"].items():
        frontier.plot(*zip(*points, strict=True), color=colors[name], linewidth=2, label=name)
    _dress(
        frontier,
        "More entropy at the same reward\n60 outcomes; R and K along RLHF's own path",
        "mean reward R",
        "entropy, nats",
        legend="lower left",
    )
    for (name, sizes), color in zip(results["offline"].items(), COLORS, strict=False):
        numbers = sorted(map(int, sizes))
        means = [statistics.mean(sizes[str(n)]) for n in numbers]
        offline.loglog(numbers, means, color=color, marker="o", markersize=4, linewidth=1.8, label=name)
        offline.fill_between(
            numbers,
            *zip(*((min(sizes[str(n)]), max(sizes[str(n)])) for n in numbers), strict=True),
            color=color,
            alpha=0.12,
        )
    level = max(statistics.mean(sizes[str(numbers[0])]) for sizes in results["offline"].values()) * 1.25
    guide = [level * (n / numbers[0]) ** -0.5 for n in numbers]
    offline.loglog(numbers, guide, color="0.5", linestyle=":", linewidth=1.2)
    offline.annotate(
        r"$n^{-1/2}$: sampling noise alone", (numbers[len(numbers) // 2], guide[len(guide) // 2]), xytext=(4, 6),
        textcoords="offset points", fontsize=9, color="0.35",
    )  # fmt: skip
    _dress(
        offline,
        "Offline losses end at the closed form\nBradley-Terry pairs; band: range over seeds",
        "preference pairs",
        "total variation to the closed form",
        legend="lower left",
    )
    labels = {"sequence": "sequence (unbiased)", "token": "token (unbiased)", "bonus": "entropy bonus alone (biased)"}
    for (name, runs), color in zip(results["online"].items(), ("#0072B2", "#009E73", "#D55E00"), strict=True):
        counts = [n for n, _ in runs[0]]
        columns = list(zip(*([tv for _, tv in run] for run in runs), strict=True))
        online.loglog(counts, [statistics.mean(c) for c in columns], color=color, linewidth=2, label=labels[name])
        online.fill_between(counts, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15)
    _dress(
        online,
        "Online gradients too, if the entropy's is whole\nQEMPO-KL, 8 x 8 answers a step; band: range over seeds",
        "answers sampled",
        "total variation to the closed form",
        legend="lower left",
    )
    gaps = results["temperature"]["four tokens"]
    lines = {"E r - β CE, what RLHF is after": ("objective", "#0072B2"), "reward alone": ("reward", "#D55E00")}
    for label, (name, color) in lines.items():
        temperature.plot(gaps["entropy"], gaps[name], color=color, linewidth=2, label=label)
    for setting in (0.6, 0.8, 1.0, 1.5, 2.0):
        i = gaps["temperature"].index(setting)
        temperature.plot(gaps["entropy"][i], gaps["objective"][i], "o", color="#0072B2", markersize=5)
        temperature.annotate(
            f"T = {setting:g}", (gaps["entropy"][i], gaps["objective"][i]), xytext=(0, 8) if setting <= 1 else (6, -14),
            textcoords="offset points", fontsize=9, color="0.35", ha="center" if setting <= 1 else "left",
        )  # fmt: skip
    temperature.axhline(0, color="0.4", linewidth=1, linestyle=":")
    _dress(
        temperature,
        "H-DPO is not DPO at a temperature T\nanswers of four tokens; H-DPO minus tempered DPO at its entropy",
        "entropy, nats",
        "H-DPO is ahead by",
        legend="lower center",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _dress(axes, title: str, x: str, y: str, legend: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False, fontsize=9, loc=legend)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="major")

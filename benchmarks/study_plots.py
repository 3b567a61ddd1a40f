"""Pictures of the studies."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: a machine that trains may have no display

import matplotlib.pyplot as plt

from entropy_po.evaluation.metrics import bootstrap_interval
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


RUNS = {
    "rlhf": "RLHF",
    "qempo-kl": "QEMPO-KL, mu from above",
    "qempo-kl from mu 1": "QEMPO-KL, mu from 1",
    "qempo from below": "QEMPO, lam from below",
    "qempo from above": "QEMPO, lam from above",
}


def transformer_figure(m, path: Path) -> None:
    """Four panels: pass@k by alpha, entropy by alpha, coverage against a temperature, online runs."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    by_k, by_alpha, coverage, online = axes.flat
    alphas = m.alphas()
    shades = plt.get_cmap("coolwarm")([i / (len(alphas) - 1) for i in range(len(alphas))])
    ks = [2**i for i in range(8) if 2**i <= m.samples]
    for alpha, color in zip(alphas, shades, strict=True):
        values = [statistics.mean(m.passes(f"hdpo {alpha}", k)) for k in ks]
        by_k.plot(ks, values, color="black" if alpha == 1 else color, linewidth=1.9, label=f"alpha {alpha:g}")
    by_k.plot(ks, [statistics.mean(m.passes("sft", k)) for k in ks], color="0.5", linestyle=":", label="before")
    by_k.set_xscale("log", base=2)
    by_k.set_xticks(ks, [str(k) for k in ks])
    _dress(by_k, "One right answer among k, at temperature 1", "k", "pass@k", legend="upper left")
    for prefix, color, label in (("hdpo ", "#0072B2", "at the end"), ("early hdpo ", "#D55E00", "after few steps")):
        found = m.alphas(prefix)
        values = [m.by_seed(f"{prefix}{a}", "entropy") for a in found]
        by_alpha.plot(found, [statistics.mean(v) for v in values], "o-", color=color, label=label, linewidth=1.9)
        for a, v in zip(found, values, strict=True):
            by_alpha.plot([a] * len(v), v, ".", color=color, alpha=0.5)
    by_alpha.axhline(statistics.mean(m.at_one("sft", "entropy")), color="0.5", linestyle=":", label="before")
    _dress(by_alpha, "Entropy at temperature 1; dots: seeds", "alpha", "entropy of an answer, nats", legend="best")
    k = max(x for x in ks if x <= 64)
    temperatures = [float(t) for t in next(iter(m.seeds.values()))["hdpo 1.0"]["measured"]]
    lines = {
        "H-DPO at temperature 1, by alpha": ([(a, m.passes(f"hdpo {a}", k, hard=True)) for a in alphas], "#0072B2"),
        "DPO, by temperature": ([(t, m.passes("hdpo 1.0", k, t, hard=True)) for t in temperatures], "#D55E00"),
    }
    for label, (points, color) in lines.items():
        xs, values = zip(*points, strict=True)
        means = [statistics.mean(v) for v in values]
        bars = [bootstrap_interval(v) for v in values]
        errors = [[max(y - low, 0) for y, (low, _) in zip(means, bars, strict=True)]]
        errors.append([max(high - y, 0) for y, (_, high) in zip(means, bars, strict=True)])
        coverage.errorbar(xs, means, yerr=errors, fmt="o-", color=color, label=label, linewidth=1.9, elinewidth=1)
    _dress(
        coverage,
        "Coverage of the harder half of the prompts\nbars: 95 % over prompts",
        "alpha, or temperature",
        f"pass@{k}",
        legend="upper left",
    )
    coverage.margins(y=0.25)
    for (unit, label), color in zip(RUNS.items(), COLORS, strict=False):
        rewards, entropies = m.late(unit, "reward"), m.late(unit, "entropy/sequence")
        rewards = [reward - target for reward, target in zip(rewards, m.late("rlhf", "reward"), strict=True)]
        online.plot(rewards, entropies, "o", color=color, markersize=8, label=label, alpha=0.85)
    _dress(
        online,
        "Online: entropy at the same reward\nmeans over the last third of training; a dot per seed",
        "mean reward - R, RLHF's",
        "entropy of an answer, nats",
        legend="upper left",
    )
    online.axvspan(-0.02, 0.02, color="0.6", alpha=0.15)
    online.set_xlim(-0.05, 0.03)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def dual_figure(
    runs: dict[str, list[list[dict]]], targets: dict[str, list[float]], path: Path, reward_range: tuple[float, float]
) -> None:
    """reward, entropy, lam and mu over the steps: label -> a training curve per seed.

    `targets` has each seed's R and K, keys "reward" and "kl": reward is drawn as its distance to R, within `reward_range`.
    """
    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained", sharex=True)
    keys = ("reward", "kl", "lam", "entropy/sequence", "length", "mu")
    panels = dict(zip(keys, axes.flat, strict=True))
    for (label, curves), color in zip(runs.items(), COLORS, strict=False):
        for i, curve in enumerate(curves):
            for key, axis in panels.items():
                rows = [row for row in curve if key in row]
                if not rows or (key == "mu" and not label.startswith("QEMPO-KL")):
                    continue
                values = [row[key] for row in rows]
                if key == "reward":
                    values = [value - targets["reward"][i] for value in values]
                elif key == "kl":
                    values = [value / targets["kl"][i] for value in values]
                name = label if i == 0 and key == "reward" else None
                axis.plot(
                    [row["step"] for row in rows],
                    _running_mean(values),
                    color=color,
                    linewidth=1.3,
                    alpha=0.8,
                    label=name,
                )
    panels["reward"].axhspan(-0.02, 0.02, color="0.6", alpha=0.25)
    panels["reward"].set_ylim(*reward_range)
    panels["kl"].axhline(1, color="0.4", linewidth=1, linestyle=":")
    panels["lam"].set_yscale("log")
    panels["mu"].set_yscale("log")
    dressing = {
        "reward": ("Reward, as its distance to R\nband: 2 % each way", "mean reward - R"),
        "kl": ("KL; QEMPO-KL alone has the budget K", "KL / K"),
        "lam": ("lam, the price of reward", "lam"),
        "entropy/sequence": ("Entropy", "entropy of an answer, nats"),
        "length": ("Length", "tokens"),
        "mu": ("mu, the price of KL", "mu"),
    }
    for key, axis in panels.items():
        axis.set_title(dressing[key][0], loc="left", fontsize=10.5)
        axis.set(xlabel="optimiser step", ylabel=dressing[key][1])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, which="major")
    figure.legend(loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _running_mean(values: list[float], width: int = 5) -> list[float]:
    """Over the latest points, fewer at the start."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]

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
        values = [m.at_one(f"{prefix}{a}", "entropy") for a in found]
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
        legend="best",
    )
    names = {"rlhf": "RLHF", "qempo-kl": "QEMPO-KL, K x 1.25", "qempo from below": "QEMPO, lam from below"}
    names["qempo from above"] = "QEMPO, lam from above"
    for (unit, label), color in zip(names.items(), COLORS, strict=False):
        rewards, entropies = m.late(unit, "reward"), m.late(unit, "entropy/sequence")
        online.plot(rewards, entropies, "o", color=color, markersize=8, label=label, alpha=0.85)
    _dress(
        online,
        "Online: more entropy at the same reward\nmeans over the last third; a dot per seed",
        "mean reward",
        "entropy of an answer, nats",
        legend="best",
    )
    online.margins(0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def dual_figure(m, path: Path) -> None:
    """reward, entropy, lam and mu over the steps, one line a run, all seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.4), layout="constrained", sharex=True)
    panels = dict(zip(("reward", "entropy/sequence", "lam", "mu"), axes.flat, strict=True))
    names = {"rlhf": "RLHF", "qempo-kl": "QEMPO-KL", "qempo from below": "QEMPO, lam from below"}
    names["qempo from above"] = "QEMPO, lam from above"
    for (unit, label), color in zip(names.items(), COLORS, strict=False):
        for i, found in enumerate(m.seeds.values()):
            for key, axis in panels.items():
                rows = [row for row in found[unit]["curve"] if key in row]
                if rows and not (key == "mu" and unit != "qempo-kl"):
                    steps, values = [row["step"] for row in rows], [row[key] for row in rows]
                    axis.plot(steps, values, color=color, linewidth=1.5, alpha=0.85, label=label if i == 0 else None)
    for i, target in enumerate(m.late("rlhf", "reward")):
        panels["reward"].axhspan(
            target - 0.02, target + 0.02, color="0.6", alpha=0.25, label=None if i else "R, 2 % each way"
        )
    panels["lam"].set_yscale("log")
    labels = {"reward": "mean reward", "entropy/sequence": "entropy of an answer, nats", "lam": "lam", "mu": "mu"}
    titles = {"reward": "Reward is brought to R from either side", "entropy/sequence": "Entropy"}
    titles |= {"lam": "lam, the price of reward", "mu": "mu, the price of KL"}
    for key, axis in panels.items():
        _dress(axis, titles[key], "optimiser step", labels[key], legend="best")
    figure.savefig(path, dpi=110)
    plt.close(figure)

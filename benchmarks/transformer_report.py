"""From the transformer study's measurements to its claims, tables and pictures."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

from benchmarks.study_plots import dual_figure, transformer_figure
from entropy_po.evaluation.metrics import bootstrap_interval, paired_interval, pass_at_k

HARD = 0.5  # share of the prompts, those that the untrained model is right on least often
ONLINE = ("rlhf", "qempo-kl", "qempo from below", "qempo from above")
TOLERANCE = 0.02  # of the reward's range, which is 1


class Measured:
    """Reads the units of all seeds: per-prompt numbers pooled over seeds, one value per prompt and seed."""

    def __init__(self, results: dict):
        self.seeds, self.samples = results["seeds"], results["size"]["samples"]

    def alphas(self, prefix: str = "hdpo ") -> list[float]:
        names = next(iter(self.seeds.values()))
        return sorted(float(name.removeprefix(prefix)) for name in names if name.startswith(prefix))

    def passes(self, unit: str, k: int, temperature: float = 1.0, hard: bool = False) -> list[float]:
        """pass@k of every prompt and seed."""
        values = []
        for found in self.seeds.values():
            right = found[unit]["measured"][str(temperature)]["right"]
            base = found["sft"]["measured"]["1.0"]["right"]
            order = sorted(range(len(base)), key=base.__getitem__)
            keep = order[: max(1, round(HARD * len(order)))] if hard else order
            values += [pass_at_k(self.samples, right[i], k) for i in sorted(keep)]
        return values

    def at_one(self, unit: str, key: str) -> list[float]:
        """entropy, kl or length at temperature 1, one per seed."""
        return [found[unit]["measured"]["1.0"][key] for found in self.seeds.values()]

    def late(self, unit: str, key: str) -> list[float]:
        """Mean over the last third of the training curve, one per seed."""
        means = []
        for found in self.seeds.values():
            rows = found[unit]["curve"]
            means.append(statistics.mean(row[key] for row in rows[len(rows) * 2 // 3 :]))
        return means


def write(results: dict, folder: Path) -> str:
    """transformer.{json,md,png} and dual.{md,png}; the text of both pages."""
    measured = Measured(results)
    (folder / "transformer.json").write_text(json.dumps(results) + "\n")
    page, dual = transformer_page(results, measured), dual_page(measured)
    (folder / "transformer.md").write_text(page, encoding="utf-8")
    (folder / "dual.md").write_text(dual, encoding="utf-8")
    transformer_figure(measured, folder / "transformer.png")
    dual_figure(measured, folder / "dual.png")
    return f"{page}\n{dual}"


def transformer_page(results: dict, m: Measured) -> str:
    size, alphas = results["size"], m.alphas()
    temperatures = [float(t) for t in next(iter(m.seeds.values()))["hdpo 1.0"]["measured"]]
    seconds = sum(unit["seconds"] for found in m.seeds.values() for unit in found.values())
    ks = [k for k in (1, 4, 16, 64, 128) if k <= m.samples]
    lines = [
        "# Transformer study: a task with many right answers",
        "",
        f"`{results['command']}`: {len(m.seeds)} seed{'s' if len(m.seeds) > 1 else ''}, {seconds / 60:.0f} minutes beside "
        f"the supervised start; {size['offline']} offline steps of 64 pairs, {size['online']} online steps of 16 x 8 answers, "
        f"{size['prompts']} held-out prompts x {size['samples']} answers. Brackets: 95 % bootstrap intervals over prompts.",
        "",
        "![Transformer study](transformer.png)",
        "",
        "| claim | verdict | figure |",
        "|---|---|---|",
        *claims(m, alphas, temperatures, ks),
        "",
        "H-DPO at temperature 1:",
        "",
        "| alpha | " + " | ".join(f"pass@{k}" for k in ks) + " | different right answers | entropy | KL | length |",
        "|---|" + "---|" * (len(ks) + 4),
    ]
    for name, unit in [("before", "sft"), *((f"{a:g}", f"hdpo {a}") for a in alphas)]:
        cells = [f"{statistics.mean(m.passes(unit, k)):.3f}" for k in ks]
        cells.append(
            f"{statistics.mean(x for f in m.seeds.values() for x in f[unit]['measured']['1.0']['different']):.1f}"
        )
        cells += [f"{statistics.mean(m.at_one(unit, key)):.2f}" for key in ("entropy", "kl", "length")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "After few steps, the same at temperature 1:",
        "",
        "| alpha | pass@1 | entropy | KL |",
        "|---|---|---|---|",
    ]
    for a in m.alphas("early hdpo "):
        unit = f"early hdpo {a}"
        kl, entropy = (statistics.mean(m.at_one(unit, key)) for key in ("kl", "entropy"))
        lines.append(f"| {a:g} | {statistics.mean(m.passes(unit, 1)):.3f} | {entropy:.2f} | {kl:.3f} |")
    return "\n".join(lines) + "\n"


def claims(m: Measured, alphas: list[float], temperatures: list[float], ks: list[int]) -> list[str]:
    """The papers' claims with what this run says to them."""
    rows = []

    def add(claim: str, holds: bool | None, figure: str) -> None:
        verdict = {True: "reproduced", False: "not reproduced", None: "not resolved here"}[holds]
        rows.append(f"| {claim} | {verdict} | {figure} |")

    entropies = [statistics.mean(m.at_one(f"hdpo {a}", "entropy")) for a in alphas]
    rising = all(low < high for low, high in itertools.pairwise(entropies))
    add(
        "entropy at temperature 1 rises with alpha",
        rising,
        ", ".join(f"{a:g}: {e:.2f}" for a, e in zip(alphas, entropies, strict=True)),
    )
    early = m.alphas("early hdpo ")
    starts = [statistics.mean(m.at_one(f"early hdpo {a}", "entropy")) for a in early]
    text = ", ".join(f"{a:g}: {e:.2f}" for a, e in zip(early, starts, strict=True))
    before = statistics.mean(m.at_one("sft", "entropy"))
    add(
        "... and does so after few steps",
        all(x < y for x, y in itertools.pairwise(starts)),
        f"{text}; before: {before:.2f}",
    )
    low, high = (m.passes(f"hdpo {a}", 1) for a in (alphas[0], alphas[-1]))
    add(
        "lower alpha raises pass@1 at temperature 1", *_compared(low, high, f"alpha {alphas[0]:g} minus {alphas[-1]:g}")
    )
    k = 64 if 64 in ks else ks[-1]
    best = max(temperatures, key=lambda t: statistics.mean(m.passes("hdpo 1.0", k, t, hard=True)))
    below = max((a for a in alphas if a < 1), key=lambda a: statistics.mean(m.passes(f"hdpo {a}", k, hard=True)))
    tempered, sharp = m.passes("hdpo 1.0", k, best, hard=True), m.passes(f"hdpo {below}", k, hard=True)
    add(
        f"on hard prompts some alpha < 1 at temperature 1 beats DPO at its best temperature in pass@{k}",
        *_compared(sharp, tempered, f"alpha {below:g} minus DPO at temperature {best:g}"),
    )
    largest, dpo = (m.passes(f"hdpo {a}", ks[-1], hard=True) for a in (alphas[-1], 1.0))
    add(
        f"larger alpha wins at k = {ks[-1]}, on hard prompts",
        *_compared(largest, dpo, f"alpha {alphas[-1]:g} minus DPO"),
    )
    reward, entropy = ({unit: m.late(unit, key) for unit in ONLINE} for key in ("reward", "entropy/sequence"))
    for unit in ONLINE[1:]:
        same = all(abs(a - b) <= TOLERANCE for a, b in zip(reward[unit], reward["rlhf"], strict=True))
        more = all(a > b for a, b in zip(entropy[unit], entropy["rlhf"], strict=True))
        figure = (
            f"reward {_mean(reward[unit])} against {_mean(reward['rlhf'])}, entropy {_mean(entropy[unit])} against "
        )
        add(f"{unit}: more entropy than RLHF at its reward", more if same else None, figure + _mean(entropy["rlhf"]))
    return rows


def dual_page(m: Measured) -> str:
    """Whether the controller holds its targets, over the last third of training."""
    lines = [
        "# Dual ascent over training",
        "",
        "![lam, mu, reward and entropy over training](dual.png)",
        "",
        "R is the measured RLHF run's mean reward over its last third, K 1.25 times its KL. Means over the last third:",
        "",
        "| run | seed | R | reward | within 2 % of the range | KL | lam, first and last | mu, last | entropy | length |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for i, (seed, found) in enumerate(m.seeds.items()):
        target = m.late("rlhf", "reward")[i]
        for unit in ONLINE:
            reward, kl, entropy, length = (
                m.late(unit, key)[i] for key in ("reward", "kl", "entropy/sequence", "length")
            )
            rows = found[unit]["curve"]
            lam = f"{rows[0]['lam']:.3g}, {rows[-1]['lam']:.3g}" if "lam" in rows[0] else "-"
            mu = f"{rows[-1]['mu']:.3g}" if "mu" in rows[0] else "-"
            held = "-" if unit == "rlhf" else "yes" if abs(reward - target) <= TOLERANCE else "no"
            lines.append(
                f"| {unit} | {seed} | {target:.3f} | {reward:.3f} | {held} | {kl:.2f} | {lam} | {mu} | {entropy:.2f} | {length:.1f} |"
            )
    verdicts = [
        f"- seed {seed}, {unit}: {found[unit]['verdict']}" for seed, found in m.seeds.items() for unit in ONLINE[1:]
    ]
    return "\n".join(
        [*lines, "", "What the controller itself said at the end (its window: 20 updates):", "", *verdicts, ""]
    )


SURPRISES = """Seen on the way here, with other settings than those above:

- With a ten times larger `lam_lr` lam winds up while the policy is still learning: reward meets R, and entropy is gone.
- A start at five times the lam that holds R does the same, and what was lost does not come back within the run.
- With a reward that hardly any answer earns, and lam from 2, entropy wins at once: no answer with a reward is left, and no
  lam could bring one back. The controller says so (infeasible at lam_max)."""


def _compared(values: list[float], others: list[float], what: str) -> tuple[bool | None, str]:
    """(more, less or None where the interval holds 0; the figure), paired by prompt."""
    low, high = paired_interval(values, others)
    difference = statistics.mean(values) - statistics.mean(others)
    verdict = True if low > 0 else False if high < 0 else None
    return verdict, f"{what}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}"


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high)."""
    return (statistics.mean(values), *bootstrap_interval(values))

"""The papers' claims on a real model and real prompts: `python -m benchmarks.model_study`, resumable.

SmolLM2-135M-Instruct writes texts under checkable constraints (entropy_po/demo/tasks.py; reward: the share of them met).
A LoRA adapter on its frozen bf16 weights is trained

* offline, as in the demo, on its committed pairs: H-DPO at three alphas, and QEMPO,
* online: RLHF, and with lam (and mu) moved to hold RLHF's own reward: QEMPO, from RLHF's weight on log pi and from a tenth of
  it, and QEMPO-KL, within 1.25 times RLHF's KL.

All answer the same held-out prompts, whose kinds of constraint no training prompt has. Every unit of work leaves a file
under runs/model_study, and is skipped where that file exists. Writes benchmarks/results/studies/model.{json,md,png} and model-dual.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from benchmarks.report import RESULTS
from benchmarks.study_plots import dual_figure
from benchmarks.units import unit
from entropy_po.demo import run as demo
from entropy_po.demo.tasks import constraints_met, heldout_tasks, prompt_rows, quality, train_tasks
from entropy_po.evaluation.cli import markdown
from entropy_po.evaluation.embedding import MINILM, load_embedder
from entropy_po.evaluation.evaluate import evaluate
from entropy_po.evaluation.metrics import paired_interval
from entropy_po.evaluation.plots import entropy_change, quality_change, quality_diversity
from entropy_po.models import SMOLLM2, load_model, load_tokenizer
from entropy_po.trainer import OnlineConfig, OnlineTrainer
from entropy_po.trainer.data import load_rows

FOLDER = RESULTS / "studies"
RUNS = Path("runs/model_study")
ONLINE_BETA = 0.005  # an answer has some hundred nats, a reward one unit
FULL = {"steps": 48, "prompts_per_step": 4, "answers_per_prompt": 8, "new_tokens": 64, "heldout": 64, "samples": 8}
QUICK = {"steps": 2, "prompts_per_step": 1, "answers_per_prompt": 2, "new_tokens": 8, "heldout": 2, "samples": 2}
START, RLHF = "start", "online: RLHF"
QEMPO, QEMPO_HIGH, QEMPO_KL = "online: QEMPO, lam from 200", "online: QEMPO, lam from 2000", "online: QEMPO-KL"
AT_RLHFS_REWARD = {  # min_reward is added to RLHF's reward, max_kl multiplies its KL
    QEMPO: {"method": "qempo", "lam": 1 / ONLINE_BETA},
    QEMPO_HIGH: {"method": "qempo", "lam": 10 / ONLINE_BETA},
    QEMPO_KL: {"method": "qempo_kl", "lam": 11 / ONLINE_BETA, "mu": 10.0, "max_kl": 1.25},
}


def train_offline(name: str, tokenizer, folder: Path, sizes: demo.Sizes):
    pairs = load_rows(demo.DATA / "pairs.jsonl")[: sizes.steps * sizes.pairs_per_step]
    return demo.train(load_model(SMOLLM2, dtype="bfloat16"), tokenizer, pairs, name, folder, sizes)[0], {}


def train_online(options: dict, tokenizer, folder: Path, size: dict):
    args = OnlineConfig(
        output_dir=str(folder), **options, lora_r=16, learning_rate=3e-4, lr_scheduler_type="constant", max_steps=size["steps"],
        per_device_train_batch_size=size["prompts_per_step"], num_generations=size["answers_per_prompt"],
        max_completion_length=size["new_tokens"], report_kl=True, logging_steps=1, save_strategy="no", report_to="none", seed=0,
    )  # fmt: skip
    model = load_model(SMOLLM2, dtype="bfloat16")
    trainer = OnlineTrainer(model, args, prompt_rows(train_tasks()), None, constraints_met, tokenizer)
    trainer.train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keep = ("step", *LATE)
    curve = [{k: float(f"{row[k]:.5g}") for k in keep if k in row} for row in rows if "reward" in row]
    return trainer.model, {"curve": curve, "verdict": trainer.ascent.verdict() if trainer.ascent else None}


class Study:
    """The models one after another; what is measured of each is made once."""

    def __init__(self, folder: Path, quick: bool):
        self.folder, self.size = folder, QUICK if quick else FULL
        self.demo_sizes = demo.QUICK if quick else demo.FULL
        self.tokenizer, self.reference = load_tokenizer(SMOLLM2), load_model(SMOLLM2, dtype="bfloat16")
        self.embed = load_embedder(MINILM)
        folder.mkdir(parents=True, exist_ok=True)

    def unit(self, name: str, make: Callable[[Path], tuple]) -> dict:
        """The unit's row and curve."""
        folder = self.folder_of(name)
        folder.mkdir(parents=True, exist_ok=True)

        def found() -> dict:
            gc.collect()  # a trainer's cycles hold the model before
            torch.manual_seed(0)
            model, more = make(folder)
            return {"row": self.measured(model, name), **more}

        return unit(folder / "unit.json", name, found)

    def measured(self, model, name: str) -> dict:
        tasks = heldout_tasks()[: self.size["heldout"]]
        found, _ = evaluate(
            model,
            self.tokenizer,
            [task.prompt for task in tasks],
            quality=lambda i, text: quality(tasks[i], text),
            answers_per_prompt=self.size["samples"],
            max_new_tokens=self.size["new_tokens"],
            label=name,
            embed=self.embed,
            reference=self.reference,
        )
        return {**found.row(), "pair_accuracy": None}

    def run(self) -> dict[str, dict]:
        found = {START: self.unit(START, lambda folder: (self.reference, {}))}
        for name in demo.RUNS:
            make = partial(train_offline, name, self.tokenizer, sizes=self.demo_sizes)
            found[f"offline: {name}"] = self.unit(f"offline: {name}", make)
        rlhf = {"method": "rlhf", "beta": ONLINE_BETA}
        found[RLHF] = self.unit(RLHF, partial(train_online, rlhf, self.tokenizer, size=self.size))
        horizon = self.size["steps"] // 2
        duals = {"min_reward": 0.0, "relative_to": str(self.folder_of(RLHF))}
        if self.size is QUICK:  # whose KL is noise, and may be negative
            duals = {"min_reward": 0.5}
        duals |= {"dual_horizon": horizon, "dual_warmup": max(1, horizon // 5)}
        for name, options in AT_RLHFS_REWARD.items():
            found[name] = self.unit(name, partial(train_online, {**options, **duals}, self.tokenizer, size=self.size))
        return found

    def folder_of(self, name: str) -> Path:
        return self.folder / "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


def page(found: dict[str, dict], size: dict) -> str:
    rows = {name: unit["row"] for name, unit in found.items()}
    start, rlhf = rows[START], rows[RLHF]
    offline = {name.removeprefix("offline: "): row for name, row in rows.items() if name.startswith("offline: ")}
    claims = [("online, RLHF raises quality", "more", QUALITY, rlhf, start)]
    for name in AT_RLHFS_REWARD:
        claims += [
            (f"{name}: raises quality", "more", QUALITY, rows[name], start),
            ("holds RLHF's quality", "held", QUALITY, rows[name], rlhf),
            ("has more entropy than RLHF, per token", "more", ENTROPY, rows[name], rlhf),
            ("the same per answer", "more", ANSWER_ENTROPY, rows[name], rlhf),
        ]
    claims.append(
        ("H-DPO with alpha 1.2 has more entropy than with 0.8", "more", ENTROPY, offline["H-DPO alpha 1.2"], offline["H-DPO alpha 0.8"])
    )  # fmt: skip
    for name, row in offline.items():
        claims.append((f"offline, {name} holds the start's quality", "held", QUALITY, row, start))
        claims.append(("and has more entropy than the start, per token", "more", ENTROPY, row, start))
    lines = [
        "# H-DPO and QEMPO on SmolLM2-135M-Instruct",
        "",
        f"`python -m benchmarks.model_study`. Online: {size['steps']} steps of {size['prompts_per_step']} prompts x "
        f"{size['answers_per_prompt']} answers of at most {size['new_tokens']} tokens, RLHF with beta {ONLINE_BETA}; offline: the demo's runs. "
        f"Measured on {size['heldout']} held-out prompts x {size['samples']} answers at temperature 1. One training seed.",
        "",
        markdown(rows),
        "## Claim by claim",
        "",
        "Differences with their 95 % intervals over prompts, paired by prompt. An interval that holds 0 settles nothing about more "
        "or less; quality is called held where it does not lie below 0.",
        "",
        "| claim | difference | |",
        "|---|---:|---|",
        *(_verdict(*claim) for claim in claims),
        "",
        "![Quality against diversity](model.png)",
        "",
        "## The multipliers",
        "",
        "Means over the last third of training, on training prompts. R is RLHF's reward there, K 1.25 times its KL.",
        "",
        f"| run | {' | '.join(LATE.values())} | the controller says |",
        f"|---|{'---:|' * len(LATE)}---|",
        *(_late_row(name, found[name]) for name in (RLHF, *AT_RLHFS_REWARD)),
        "",
        "![lam, mu, reward and entropy over training](model-dual.png)",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _answer_entropy(row: dict) -> list[float]:
    pairs = zip(row["entropy_by_prompt"], row["draws_by_prompt"], strict=True)
    return [entropy * draws / row["answers_per_prompt"] for entropy, draws in pairs]


# what is compared: (its value in a row, the interval of its difference between two rows)
QUALITY = (lambda row: row["quality"], quality_change)
ENTROPY = (lambda row: row["entropy_per_token"], entropy_change)
ANSWER_ENTROPY = (
    lambda row: row["entropy_per_sequence"],
    lambda row, base: paired_interval(_answer_entropy(row), _answer_entropy(base)),
)


def _verdict(claim: str, kind: str, compared: tuple[Callable, Callable], row: dict, base: dict) -> str:
    value, change = compared
    low, high = change(row, base)
    if kind == "held":
        verdict = "held" if high >= 0 else "not held"
    else:
        verdict = "reproduced" if low > 0 else "the opposite" if high < 0 else "not settled"
    return f"| {claim} | {value(row) - value(base):+.3f} [{low:+.3f}, {high:+.3f}] | {verdict} |"


LATE = {
    "reward": "reward", "kl": "KL, nats/answer", "entropy": "entropy, nats/token", "entropy/sequence": "entropy, nats/answer",
    "length": "length, tokens", "lam": "lam", "mu": "mu",
}  # fmt: skip


def _late(curve: list[dict]) -> dict[str, float]:
    """Means over the last third of training."""
    rows = curve[len(curve) * 2 // 3 :]
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _late_row(name: str, unit: dict) -> str:
    late = _late(unit["curve"])
    cells = [f"{late[key]:.4g}" if key in late else "-" for key in LATE]
    return f"| {name} | {' | '.join(cells)} | {unit['verdict'] or '-'} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and samples: does it run, not what it shows")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where units of work leave their files")
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    study = Study(arguments.runs, arguments.quick)
    found = study.run()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    text = page(found, study.size)
    (arguments.output_dir / "model.json").write_text(json.dumps(found) + "\n")
    (arguments.output_dir / "model.md").write_text(text, encoding="utf-8")
    quality_diversity({name: unit["row"] for name, unit in found.items()}, arguments.output_dir / "model.png")
    curves = {name.removeprefix("online: "): [found[name]["curve"]] for name in (RLHF, *AT_RLHFS_REWARD)}
    late = _late(found[RLHF]["curve"])
    targets = {"reward": [late["reward"]], "kl": [1.25 * late["kl"]]}
    dual_figure(curves, targets, arguments.output_dir / "model-dual.png", reward_range=(-0.35, 0.1))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

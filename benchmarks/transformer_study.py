"""The papers' claims on a small transformer trained from scratch: `python -m benchmarks.transformer_study`, resumable.

The task has many right answers: write digits 1 to 9 whose 1st, 3rd, 5th ... sum to one number and whose 2nd, 4th ... to
another, without one forbidden digit. Online, the reward tells how close both sums come: where hardly any sample is right, a
reward for right answers alone leaves a policy that has once lost its way without a direction, at any lam.
A model of 0.1 M parameters learns it from examples half of which are wrong (`sft`), and is then trained further

* offline, on pairs of its own right and wrong answers: H-DPO with alpha 0.7 to 1.3, after few steps and after many,
* online: RLHF, and at RLHF's own reward QEMPO, from a lam below and one above the right
  one, and QEMPO-KL with RLHF's KL and a quarter more, from a mu on RLHF's side and from one far on the other.

Everything goes through PreferenceTrainer and OnlineTrainer. Held-out prompts are answered 256 times at each of several
temperatures. Every unit of work leaves a file under runs/transformer_study, and is skipped where that file exists.
Writes benchmarks/results/studies/transformer.{json,md,png} and dual.{md,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import tokenizers
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.report import RESULTS
from benchmarks.units import unit
from entropy_po.answers import Answers
from entropy_po.ops.linear_token_stats import linear_token_stats
from entropy_po.trainer import EntropyPOConfig, OnlineConfig, OnlineTrainer, PreferenceTrainer
from entropy_po.trainer.data import pad_rows
from entropy_po.trainer.generation import TransformersGeneration

FOLDER = RESULTS / "studies"
RUNS = Path("runs/transformer_study")
PAD, EOS, LONGEST = 0, 1, 12
ALPHAS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
EARLY_ALPHAS = (0.7, 1.0, 1.3)
TEMPERATURES = (0.5, 0.7, 1.0, 1.3)
BETA, ONLINE_BETA = 0.1, 0.02
SEEDS = (0, 1, 2)
FULL = {"sft": 1000, "early": 20, "offline": 60, "online": 400, "samples": 256, "prompts": 48, "pairs": 256}
QUICK = {"sft": 60, "early": 2, "offline": 4, "online": 6, "samples": 128, "prompts": 6, "pairs": 8}


# ---- the task ----


Task = tuple[int, int, int]  # sum of the odd places, sum of the even ones, forbidden digit


def all_tasks() -> list[Task]:
    """In an order of their own."""
    tasks = [(a, b, digit) for a in range(8, 21) for b in range(8, 21) for digit in range(1, 10) if abs(a - b) < 6]
    random.Random("tasks").shuffle(tasks)
    return tasks


def prompt_text(task: Task) -> str:
    a, b, digit = task
    return f"sum {a // 10} {a % 10} {b // 10} {b % 10} without {digit} :"


def score(task: Task, text: str) -> float:
    """1 for a right answer; else how close both sums come, halved by the forbidden digit, 0 for what is no row of digits."""
    a, b, forbidden = task
    words = text.split()
    if not words or not all(word.isdigit() and word != "0" for word in words):
        return 0.0
    digits = [int(word) for word in words]
    close = [max(0.0, 1 - abs(sum(part) - want) / want) for part, want in ((digits[0::2], a), (digits[1::2], b))]
    return sum(close) / 2 * (0.5 if forbidden in digits else 1.0)


def is_right(task: Task, text: str) -> bool:
    return score(task, text) == 1.0


def closeness(completions, task, **_) -> list[float]:
    """The reward, with the signature of TRL's."""
    return [score(tuple(t), text) for t, text in zip(task, completions, strict=True)]


def parts(total: int, count: int, allowed: list[int], rng: random.Random) -> list[int] | None:
    """`count` allowed digits that sum to `total`, if a few draws find some."""
    for _ in range(20):
        digits = [rng.choice(allowed) for _ in range(count - 1)]
        if total - sum(digits) in allowed:
            return [*digits, total - sum(digits)]
    return None


def example(task: Task, rng: random.Random) -> list[int]:
    """An answer's digits to learn from: half of them keep to the rules, half are a digit off."""
    a, b, forbidden = task
    allowed = [d for d in range(1, 10) if d != forbidden]
    while True:
        length = rng.randint(2, LONGEST - 1)
        odd, even = parts(a, (length + 1) // 2, allowed, rng), parts(b, length // 2, allowed, rng)
        if odd and even:
            break
    digits = [odd[i // 2] if i % 2 == 0 else even[i // 2] for i in range(length)]
    if rng.random() < 0.5:
        digits[rng.randrange(length)] = rng.randint(1, 9)
    return digits


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "sum", "without", ":", *map(str, range(10))]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


TASKS, TOKENIZER = all_tasks(), make_tokenizer()
TRAIN, HELDOUT, WORDS = TASKS[:512], TASKS[512:], TOKENIZER.get_vocab()


def ids_of(task: Task) -> list[int]:
    return [WORDS[word] for word in prompt_text(task).split()]


# ---- training ----


def train_sft(steps: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = []
        for task in rng.choices(TASKS[:-64], k=128):  # all but the ones that are measured
            head = ids_of(task)
            answer = [WORDS[str(digit)] for digit in example(task, rng)]
            rows.append((np.array([*head, *answer, EOS]), len(head)))
        loss = model(**pad_rows(rows, PAD)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def sample(model, tasks, num: int, temperature: float, seed: int) -> list[list[int]]:
    generation = TransformersGeneration([EOS], PAD, LONGEST, temperature, 4096)
    return generation(model, [ids_of(task) for task in tasks], num, seed)


def make_pairs(model, per_prompt: int, seed: int) -> list[dict]:
    """Right and wrong answers of the model itself, as many pairs as there are of both, at most half of the samples."""
    pairs = []
    answers = sample(model, TRAIN, per_prompt, 1.0, seed)
    for i, task in enumerate(TRAIN):
        texts = TOKENIZER.batch_decode(answers[i * per_prompt : (i + 1) * per_prompt], skip_special_tokens=True)
        good, bad = [t for t in texts if is_right(task, t)], [t for t in texts if t and not is_right(task, t)]
        pairs += [{"prompt": prompt_text(task), "chosen": " " + g, "rejected": " " + b} for g, b in zip(good, bad)]  # noqa: B905
    random.Random(seed).shuffle(pairs)
    return pairs


def common(folder: Path, steps: int, seed: int) -> dict:
    return {
        "output_dir": str(folder), "max_steps": steps, "seed": seed, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "lr_scheduler_type": "constant", "logging_steps": 5, "check_head": False,
    }  # fmt: skip


def train_offline(model, pairs: list[dict], alpha: float, steps: int, folder: Path, seed: int):
    args = EntropyPOConfig(
        method="hdpo", beta=BETA, alpha=alpha, learning_rate=3e-4, per_device_train_batch_size=64,
        **common(folder, steps, seed),
    )  # fmt: skip
    trainer = PreferenceTrainer(model, args, pairs, processing_class=TOKENIZER)
    trainer.train()
    return trainer.model


def train_online(model, options: dict, steps: int, folder: Path, seed: int) -> tuple:
    args = OnlineConfig(
        learning_rate=1e-3, per_device_train_batch_size=16, num_generations=8, max_completion_length=LONGEST, report_kl=True,
        **options, **common(folder, steps, seed),
    )  # fmt: skip
    rows = [{"prompt": prompt_text(task), "task": list(task)} for task in TRAIN]
    trainer = OnlineTrainer(model, args, rows, None, closeness, TOKENIZER)
    trainer.train()
    return trainer.model, None if trainer.ascent is None else trainer.ascent.verdict()


# ---- measuring ----


def measure(model, reference, size: dict, seed: int, temperatures=TEMPERATURES) -> dict:
    """Per temperature, by prompt: right answers, different right answers; at temperature 1 entropy, KL and length too."""
    tasks, num, found = HELDOUT[-size["prompts"] :], size["samples"], {}
    for temperature in temperatures:
        answers = sample(model, tasks, num, temperature, seed)
        texts = TOKENIZER.batch_decode(answers, skip_special_tokens=True)
        groups = [texts[i * num : (i + 1) * num] for i in range(len(tasks))]
        hits = [[t for t in group if is_right(task, t)] for task, group in zip(tasks, groups, strict=True)]
        row = {"right": [len(h) for h in hits], "different": [len(set(h)) for h in hits]}
        if temperature == 1.0:
            few = min(num, 32)  # of each prompt's answers: means over prompts need no more
            chosen = [(task, answers[i * num + j]) for i, task in enumerate(tasks) for j in range(few)]
            logps, entropy = answer_stats(model, chosen)
            lengths = torch.tensor([float(len(answer)) for _, answer in chosen])
            sums = {"entropy": entropy, "kl": logps - answer_stats(reference, chosen)[0], "length": lengths}
            row |= {name: by_prompt(values, few) for name, values in sums.items()}
        found[str(temperature)] = row
    return found


def by_prompt(values: torch.Tensor, count: int) -> list[float]:
    """Mean over every `count` values, five digits."""
    return [float(f"{x:.5g}") for x in values.double().view(-1, count).mean(1).tolist()]


@torch.no_grad()
def answer_stats(model, chosen) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, entropies) [S] of answers, nats."""
    heads = [(ids_of(task), answer) for task, answer in chosen]
    rows = [(np.array([*head, *answer]), len(head)) for head, answer in heads]
    answers = Answers.of(model.eval(), pad_rows(rows, PAD))
    stats = linear_token_stats(answers.hidden_states, answers.head.weight, answers.labels)
    lengths = answers.cu_seqlens.diff()
    return tuple(torch.segment_reduce(x, "sum", lengths=lengths) for x in (stats.logps, stats.entropy))


# ---- the units of work ----


class Study:
    """One seed's models and measurements; each is made once."""

    def __init__(self, folder: Path, size: dict, seed: int):
        self.folder, self.size, self.seed = folder / f"seed-{seed}", size, seed
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "sft" / "config.json").exists():
            train_sft(size["sft"], seed).save_pretrained(self.folder / "sft")
        self.reference = self.fresh()
        pairs = self.folder / "pairs.json"
        if not pairs.exists():
            pairs.write_text(json.dumps(make_pairs(self.reference, size["pairs"], seed)))
        self.pairs = json.loads(pairs.read_text())

    def fresh(self) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.folder / "sft").eval()

    def unit(self, name: str, make) -> dict:
        return unit(self.folder / f"{name}.json", f"seed {self.seed}, {name}", make)

    def offline(self, alpha: float, steps: int, temperatures) -> dict:
        def make() -> dict:
            folder = self.folder / f"hdpo-{alpha}-{steps}"
            model = train_offline(self.fresh(), self.pairs, alpha, steps, folder, self.seed)
            return {"measured": measure(model, self.reference, self.size, self.seed, temperatures)}

        return self.unit(f"hdpo-{alpha}-{steps}", make)

    def online(self, name: str, options: dict) -> dict:
        def make() -> dict:
            folder = self.folder / name
            model, verdict = train_online(self.fresh(), options, self.size["online"], folder, self.seed)
            curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            keep = ("step", "reward", "entropy/sequence", "entropy", "kl", "lam", "mu", "length")
            curve = [{k: float(f"{row[k]:.5g}") for k in keep if k in row} for row in curve if "reward" in row]
            measured = measure(model, self.reference, self.size, self.seed)
            return {"measured": measured, "curve": curve, "verdict": verdict}

        return self.unit(name, make)

    def run(self) -> dict:
        size = self.size
        found = {
            "sft": self.unit(
                "measured-sft", lambda: {"measured": measure(self.reference, self.reference, size, self.seed)}
            )
        }
        found["rlhf"] = self.online("rlhf", {"method": "rlhf", "beta": ONLINE_BETA})
        target = {"relative_to": str(self.folder / "rlhf"), "min_reward": 0.0}
        found["qempo from below"] = self.online("qempo-below", {"method": "qempo", "lam": 40.0, **target})
        found["qempo from above"] = self.online("qempo-above", {"method": "qempo", "lam": 160.0, **target})
        # From RLHF's side, where mu is large and KL within its budget, and from the other.
        budget = {"method": "qempo_kl", "max_kl": 1.25, **target}
        found["qempo-kl"] = self.online("qempo-kl", {"lam": 550.0, "mu": 10.0, **budget})
        found["qempo-kl from mu 1"] = self.online("qempo-kl-mu1", {"lam": 100.0, "mu": 1.0, **budget})
        for alpha in ALPHAS:
            found[f"hdpo {alpha}"] = self.offline(alpha, size["offline"], TEMPERATURES)
        for alpha in EARLY_ALPHAS:
            found[f"early hdpo {alpha}"] = self.offline(alpha, size["early"], (1.0,))
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and samples: does it run, not what it shows")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=RUNS, help="where units of work leave their files")
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    size = QUICK if arguments.quick else FULL
    found = {str(seed): Study(arguments.runs, size, seed).run() for seed in arguments.seeds}
    from benchmarks.transformer_report import write

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print(
        write({"command": "python -m benchmarks.transformer_study", "size": size, "seeds": found}, arguments.output_dir)
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A DPO step of SmolLM2-135M through TRL, as it is and accelerated: `python -m benchmarks.trl_step`.

One step is `trl.DPOTrainer`'s own: reference forward, policy forward, loss, metrics, backward, on this package's demo pairs; then
AdamW. Beside it `HDPOTrainer` at alpha 1, which is the same loss. Wanted: 1.4 times the speed, and the loss to 1e-4, on two
CPU cores in bf16. The losses are compared after a few steps of training, where policy and reference differ, with that of the same
bf16 hidden states and head whose logits are made in fp64.
`--write` writes benchmarks/results/cpu/trl_step.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable

import torch

from benchmarks.report import RESULTS
from entropy_po.bench.timing import ratio, spread, time_interleaved

WANTED_RATIO, WANTED_LOSS = 1.4, 1e-4
TRL, ACCELERATED, HDPO = "TRL", "TRL, accelerate_trl()", "HDPOTrainer, alpha 1"


def make_trainers(folder: str, pairs: int, mixed: bool) -> dict:
    """(trainer, batch) by name; one model, and one copy of it as the reference, for all of them."""
    from datasets import Dataset, disable_progress_bars
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    from entropy_po.demo.run import DATA
    from entropy_po.integrations.trl import HDPOConfig, HDPOTrainer
    from entropy_po.models import load_model, load_tokenizer

    logging.set_verbosity_error()
    disable_progress_bars()
    rows = Dataset.from_json(str(DATA / "pairs.jsonl")).select(range(64))
    dtype = "float32" if mixed else "bfloat16"
    model, reference = (load_model("smollm2-135m", dtype=dtype) for _ in range(2))
    trainers = {}
    for name, trainer_class, config_class, more in (
        (TRL, DPOTrainer, DPOConfig, {}),
        (HDPO, HDPOTrainer, HDPOConfig, {"alpha": 1.0}),
    ):
        args = config_class(
            output_dir=folder, per_device_train_batch_size=pairs, bf16=mixed, use_cpu=True, report_to="none", seed=0,
            gradient_checkpointing=False, **more,
        )  # fmt: skip
        trainers[name] = trainer_class(
            model, reference, args, train_dataset=rows, processing_class=load_tokenizer("smollm2-135m")
        )
    trainers[ACCELERATED] = trainers[TRL]
    batch = next(iter(trainers[TRL].get_train_dataloader()))
    return {name: (trainers[name], batch) for name in (TRL, ACCELERATED, HDPO)}


def make_steps(trainers: dict, optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], float]]:
    """Functions of one step each, that give the loss."""
    from entropy_po.integrations.trl import accelerate_trl, restore_trl

    def step(name: str) -> float:
        trainer, batch = trainers[name]
        (accelerate_trl if name == ACCELERATED else restore_trl)()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {name: lambda name=name: step(name) for name in trainers}


@torch.no_grad()
def exact_loss(trainer, batch: dict) -> float:
    """DPO's loss with logits in fp64, of the hidden states that the models give in their own dtype."""
    completion = batch["completion_mask"][:, 1:].bool()
    sums = []
    for model in (trainer.model, trainer.ref_model):
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weight = model.lm_head.weight.double()
        sums.append(torch.zeros(len(completion), dtype=torch.float64))
        for i, kept in enumerate(completion):
            log_p = (hidden[i, :-1][kept].double() @ weight.t()).log_softmax(-1)
            sums[-1][i] = log_p.gather(1, batch["input_ids"][i, 1:][kept][:, None]).sum()
    chosen, rejected = (sums[0] - sums[1]).chunk(2)
    return -torch.nn.functional.logsigmoid(trainer.beta * (chosen - rejected)).mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixed", action="store_true", help="fp32 weights under autocast, not bf16 weights")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings(
        "ignore", "`.*gradient_checkpointing`", FutureWarning
    )  # TRL's name for it, and its use of it
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(folder, options.pairs, options.mixed)
    model, batch = trainers[TRL][0].model, trainers[TRL][1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    steps = make_steps(trainers, optimizer)
    for _ in range(3):
        steps[ACCELERATED]()
    optimizer.param_groups[0]["lr"] = 0.0  # the model stays as it is now
    losses, truth = {name: step() for name, step in steps.items()}, exact_loss(*trainers[TRL])
    seconds = time_interleaved(steps, options.rounds)
    answers, tokens = int(batch["completion_mask"].sum()), int(batch["attention_mask"].numel())
    what = "fp32 weights under bf16 autocast" if options.mixed else "bf16 weights"
    lines = [
        "# A DPO step through TRL on a CPU",
        "",
        f"`python -m benchmarks.trl_step --write{' --mixed' if options.mixed else ''}`: SmolLM2-135M, {options.pairs} pairs of "
        f"{answers} answer tokens in {tokens} positions, {what}, {torch.get_num_threads()} threads, medians of "
        f"{options.rounds} interleaved rounds. Wanted: {WANTED_RATIO} times TRL's speed, the loss to {WANTED_LOSS:g} of {truth:.6f}, "
        "which the same hidden states give with logits in fp64.",
        "",
        "| | ms | spread | times as fast | loss | off by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, values in seconds.items():
        lines.append(
            f"| {name} | {1e3 * statistics.median(values):.0f} | {spread(values):.2f} | {ratio(seconds[TRL], values):.2f} "
            f"| {losses[name]:.6f} | {abs(losses[name] - truth):.1e} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        (RESULTS / "cpu" / "trl_step.md").write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

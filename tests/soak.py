"""Many calls and steps in one process, memory and open files watched: `python tests/soak.py`. Prints one JSON object."""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import TrainerCallback

from entropy_po import EntropyObjective, linear_preference_loss, linear_token_stats, sequence_loss, token_stats
from entropy_po.memory import held_bytes

CALLS, STEPS = 2000, 500


def reading() -> tuple[int, int]:
    """(bytes held, open files)."""
    return held_bytes(), len(os.listdir("/proc/self/fd"))


def one_call(number: int, weight: torch.Tensor) -> None:
    """Forward and backward of one operator, of another than the last and at another size."""
    n = 2 + number % 61
    hidden, labels = torch.randn(n, 64, requires_grad=True), torch.randint(3000, (n,))
    offsets, strategy = torch.tensor([0, n // 2, n]), ("auto", "deferred", "recompute")[number % 3]
    objective = EntropyObjective.qempo(lam=10.0)
    match number % 4:
        case 0:
            loss = linear_token_stats(hidden, weight, labels).logps.sum()
        case 1:
            loss = linear_preference_loss(hidden, weight, labels, offsets, objective=objective, strategy=strategy).loss
        case 2:
            loss = sequence_loss(hidden, weight, labels, offsets, lambda batch: batch.logps.sum()).loss
        case 3:
            loss = token_stats(hidden @ weight.t(), labels).entropy.sum()
    loss.backward()
    weight.grad = None


def operators() -> dict:
    weight, marks = torch.randn(3000, 64, requires_grad=True), []
    for number in range(1, CALLS + 1):
        one_call(number, weight)
        if number in (CALLS // 4, CALLS):
            marks.append(reading())
    return {"calls": CALLS, "bytes": marks[1][0] - marks[0][0], "files": marks[1][1] - marks[0][1]}


def training() -> dict:
    from test_trainer import make_model, make_rows, make_trainer

    marks = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (STEPS // 4, STEPS):
                marks.append(reading())

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, make_rows(16), make_model(), max_steps=STEPS, logging_steps=10, per_device_train_batch_size=2)  # fmt: skip
        trainer.add_callback(Watch)
        trainer.train()
        steps = trainer.state.global_step
    return {"steps": steps, "bytes": marks[1][0] - marks[0][0], "files": marks[1][1] - marks[0][1]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps({"operators": operators(), "training": training()}))

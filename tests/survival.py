"""A training run killed at random moments, over and over: `python tests/survival.py KILLS [SEED]`.

Each kill is a SIGKILL. After it, the newest complete checkpoint is resumed, until the run gets to its end; its weights and its
rows must then be, bit for bit, those of a run that nobody killed. Runs are forked from a process that has imported everything
and computed nothing, so that fifty kills take a minute or two.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_trainer import make_model, make_rows, make_trainer

from entropy_po.trainer.checkpoints import last_checkpoint

STEPS = 12


def train(folder: Path) -> None:
    """From the newest complete checkpoint, if there is one, to the end; then done.json, with the weights' sum of bits."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resume = True
    try:
        last_checkpoint(folder)
    except ValueError:
        resume = False
    trainer = make_trainer(
        folder, make_rows(8), make_model(), max_steps=STEPS, logging_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=3, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train(resume)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    bits = weights.view(torch.int32).long()
    done = {"weights": [int(bits.sum()), int((bits * torch.arange(len(bits))).sum())]}
    (folder / "done.tmp").write_text(json.dumps(done))
    (folder / "done.tmp").rename(folder / "done.json")


def forked(folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        train(folder)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """Its exit status, or None if it is still there after that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def outcome(folder: Path) -> tuple[list[int], list[tuple[int, float]]]:
    """The weights' bits, and (step, loss) of every row."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "done.json").read_text())["weights"], [
        (r["step"], r["loss"]) for r in rows if "loss" in r
    ]


def check_status(status: int | None, folder: Path) -> None:
    if status not in (None, 0):
        raise SystemExit(f"a run ended with status {status}: {(folder / 'output.txt').read_text()[-3000:]}")


def main(kills: int, seed: int) -> None:
    chance, killed, runs = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        reference = Path(name, "reference")
        reference.mkdir()
        start = time.monotonic()
        check_status(wait(forked(reference), 600), reference)
        seconds, expected = time.monotonic() - start, outcome(reference)
        assert [step for step, _ in expected[1]] == list(range(1, STEPS + 1))
        while killed < kills:
            runs += 1
            folder = Path(name, f"run-{runs}")
            folder.mkdir()
            while not (folder / "done.json").exists():
                child = forked(folder)
                status = wait(child, chance.uniform(0, 1.6) * seconds if killed < kills else 600)
                check_status(status, folder)
                if status is None:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    killed += 1
            assert outcome(folder) == expected, f"{folder.name}, seed {seed}: {outcome(folder)} instead of {expected}"
    print(f"{killed} kills, {runs} runs ended as one that nobody killed ({STEPS} steps, {seconds:.1f} s)")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)

"""What is left of a training run that was killed, and how much memory a long one takes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from test_trainer import final_weights, make_trainer  # noqa: E402

from entropy_po.trainer.checkpoints import checkpoint_fault, last_checkpoint  # noqa: E402
from entropy_po.trainer.safety import only_run_in  # noqa: E402

STEPS = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1}


class At(transformers.TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def test_an_interrupt_ends_the_step_saves_it_and_can_be_resumed(tmp_path, capfd):
    whole = make_trainer(tmp_path / "whole", **STEPS)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **STEPS)
    stopped.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3; resume_from_checkpoint goes on from"):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopping when this step is done" in capfd.readouterr().err
    assert last_checkpoint(tmp_path / "stopped").endswith("checkpoint-3")
    resumed = make_trainer(tmp_path / "stopped", **STEPS)
    resumed.train(True)
    assert torch.equal(final_weights(whole), final_weights(resumed))


def test_a_second_interrupt_stops_at_once(tmp_path):
    trainer = make_trainer(tmp_path, **STEPS)
    trainer.add_callback(At(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2 and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_batch(value, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    trainer = make_trainer(tmp_path, **STEPS)
    compute_loss = trainer.compute_loss

    def broken(model, inputs, *args, **kwargs):
        return compute_loss(model, inputs, *args, **kwargs) * (value if trainer.state.global_step == 2 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(
        FloatingPointError, match=rf"the loss of step 3 is {value}; its batch is in .*no weight has changed"
    ):
        trainer.train()
    assert trainer.state.global_step == 2 and final_weights(trainer).isfinite().all()
    (kept,) = tmp_path.glob("nonfinite-step-3-*.safetensors")
    batch = load_file(kept)
    assert batch["input_ids"].shape == batch["labels"].shape and len(batch["input_ids"]) == 4


def test_two_runs_in_one_folder_are_refused_and_one_after_the_other_is_not(tmp_path):
    with (
        only_run_in(tmp_path),
        pytest.raises(ValueError, match=rf"another run .process {os.getpid()}. is writing there"),
    ):
        make_trainer(tmp_path, **STEPS).train()
    for _ in range(2):
        make_trainer(tmp_path, **{**STEPS, "max_steps": 1}).train()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_full_disk_costs_no_older_checkpoint(tmp_path):
    """No file may grow past some kilobytes: the weights of the next checkpoint cannot be written."""
    save = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **STEPS, **save)
    whole.train()
    code = (
        "import resource, signal, sys; sys.path.insert(0, 'tests'); import test_survival as t\n"
        "def full(): signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"trainer = t.make_trainer({str(tmp_path / 'full')!r}, **t.STEPS, **{save!r})\n"
        "trainer.add_callback(t.At(3, full)); trainer.train()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr[-2000:]
    assert checkpoint_fault(tmp_path / "full" / "checkpoint-4") is not None
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete"):
        assert last_checkpoint(tmp_path / "full").endswith("checkpoint-2")
    resumed = make_trainer(tmp_path / "full", **STEPS, **save)
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete"):
        resumed.train(True)
    assert torch.equal(final_weights(whole), final_weights(resumed))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fifty_kills_and_every_resume_is_exact(seed):
    done = subprocess.run(
        [sys.executable, HERE / "survival.py", "50", str(seed)], capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert int(done.stdout.split()[0]) >= 50, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_stay_level():
    done = subprocess.run([sys.executable, HERE / "soak.py"], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["operators"]["calls"] == 2000 and found["training"]["steps"] == 500
    for name, part in found.items():
        assert part["bytes"] <= 4 << 20, (
            f"{name}: {part}"
        )  # of 1500 calls and 375 steps: less than 3 KiB and 11 KiB each
        assert part["files"] == 0, f"{name}: {part}"

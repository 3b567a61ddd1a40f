"""What keeps a run's work: one run to a folder, Ctrl-C at the end of a step, and a stop at a loss that is no number."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from entropy_po.trainer.checkpoints import last_checkpoint

LOCK_FILE = ".running"


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """No second run writes to the folder meanwhile. The lock goes with its process, however that ends.

    Raises:
        ValueError: another process is training there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, LOCK_FILE), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"output_dir={str(folder)!r}: another run (process {file.read().strip() or 'unknown'}) is writing there; give "
                "this one a folder of its own."
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class StopAfterStep(TrainerCallback):
    """The first Ctrl-C lets the step end and saves it; the second stops at once. For one process in its main thread: several
    would stop at different steps."""

    def __init__(self, trainer):
        self.trainer, self.asked = trainer, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        alone = self.trainer.args.world_size == 1 and threading.current_thread() is threading.main_thread()
        if not alone:
            yield
            return
        self.asked = False
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.asked:
            step, folder = self.trainer.state.global_step, self.trainer.args.output_dir
            raise KeyboardInterrupt(f"stopped after step {step}; resume_from_checkpoint goes on from {folder}")

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping when this step is done and saved; once more to stop at once", file=sys.stderr, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked and self.trainer.resumable_after(state.global_step):
            control.should_save = control.should_training_stop = True


@contextmanager
def naming_lost_ranks(trainer) -> Iterator[None]:
    """What a collective says when a rank is gone, in words: who is left, at which step, and where to go on from.

    Raises:
        ConnectionError: a collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, with the file of its own that they come from
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        args, step = trainer.args, trainer.state.global_step
        try:
            remedy = f"resume_from_checkpoint goes on from {last_checkpoint(args.output_dir)}"
        except ValueError:
            remedy = f"no checkpoint is in {args.output_dir} yet"
        raise ConnectionError(
            f"rank {args.process_index} of {args.world_size} lost another one after step {step}, whose own output says why; "
            f"{remedy} ({str(error).splitlines()[0]})"
        ) from error


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that readers see whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, scratch, metadata=metadata)
    os.replace(scratch, path)


def check_finite(loss: Tensor, inputs: dict, step: int, folder: str | Path, rank: int = 0) -> None:
    """Before the optimiser has used its gradient: the weights are still those of the last step.

    Raises:
        FloatingPointError: the loss is NaN or infinite. The batch's tensors then lie in `folder`.
    """
    if torch.isfinite(loss):
        return
    path = Path(folder, f"nonfinite-step-{step}-rank-{rank}.safetensors")
    save_whole(path, {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)})
    raise FloatingPointError(
        f"the loss of step {step} is {loss.item()}; its batch is in {path}, and no weight has changed since step {step - 1}. "
        "A lower learning_rate or max_grad_norm, or fp32 instead of fp16, is the usual remedy; a damaged example the other."
    )

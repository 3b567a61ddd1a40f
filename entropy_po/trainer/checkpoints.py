"""Which checkpoint folders were written to their end (transformers takes the highest number), and lam and mu in them."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from entropy_po.dual import DualAscent

DUAL_FILE = "dual.json"


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Complete or not, the newest first."""
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda p: -int(p.name.split("-")[-1]))


def last_checkpoint(output_dir: str | Path) -> str:
    """The newest complete checkpoint; one sentence of warning for newer ones that are not.

    Raises:
        ValueError: there is none.
    """
    for folder in checkpoints_in(output_dir):
        fault = checkpoint_fault(folder)
        if fault is None:
            return str(folder)
        warnings.warn(f"{folder} is incomplete ({fault}) and is not resumed from.", stacklevel=2)
    raise ValueError(f"resume_from_checkpoint: {output_dir} has no complete checkpoint; start without it.")


def checkpoint_fault(folder: Path) -> str | None:
    """What is missing from a checkpoint folder, or None. The Trainer writes trainer_state.json last, and `begin_checkpoint` has
    taken that of an earlier run away."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return "no such folder"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except ValueError:
        return "trainer_state.json is cut off"
    # the last: of ZeRO-3, which need not write a whole model
    kinds = ("model", "adapter_model", "pytorch_model", "global_step")
    weights = [p for p in folder.iterdir() if p.name.startswith(kinds)]
    if not weights:
        return "its weights are missing"
    for index in folder.glob("*.safetensors.index.json"):
        for name in set(json.loads(index.read_text())["weight_map"].values()):
            if not (folder / name).exists():
                return f"{name} is missing"
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{path.name} is cut off"
    return None


def begin_checkpoint(folder: Path) -> None:
    """Before anything is written to it: another run's may lie there, and a mixture of two must not pass for whole."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)


if TYPE_CHECKING:
    from transformers import Trainer as _OfTrainer
else:
    _OfTrainer = object


class SavesAscent(_OfTrainer):
    """For a Trainer with an `ascent`: lam and mu lie beside the weights, in dual.json, and come back with them."""

    ascent: DualAscent | None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.ascent is not None and self.args.should_save:
            path = Path(output_dir or str(self.args.output_dir)) / DUAL_FILE
            path.write_text(json.dumps(self.ascent.state()) + "\n", encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Where all engines pass when they resume; DeepSpeed loads weights by a way of its own."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ascent is None or checkpoint is None:
            return
        path = Path(checkpoint) / DUAL_FILE
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: {path} is missing, for lam and mu stayed in that run; resume without min_reward and "
                "max_kl, or start from its model."
            )
        self.ascent.load_state(json.loads(path.read_text(encoding="utf-8")))

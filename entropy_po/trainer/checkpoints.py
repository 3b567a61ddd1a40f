"""Which checkpoint folders were written to their end. transformers takes the highest number, whatever is in it."""

import json
import warnings
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(output_dir: str | Path) -> str:
    """The newest complete checkpoint; one sentence of warning for newer ones that are not.

    Raises:
        ValueError: there is none.
    """
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda p: -int(p.name.split("-")[-1])):
        fault = checkpoint_fault(folder)
        if fault is None:
            return str(folder)
        warnings.warn(f"{folder} is incomplete ({fault}) and is not resumed from.", stacklevel=2)
    raise ValueError(f"resume_from_checkpoint: {output_dir} has no complete checkpoint; start without it.")


def checkpoint_fault(folder: Path) -> str | None:
    """What is missing from a checkpoint folder, or None. The Trainer writes trainer_state.json last."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return "no such folder"
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except ValueError:
        return "trainer_state.json is cut off"
    weights = [p for p in folder.iterdir() if p.name.startswith(("model", "adapter_model", "pytorch_model"))]
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

"""What a run shows and leaves behind: one progress bar, and metrics.jsonl in the output folder."""

import json
import math
import os
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

METRICS_FILE = "metrics.jsonl"
_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "reward": "reward"}
_SHOWN |= {"entropy": "entropy", "lam": "lam"}


class MetricsFile(TrainerCallback):
    """Appends each logged row as a JSON object with its step to `output_dir/metrics.jsonl`, flushed at once.

    A resumed run drops the rows after the step it resumes from, which it will write again; a fresh run moves the file
    of an earlier one to `metrics.jsonl.old`.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / METRICS_FILE
        if not state.is_world_process_zero or not path.exists():
            return
        if state.global_step == 0:
            os.replace(path, path.with_name(path.name + ".old"))
            return
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= state.global_step]
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text("".join(line + "\n" for line in kept))
        os.replace(scratch, path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        # JSON has no NaN: a reader of the file should not fail on the row that shows the failure.
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in logs.items()}
        path = Path(args.output_dir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **row}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # the half row of a run that was killed


class EpochOrder(TrainerCallback):
    """Tells a sampler that is not transformers' own its epoch, however deep it lies: in a run of several ranks that is resumed within
    an epoch nobody else does, and that epoch's order would be the first one's."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        layer = train_dataloader
        while layer is not None:
            if hasattr(layer, "set_epoch"):
                layer.set_epoch(int(state.epoch or 0))
            layer = getattr(layer, "batch_sampler", None) or getattr(layer, "sampler", None)


class QuietProgress(ProgressCallback):
    """The Trainer's bar with the few numbers worth watching behind it, instead of a printed dict per row."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            shown = {label: f"{logs[name]:.3g}" for name, label in _SHOWN.items() if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)

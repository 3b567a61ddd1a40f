"""What the trainers share: a model whose head is checked, quiet metrics, sums kept on the device, safe resuming."""

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from entropy_po.heads import check_head
from entropy_po.memory import peak_bytes
from entropy_po.trainer.callbacks import MetricsFile, QuietProgress
from entropy_po.trainer.checkpoints import begin_checkpoint, checkpoint_fault, checkpoints_in, last_checkpoint
from entropy_po.trainer.config import ADAPTER_RATE, TrainingConfig
from entropy_po.trainer.safety import StopAfterStep, check_finite, naming_lost_ranks, only_run_in


class HeadTrainer(Trainer):
    """A Trainer whose loss is the sum over a whole optimiser step's items over their number, made by the fused head."""

    args: TrainingConfig
    model: nn.Module

    def __init__(self, **kwargs):
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics: it reads logits, and none are made; metrics of your own go into a callback."
            )
        super().__init__(**kwargs)
        if self.args.n_gpu > 1:
            raise ValueError("several GPUs in one process are not supported; start the same command with torchrun.")
        # `compute_loss` divides by the items of the whole step itself, so the Trainer must not divide again: transformers asks the
        # first of these, before it had that one the second.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(QuietProgress)
        self.pop_callback(PrinterCallback)
        self.add_callback(MetricsFile)
        self._stop = StopAfterStep(self)
        self.add_callback(self._stop)
        self._sums: dict[str, Tensor] = {}
        self._window_start = time.perf_counter()
        if self.args.check_head:
            check_head(self.model)

    # ---- loss ----

    def _with_router_loss(self, model: nn.Module, total: Tensor, aux_loss: Tensor | None, num_items: int) -> Tensor:
        """The sum of the items' losses plus, of a mixture of experts, its router loss once per item."""
        if aux_loss is None:
            return total
        coefficient = self.accelerator.unwrap_model(model).config.get_text_config().router_aux_loss_coef
        return total + num_items * coefficient * aux_loss.to(total.device)

    def _over_items(self, total: Tensor, num_items: int, num_items_in_batch) -> Tensor:
        """The batch's part of the step's mean; the batch's own mean where the step's items are not counted."""
        if num_items_in_batch is None:
            return total / max(num_items, 1)
        # Data parallelism averages gradients over ranks, and the count is that of all ranks.
        return total * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        """As Trainer.training_step, which looks at every loss too, but to leave a NaN out of its mean.

        Raises:
            FloatingPointError: the loss is no finite number.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        check_finite(loss, inputs, self.state.global_step + 1, self._folder, self.args.process_index)
        return loss

    # ---- metrics ----

    def _add_sums(self, key: str, totals: Sequence[Tensor]) -> None:
        """Add to the sums of "train" or "eval", on the device: reading them every step would wait for it."""
        stacked = torch.stack([total.detach().float() for total in totals])
        self._sums[key] = self._sums[key] + stacked if key in self._sums else stacked

    def _take_sums(self, key: str, names: Sequence[str]) -> dict[str, float]:
        """The sums since the last call, over all ranks; the one place that waits for the device."""
        sums = self._sums.pop(key, None)
        if sums is None:
            return {}
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        return dict(zip(names, sums.tolist(), strict=True))

    def _drain(self, key: str) -> dict[str, float]:
        """The metrics of the sums since the last call; "tokens" is how many went through the model."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last row to the Trainer's own."""
        if "loss" in logs:
            metrics = self._drain("train")
            metrics.pop("loss", None)  # the Trainer's own is the mean over steps
            now = time.perf_counter()
            metrics["tokens_per_second"] = metrics.pop("tokens", 0) / max(now - self._window_start, 1e-9)
            self._window_start = now
            logs = {**logs, **metrics, "peak_memory_mib": peak_bytes() / 2**20}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's loop, with our metrics under its prefix, and its time kept out of the training speed."""
        start = time.perf_counter()
        self._sums.pop("eval", None)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        metrics = self._drain("eval")
        metrics.pop("tokens", None)
        assert output.metrics is not None
        output.metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._window_start += time.perf_counter() - start
        return output

    # ---- checkpoints ----

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))  # transformers has put its default in the place of None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; under FSDP a finished model is written whole, also where checkpoints are shards."""
        if _internal_call and output_dir is not None and self.args.should_save:
            begin_checkpoint(Path(output_dir))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and not _internal_call and "FULL" not in str(plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers.Trainer.train, and a checkpoint that was not written to its end is never resumed from.

        Raises:
            ValueError: the checkpoint is incomplete, True was given and there is no complete one, or another run is writing
                to output_dir.
            FloatingPointError: a loss that is no finite number; the batch is kept.
            ConnectionError: another rank has ended; the message says where this one can go on.
            KeyboardInterrupt: after Ctrl-C, when the step that ran is saved.
        """
        if isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint = last_checkpoint(self._folder) if resume_from_checkpoint else None
        elif resume_from_checkpoint is not None and (missing := checkpoint_fault(Path(resume_from_checkpoint))):
            raise ValueError(
                f"resume_from_checkpoint: {resume_from_checkpoint} is incomplete ({missing}); use another one."
            )
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given to train; this trainer was made to evaluate.")
        if resume_from_checkpoint is None and self.args.process_index == 0:
            earlier = next(
                (folder for folder in checkpoints_in(self._folder) if checkpoint_fault(folder) is None), None
            )
            if earlier is not None:
                warnings.warn(
                    f"{earlier} is of an earlier run, and resume_from_checkpoint=True would go on from it; move it away.",
                    stacklevel=2,
                )
        self._sums.clear()
        self._window_start = time.perf_counter()
        alone = only_run_in(self._folder) if self.args.process_index == 0 else nullcontext()
        with alone, self._stop.listening(), naming_lost_ranks(self):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def resumable_after(self, step: int) -> bool:
        """Whether a run can go on from a checkpoint of this step."""
        return True


def load_parts(model: Any, args: TrainingConfig, processing_class: Any, peft_config: Any) -> tuple[nn.Module, Any]:
    """(the model to train, with an adapter where one is asked for; its tokenizer), both loaded where they are names."""
    if isinstance(model, str | os.PathLike):
        from entropy_po.models import load_model

        model = load_model(model, dtype=torch.float32)
    if processing_class is None:
        from entropy_po.models import load_tokenizer

        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not name:
            raise ValueError(
                "processing_class must be given: the model has no name that its tokenizer could be found by."
            )
        processing_class = load_tokenizer(name)
    return _prepare_model(model, args, peft_config), processing_class


def pad_id(tokenizer) -> int:
    """Ids only: the model reads no padding, so any id serves."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _prepare_model(model: Any, args: TrainingConfig, peft_config: Any) -> nn.Module:
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name, value in list(vars(module).items()):  # of torch.nn.functional.dropout, as OPT has it
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
    is_peft = hasattr(model, "disable_adapter")
    asked = "peft_config" if peft_config is not None else "lora_r" if args.lora_r is not None else None
    if is_peft and asked is not None:
        raise ValueError(f"{asked}: the model carries an adapter already; merge it first, or leave {asked} out.")
    if args.has_default_rate and (is_peft or asked is not None):
        args.learning_rate = ADAPTER_RATE
    if peft_config is None and args.lora_r is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha or 2 * args.lora_r,  # type: ignore[arg-type]  # a scale like any other
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )
    if peft_config is None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            remedy = (
                "its adapter is frozen; merge it, or load it by peft with is_trainable=True"
                if is_peft
                else "unfreeze some, or set lora_r for an adapter"
            )
            raise ValueError(f"model: no parameter requires a gradient; {remedy}.")
        return model
    from peft import get_peft_model

    set_seed(args.seed)  # as the Trainer does, but later than an adapter begins
    try:
        with warnings.catch_warnings():
            # peft asks transformers by an attribute's old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(f"lora_target_modules: {str(error).splitlines()[0]}") from error
    if args.gradient_checkpointing:
        model.enable_input_require_grads()  # a frozen embedding would cut the checkpointed layers off the graph
    return model

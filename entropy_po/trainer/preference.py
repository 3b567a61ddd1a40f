"""Offline preference training (H-DPO, DPO, SPL, QEMPO, QEMPO-KL) on transformers.Trainer."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_po.answers import Answers, answer_logps
from entropy_po.objective import EntropyObjective
from entropy_po.ops.linear_preference_loss import PreferenceOutput, linear_preference_loss
from entropy_po.trainer.base import HeadTrainer, load_parts, pad_id
from entropy_po.trainer.config import EntropyPOConfig
from entropy_po.trainer.data import PairCollator, PairDataset, load_rows, tokenize_pairs
from entropy_po.trainer.reference_cache import attach_reference

# Sums over pairs (first) and over tokens, kept on the device between two rows of metrics.
_PER_PAIR = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected", "length/chosen", "length/rejected")  # fmt: skip
_SUMS = (*_PER_PAIR, "pairs", "entropy", "answer_tokens", "tokens")


class PreferenceTrainer(HeadTrainer):
    """Trains a causal language model on pairs, without ever holding the logits.

    The loss is the mean over the pairs of a whole optimiser step, whatever the split into devices, accumulation and
    batches, of

        pair_loss(a * (logps_w - logps_l) - b * (ref_w - ref_l)) + nll_coef * -logps_w / length_w

    with (a, b) from `args.entropy_objective`, plus the router loss of a mixture of experts whose configuration asks
    for `output_router_logits`. Reference log-probs, where b > 0, are computed here once, from the model as it is given
    (under PEFT: without its adapter).

    Args:
        model: causal language model, or a name for `entropy_po.models.load_model`.
        args: the arguments.
        train_dataset, eval_dataset: anything `load_rows` takes, or a PairDataset; eval_dataset also a dict of them.
        processing_class: tokenizer; default the one that belongs to the model's name.
        peft_config: a peft configuration; default a LoraConfig from `args.lora_*` if `args.lora_r` is set.
        kwargs: for transformers.Trainer: callbacks, optimizers and so on.
    Raises:
        ValueError: data or a model that cannot be trained on; the message names what and where.
    Example:
        >>> args = EntropyPOConfig(output_dir="out", method="hdpo", alpha=0.8)         # doctest: +SKIP
        >>> PreferenceTrainer("smollm2-135m", args, "pairs.jsonl").train()             # doctest: +SKIP
    """

    args: EntropyPOConfig
    objective: EntropyObjective
    train_dataset: Any  # of PairDataset, None where there is none
    eval_dataset: Any  # the same, or a dict of them
    data_collator: PairCollator

    def __init__(
        self,
        model: nn.Module | str,
        args: EntropyPOConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        peft_config=None,
        **kwargs,
    ):
        self.objective = args.entropy_objective
        model, processing_class = load_parts(model, args, processing_class, peft_config)
        with _rank_0_first(args):
            prepared = {"train": self._tokenized(train_dataset, "train", "train", processing_class, args)}
            several = isinstance(eval_dataset, dict) and "chosen" not in eval_dataset
            for name, data in (eval_dataset if several else {"eval": eval_dataset}).items():
                prepared[f"eval:{name}"] = self._tokenized(data, "test", name, processing_class, args)
        evals = {name.removeprefix("eval:"): data for name, data in prepared.items() if name != "train"}
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(pad_id(processing_class)),
            train_dataset=prepared["train"],
            eval_dataset=evals if several else evals["eval"],
            processing_class=processing_class,
            **kwargs,
        )
        if self.objective.needs_reference:
            self.train_dataset = self._with_reference(self.train_dataset)
            if several:
                self.eval_dataset = {name: self._with_reference(data) for name, data in self.eval_dataset.items()}
            else:
                self.eval_dataset = self._with_reference(self.eval_dataset)

    # ---- data ----

    @staticmethod
    def _tokenized(source, split: str, label: str, tokenizer, args: EntropyPOConfig) -> PairDataset | None:
        if source is None or isinstance(source, PairDataset):
            return source
        dataset = tokenize_pairs(
            load_rows(source, split),
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            on_overlong=args.on_overlong,
            progress=not args.disable_tqdm and args.process_index == 0,
        )
        if dataset.num_dropped and args.process_index == 0:
            print(
                f"{label}: dropped {dataset.num_dropped} pairs longer than max_length={args.max_length}",
                file=sys.stderr,
            )
        return dataset

    def _with_reference(self, dataset: PairDataset | None) -> PairDataset | None:
        if dataset is None or all(pair.ref_logps is not None for pair in dataset.pairs):
            return dataset
        return attach_reference(
            dataset,
            self.model,
            self._reference_logps,
            folder=Path(self.args.ref_cache_dir or self._folder / "reference_logps").expanduser(),
            batch_size=2 * self.args.per_device_eval_batch_size,
            pad_token_id=self.data_collator.pad_token_id,
            accelerator=self.accelerator,
            settings={"temperature": self.args.temperature, "precision": str(self.accelerator.mixed_precision)},
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )

    def _reference_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            return answer_logps(
                model, batch, temperature=self.args.temperature, workspace_bytes=self.args.workspace_bytes
            )

    # ---- loss ----

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the Trainer's, which under DeepSpeed casts floats to the model's type: ref_logps would become whole nats."""
        prepared = super()._prepare_inputs(inputs)
        if "ref_logps" in inputs:
            prepared["ref_logps"] = inputs["ref_logps"].to(self.args.device)
        return prepared

    def _preferences(
        self, model: nn.Module, inputs: dict[str, Tensor], num_pairs: int
    ) -> tuple[PreferenceOutput, Tensor | None]:
        """Sum of the first pairs' losses, with all that the metrics read; and the router loss."""
        weights = (torch.arange(len(inputs["input_ids"]) // 2) < num_pairs).float()
        with self.accelerator.autocast():
            answers = Answers.of(model, inputs)
            output = answers.loss(
                linear_preference_loss,
                objective=self.objective,
                ref_logps=inputs["ref_logps"] if self.objective.needs_reference else None,
                loss=self.args.loss,
                label_smoothing=self.args.label_smoothing,
                nll_coef=self.args.nll_coef,
                pair_weights=weights.to(inputs["input_ids"].device),
                reduction="sum",
                temperature=self.args.temperature,
                workspace_bytes=self.args.workspace_bytes,
                strategy=self.args.strategy,
            )
        return output, answers.aux_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the losses of this batch's pairs over the pairs of the whole step; their mean where it is unknown."""
        num_pairs = len(inputs["input_ids"]) // 2
        # a training step's batches are fetched together, before the first of them comes here
        num_pairs = inputs.get("num_pairs", num_pairs) if model.training else self._pairs_not_repeated(num_pairs)
        output, aux_loss = self._preferences(model, inputs, num_pairs)
        total = self._with_router_loss(model, output.loss, aux_loss, num_pairs)
        self._accumulate(model.training, inputs, output, total, num_pairs)
        loss = self._over_items(total, num_pairs, num_items_in_batch)
        return (loss, {"margins": output.margins}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Pairs in the whole optimiser step, over accumulation and ranks; each batch is told how many of its own count."""
        if not batch_samples:
            return None
        for batch in batch_samples:
            batch["num_pairs"] = len(batch["input_ids"]) // 2
        batch_samples[-1]["num_pairs"] = self._pairs_not_repeated(batch_samples[-1]["num_pairs"], training=True)
        pairs = torch.tensor(sum(batch["num_pairs"] for batch in batch_samples), device=device)
        return self.accelerator.reduce(pairs, reduction="sum") if self.args.world_size > 1 else pairs

    def _pairs_not_repeated(self, num_pairs: int, training: bool = False) -> int:
        """How many of this rank's pairs count. Ranks take equally many batches of one size, so the last ones are filled up
        with pairs from the beginning, which no loss and no metric must see twice."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader:
            return num_pairs
        remainder = state.remainder
        if training and remainder < 0 and not self.args.dataloader_drop_last:
            # accelerate does not know it of a dataloader that skips the batches before a resumed run's
            remainder = len(self.train_dataset) % (num_pairs * self.args.world_size)
        if remainder <= 0:
            return num_pairs
        return min(max(remainder - self.args.process_index * num_pairs, 0), num_pairs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of one evaluation batch; the metrics gather on the side."""
        inputs = self._prepare_inputs(inputs)
        if self.objective.needs_reference and "ref_logps" not in inputs:
            raise ValueError(
                "eval_dataset: it has no reference log-probs; give it to PreferenceTrainer(eval_dataset=...)."
            )
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    # ---- metrics ----

    @torch.no_grad()
    def _accumulate(self, training: bool, inputs, output: PreferenceOutput, total: Tensor, num_pairs: int) -> None:
        """Add this batch's first pairs to the sums."""
        sides = (output.rewards, output.logps, output.lengths)
        rewards, logps, lengths = (values[:num_pairs].sum(0).unbind() for values in sides)
        margins, entropy = output.margins[:num_pairs], output.entropy[:num_pairs]
        totals = [total, *rewards, margins.sum(), (margins > 0).sum(), *logps, *lengths, margins.new_tensor(num_pairs)]
        totals += [entropy.sum(), output.lengths[:num_pairs].sum(), inputs["attention_mask"][: 2 * num_pairs].sum()]
        self._add_sums("train" if training else "eval", totals)

    def _drain(self, key: str) -> dict[str, float]:
        """Means over the pairs since the last call."""
        values = self._take_sums(key, _SUMS)
        if not values:
            return {}
        metrics = {name: values[name] / values["pairs"] for name in _PER_PAIR}
        metrics["entropy"] = values["entropy"] / max(values["answer_tokens"], 1)
        metrics["tokens"] = values["tokens"]
        return metrics


def _rank_0_first(args: EntropyPOConfig):
    """Rank 0 reads and tokenises before the others, so that a dataset is downloaded once."""
    return args.main_process_first(local=True, desc="preference data")

"""Online training (QEMPO, QEMPO-KL, and every fixed (a, b)) on transformers.Trainer: sample, score, step, move lam and mu."""

import copy
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from entropy_po.answers import Answers, answer_token_logps
from entropy_po.dual import DualAscent
from entropy_po.evaluation.sampling import end_tokens
from entropy_po.heads import evaluation_mode
from entropy_po.objective import EntropyObjective
from entropy_po.ops.sequence_loss import SequenceLossOutput, sequence_loss
from entropy_po.ops.sequences import segment_sums
from entropy_po.trainer.base import HeadTrainer, load_parts, pad_id
from entropy_po.trainer.callbacks import EpochOrder
from entropy_po.trainer.checkpoints import SavesAscent
from entropy_po.trainer.config import OnlineConfig
from entropy_po.trainer.data import Prompt, load_rows, pad_rows, tokenize_prompts
from entropy_po.trainer.generation import Generation, TransformersGeneration, VLLMGeneration
from entropy_po.trainer.rewards import RESERVED, RewardFunction, Rewards
from entropy_po.trainer.rollout import Rollout

_PER_ANSWER = ("reward", "kl", "length", "finished", "entropy/sequence")
_SUMS = (*_PER_ANSWER, "reward_std", "answers", "tokens", "clipped", "units")


class OnlineTrainer(SavesAscent, HeadTrainer):
    """Trains a causal language model on its own answers, for reward with entropy, without ever holding the logits.

    Each batch of prompts is answered `num_generations` times by the policy, scored, and used for `num_iterations` steps on

        E_pi[r] + a H(pi) - b CE(pi, ref),        (a, b) = args.entropy_objective, or of dual ascent's lam and mu

    by the clipped policy gradients of `entropy_po.policy_gradient`: the mean over the step's answers of sums over their
    tokens, with no normalisation by length or by the rewards' spread, which would be another objective. After the first step
    on a batch, lam and mu move by its mean reward and KL (`entropy_po.dual.DualAscent`). The reference is the model as it is
    given: a frozen copy, or under PEFT the model without its adapter; none is held where nothing reads it.

    Args:
        model: causal language model, or a name for `entropy_po.models.load_model`.
        args: the arguments.
        train_dataset, eval_dataset: anything `load_rows` takes, with a column `prompt` (text or messages); the reward
            functions get the other columns.
        reward_funcs: functions or import paths, see `entropy_po.trainer.rewards.Rewards`; default `args.reward_funcs`.
        processing_class: tokenizer; default the one that belongs to the model's name.
        peft_config: a peft configuration; default a LoraConfig from `args.lora_*` if `args.lora_r` is set.
        generation: what samples; default by `args.generation`.
        kwargs: for transformers.Trainer: callbacks, optimizers and so on.
    Raises:
        ValueError: data, rewards or a model that cannot be trained on; the message names what and where.
        ImportError: generation by vLLM where it is not installed, or a reward function that cannot be imported.
    Example:
        >>> args = OnlineConfig(output_dir="out", method="qempo", lam=100.0, min_reward=0.7)         # doctest: +SKIP
        >>> OnlineTrainer("smollm2-135m", args, "prompts.jsonl", reward_funcs=my_reward).train()     # doctest: +SKIP

    Source: arXiv 2602.15894; its own online surrogate could not be read, so this follows from the objective.
    """

    args: OnlineConfig
    train_dataset: Any  # of Prompts, None where there is none
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: nn.Module | str,
        args: OnlineConfig,
        train_dataset=None,
        eval_dataset=None,
        reward_funcs: Sequence[RewardFunction | str] | RewardFunction | str | None = None,
        processing_class=None,
        *,
        peft_config=None,
        generation: Generation | None = None,
        **kwargs,
    ):
        self.rewards = Rewards(args.reward_funcs if reward_funcs is None else reward_funcs, args.reward_weights)
        self.ascent: DualAscent | None = args.dual_ascent()
        model, tokenizer = load_parts(model, args, processing_class, peft_config)

        def prompts(source, split: str) -> list[Prompt] | None:
            rows = None if source is None else load_rows(source, split)
            if not rows:
                return None
            found = tokenize_prompts(rows, tokenizer, max_prompt_length=args.max_prompt_length)
            taken = {name for prompt in found for name in prompt.row} & RESERVED
            if taken:
                raise ValueError(
                    f"{split} data has a column {min(taken)!r}, which is what reward functions are given by the trainer; rename it."
                )
            return found

        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=prompts(train_dataset, "train"),
            eval_dataset=prompts(eval_dataset, "test"),
            processing_class=tokenizer,
            **kwargs,
        )
        self.add_callback(EpochOrder)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "args: a model whose weights are sharded (FSDP, ZeRO-3) cannot answer, since ranks' answers end at different "
                "steps; use DDP or ZeRO-2."
            )
        self.end_ids, self.pad_token_id = end_tokens(self.model, tokenizer), pad_id(tokenizer)
        self.generation = generation or self._generation_by_name(args)
        self.needs_reference = args.report_kl or args.method == "qempo_kl" or self.objective.needs_reference
        self.reference: nn.Module | None = None
        if self.needs_reference and not hasattr(self.model, "disable_adapter"):
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._rollouts: list[dict] = []
        self._generation_seconds = 0.0
        self._warned = False

    @property  # where transformers keeps what a hyperparameter search asks for
    def objective(self) -> EntropyObjective:  # type: ignore[override]
        """The (a, b) that the next samples are weighed with."""
        return self.args.entropy_objective if self.ascent is None else self.ascent.objective

    def _generation_by_name(self, args: OnlineConfig) -> Generation:
        longest, temperature = args.max_completion_length, args.temperature
        if args.generation == "vllm":
            return VLLMGeneration(self.end_ids, longest, temperature, args.vllm_gpu_memory_utilization)
        return TransformersGeneration(self.end_ids, self.pad_token_id, longest, temperature, args.generation_batch_size)

    # ---- samples ----

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        args = self.args
        prompts_per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return RepeatedBlocks(len(dataset), prompts_per_step, args.num_iterations, seed)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device) -> tuple[list, Tensor | None]:
        """The Trainer's hook for one optimiser step's batches: prompts become answers, or the answers are used again."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self.state.global_step % self.args.num_iterations == 0:
            self._rollouts = self._sampled(batches)
        elif not self._rollouts:
            raise ValueError(
                f"the checkpoint is of step {self.state.global_step}, between two uses of the same samples, which are not "
                f"saved; resume from a multiple of num_iterations={self.args.num_iterations}."
            )
        answers = torch.tensor(sum(len(batch["input_ids"]) for batch in self._rollouts), device=device)
        return self._rollouts, self.accelerator.reduce(answers) if self.args.world_size > 1 else answers

    def _sampled(self, batches: Sequence[list[Prompt]]) -> list[dict]:
        """A padded batch of answers, with its `Rollout`, for every batch of prompts."""
        start, args = time.perf_counter(), self.args
        prompts = [prompt for batch in batches for prompt in batch]
        # A function of where the run is: a resumed one draws what an uninterrupted one would have drawn.
        place = f"{args.seed} {self.state.global_step} {args.process_index} {prompts[0].ids}"
        with self.accelerator.autocast():
            answers = self.generation(
                self.accelerator.unwrap_model(self.model),
                [prompt.ids for prompt in prompts],
                args.num_generations,
                random.Random(place).getrandbits(31),
            )
        self._generation_seconds += time.perf_counter() - start
        rewards, parts = self._scored(prompts, answers)
        made, begin = [], 0
        for batch in batches:
            part = slice(begin, begin + len(batch) * args.num_generations)
            made.append(self._padded(batch, answers[part], rewards[part], parts[part]))
            begin = part.stop
        made[-1]["rollout"].last = True
        return made

    def _scored(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(reward [S], each function's [S, F]) of the answers, num_generations to each prompt."""
        texts = self.processing_class.batch_decode(list(answers), skip_special_tokens=True)
        repeated = [prompt for prompt in prompts for _ in range(self.args.num_generations)]
        completions = [
            [{"role": "assistant", "content": text}] if prompt.is_chat else text
            for prompt, text in zip(repeated, texts, strict=True)
        ]
        names = {name for prompt in prompts for name in prompt.row if name != "prompt"}
        columns = {name: [prompt.row.get(name) for prompt in repeated] for name in names}
        questions = [prompt.row["prompt"] for prompt in repeated]
        return self.rewards(questions, completions, list(answers), columns, trainer_state=self.state)

    def _padded(self, prompts: list[Prompt], answers: list[list[int]], rewards: Tensor, parts: Tensor) -> dict:
        args = self.args
        heads = [prompt.ids for prompt in prompts for _ in range(args.num_generations)]
        rows = [(np.array(head + answer), len(head)) for head, answer in zip(heads, answers, strict=True)]
        device = self.accelerator.device
        assert args.epsilon_high is not None  # epsilon in the place of None
        batch: dict[str, Any] = {name: x.to(device) for name, x in pad_rows(rows, self.pad_token_id).items()}
        batch["rollout"] = Rollout(
            objective=self.objective,
            rewards=rewards.to(device),
            parts=parts.to(device),
            finished=torch.tensor([answer[-1] in self.end_ids for answer in answers], device=device),
            group=args.num_generations,
            ref_logps=self._reference_logps(batch) if self.needs_reference else None,
            estimator=args.estimator,
            level=args.importance_sampling_level,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
        )
        return batch

    @torch.no_grad()
    def _reference_logps(self, batch: dict[str, Tensor]) -> Tensor:
        """[n] in nats, of the answers' tokens."""
        model: Any = self.reference
        if model is None:
            model = self.accelerator.unwrap_model(self.model)
        else:
            model.to(self.accelerator.device)  # the Trainer may have placed its own later
        without_adapter = model.disable_adapter() if self.reference is None else nullcontext()
        options = {"temperature": self.args.temperature, "workspace_bytes": self.args.workspace_bytes}
        with evaluation_mode(model), without_adapter, self.accelerator.autocast():
            return answer_token_logps(model, batch, **options)[0]

    # ---- loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of this batch's terms over the answers of the whole step; their mean where that number is unknown."""
        rollout: Rollout = inputs["rollout"]
        is_fresh = rollout.is_fresh
        with self.accelerator.autocast():
            answers = Answers.of(model, inputs)
            outputs, coupled = rollout.outputs, rollout.coupled
            output = answers.loss(
                sequence_loss,
                rollout.loss_fn(len(answers.labels)),
                coupled=coupled,
                outputs=outputs,
                temperature=self.args.temperature,
                workspace_bytes=self.args.workspace_bytes,
                strategy=self.args.strategy,
            )
        num_answers = len(rollout.rewards)
        total = self._with_router_loss(model, output.loss, answers.aux_loss, num_answers)
        self._accumulate("train" if model.training else "eval", inputs, output, is_fresh)
        loss = self._over_items(total, num_answers, num_items_in_batch)
        return (loss, {"logps": output.logps}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        is_fresh = inputs["rollout"].is_fresh
        loss = super().training_step(model, inputs, num_items_in_batch)
        if is_fresh and inputs["rollout"].last and self.ascent is not None:
            self._ascend(self.ascent)
        return loss

    def _ascend(self, ascent: DualAscent) -> None:
        sums = self._take_sums("dual", ("reward", "kl", "answers"))
        kl = sums["kl"] / sums["answers"] if self.needs_reference else None
        ascent.update(sums["reward"] / sums["answers"], kl)
        if ascent.infeasible and not self._warned:
            self._warned = True
            warnings.warn(f"step {self.state.global_step}: {ascent.verdict()}.", stacklevel=2)

    @torch.no_grad()
    def prediction_step(self, model, inputs: Any, prediction_loss_only, ignore_keys=None):
        """Answers to a batch of held-out prompts; minus their mean reward stands for the loss."""
        in_training = self._generation_seconds
        (batch,) = self._sampled([inputs])
        self._generation_seconds = in_training
        self.compute_loss(model, batch)
        return -batch["rollout"].rewards.mean(), None, None

    # ---- metrics ----

    @property
    def _sum_names(self) -> tuple[str, ...]:
        counts = [f"{kind}/{name}" for name in self.rewards.names for kind in ("rewards", "said")]
        return (*_SUMS, *counts)

    @torch.no_grad()
    def _accumulate(self, key: str, inputs: dict, output: SequenceLossOutput, is_fresh: bool) -> None:
        """Add a batch to the sums. What describes the samples is counted at the first step on them, clipping later."""
        rollout: Rollout = inputs["rollout"]
        zero = output.logps.new_zeros(())
        if not is_fresh:
            clipping = {"clipped": rollout.num_clipped, "units": zero + len(rollout.old_logps)}
            clipping["tokens"] = inputs["attention_mask"].sum()
            self._add_sums(key, [clipping.get(name, zero) for name in self._sum_names])
            return
        kl = zero
        if rollout.ref_logps is not None:
            kl = (output.logps - segment_sums(rollout.ref_logps, output.lengths)).sum()
        count = zero + len(rollout.rewards)
        spread = rollout.rewards.view(-1, rollout.group).std(1).mean() * count
        totals = [rollout.rewards.sum(), kl, output.lengths.sum(), rollout.finished.sum(), output.entropy.sum(), spread]
        totals += [count, inputs["attention_mask"].sum(), zero, zero]
        for part in rollout.parts.unbind(1):
            totals += [part.nansum(), (~part.isnan()).sum()]
        self._add_sums(key, totals)
        if key == "train" and self.ascent is not None:
            self._add_sums("dual", [rollout.rewards.sum(), kl, count])

    def _drain(self, key: str) -> dict[str, float]:
        """Means over the answers since the last call."""
        values = self._take_sums(key, self._sum_names)
        metrics = {"tokens": values.get("tokens", 0)}
        if values.get("answers"):
            metrics |= {name: values[name] / values["answers"] for name in (*_PER_ANSWER, "reward_std")}
            metrics["entropy"] = values["entropy/sequence"] / values["length"]
            for name in self.rewards.names:
                metrics[f"rewards/{name}"] = values[f"rewards/{name}"] / max(values[f"said/{name}"], 1)
            if not self.needs_reference:
                del metrics["kl"]
        if values.get("units"):
            metrics["clip_ratio"] = values["clipped"] / values["units"]
        if key == "train":
            metrics |= {"policy_coef": self.objective.policy_coef, "ref_coef": self.objective.ref_coef}
            metrics["generation_seconds"], self._generation_seconds = self._generation_seconds, 0.0
            if self.ascent is not None:
                metrics |= {"lam": self.ascent.lam, "mu": self.ascent.mu, "infeasible": float(self.ascent.infeasible)}
        return metrics

    def resumable_after(self, step: int) -> bool:
        return step % self.args.num_iterations == 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As HeadTrainer.train. Says at the end if the constraints were not met."""
        self._rollouts = []
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        ascent = self.ascent
        if ascent is not None and not (ascent.reward_held and ascent.kl_held) and not self._warned:
            warnings.warn(f"after {self.state.global_step} steps: {ascent.verdict()}.", stacklevel=2)
        return result


class RepeatedBlocks(torch.utils.data.Sampler):
    """Indices in random order, in blocks of `block`, each block `times` times in a row; the ragged last one is left out.

    An epoch's order is a function of seed and epoch. Fewer than `block` items are used several times in a block.
    """

    def __init__(self, length: int, block: int, times: int, seed: int):
        self.length, self.block, self.times, self.seed, self.epoch = length, block, times, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(self.length // self.block, 1) * self.block * self.times

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        order: list[int] = []
        while len(order) < self.block:
            order += rng.sample(range(self.length), self.length)
        for start in range(0, len(order) - self.block + 1, self.block):
            for _ in range(self.times):
                yield from order[start : start + self.block]

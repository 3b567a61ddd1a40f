"""H-DPO and QEMPO on TRL's DPOTrainer: its data, adapters, references and loops, with the loss of this library."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from entropy_po.answers import IGNORE_INDEX, Answers, answer_logps
from entropy_po.heads import check_head
from entropy_po.objective import EntropyObjective
from entropy_po.ops.linear_preference_loss import PreferenceOutput, linear_preference_loss

# TRL's names of the losses that mean the same here; its ipo, for one, divides log-probs by lengths.
_LOSSES = ("sigmoid", "hinge", "robust")
# Options of DPOConfig that are other losses, with the value that leaves them out.
_OTHER_LOSSES = {"loss_weights": None, "f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
_METRICS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "rewards/accuracies")


@dataclass
class PairConfig(DPOConfig):
    """What HDPOConfig and QEMPOConfig share; everything in trl.DPOConfig is there too.

    Raises:
        ValueError: an option of DPOConfig that would be another loss; the message names it.
    """

    nll_coef: float = field(default=0.0, metadata={"help": "Weight of the chosen answer's mean NLL; 0: the papers."})
    workspace_bytes: int | None = field(default=None, metadata={"help": "Bound on the head's working memory in bytes."})
    strategy: str = field(default="auto", metadata={"help": "auto, resident, deferred or recompute."})

    def __post_init__(self):
        super().__post_init__()
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if len(names) != 1 or names[0] not in _LOSSES:
            raise ValueError(
                f"loss_type={self.loss_type!r} is not one of {', '.join(_LOSSES)}, which mean the same in TRL and here; use "
                "one of them alone, nll_coef in place of sft, or entropy_po.trainer for ipo."
            )
        for name, value in _OTHER_LOSSES.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} is another loss than H-DPO or QEMPO; leave it out.")
        if self.label_smoothing and names[0] != "robust":
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} is read by loss_type='robust' alone, got {names[0]!r}."
            )
        self.entropy_objective  # noqa: B018  # ranges of the coefficients, in the objective's own words

    @property
    def entropy_objective(self) -> EntropyObjective:
        """The (a, b) objective that the coefficients name."""
        raise NotImplementedError


@dataclass
class HDPOConfig(PairConfig):
    """Arguments of `HDPOTrainer`: DPOConfig's, `beta` among them, and `alpha`.

    Example:
        >>> HDPOConfig(output_dir="out", beta=0.1, alpha=0.8).entropy_objective        # doctest: +SKIP
        EntropyObjective(policy_coef=0.08000000000000002, ref_coef=0.1)
    """

    alpha: float = field(default=0.9, metadata={"help": "Below 1 sharpens, 1 is DPO, above 1 flattens; > 0."})

    @property
    def entropy_objective(self) -> EntropyObjective:
        return EntropyObjective.hdpo(self.beta, self.alpha)


@dataclass
class QEMPOConfig(PairConfig):
    """Arguments of `QEMPOTrainer`: DPOConfig's, `lam` and `mu`. `beta` is not read. With mu = 0 there is no reference.

    Offline QEMPO has no anchor: on separable pairs both log-probabilities can fall without end. Stop early, set `nll_coef`,
    or a `mu` above 0.

    Raises:
        ValueError: `lam` is missing, or as `PairConfig`.
    """

    lam: float | None = field(default=None, metadata={"help": "Multiplier of the reward constraint, > 0."})
    mu: float = field(default=0.0, metadata={"help": "Multiplier of the KL constraint, >= 0; above 0 it is QEMPO-KL."})

    @property
    def entropy_objective(self) -> EntropyObjective:
        if self.lam is None:
            raise ValueError("lam must be given; for example lam=10, a weight of 1 / lam = 0.1 on log pi.")
        return EntropyObjective.qempo_kl(self.lam, self.mu)


class PairTrainer(DPOTrainer):
    """trl.DPOTrainer with the loss, and the reference's log-probs, of `linear_preference_loss` and its (a, b) objective.

        mean over pairs of  pair_loss(a * (logps_w - logps_l) - b * (ref_w - ref_l)) + nll_coef * -logps_w / length_w

    Everything else is TRL's: datasets and their preparation, adapters, the reference (a copy, the model without its adapter,
    or precomputed), accumulation, evaluation, checkpoints. Where b = 0 there is no reference, whatever TRL would have held.
    Of its metrics all are here but `logits/*` and `mean_token_accuracy`, which would cost a vocabulary product more; rewards
    are a log pi - b log ref.

    Args:
        args: HDPOConfig or QEMPOConfig.
        kwargs: as trl.DPOTrainer takes them. Text only.
    Raises:
        ValueError: args of another class, a dataset with images, a head that is not its weight and transform alone.
    """

    config_class: type[PairConfig]
    args: PairConfig
    model: Any
    objective: EntropyObjective

    def __init__(self, model, ref_model=None, args: PairConfig | None = None, data_collator=None, **kwargs):
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"args must be a {self.config_class.__name__}, got {type(args).__name__}; it takes all that DPOConfig takes."
            )
        self.objective = args.entropy_objective
        needs_reference, precompute = self.objective.needs_reference, args.precompute_ref_log_probs
        if not needs_reference:
            if ref_model is not None or args.sync_ref_model:
                lam = args.lam  # type: ignore[attr-defined]  # QEMPO's: H-DPO has a reference
                raise ValueError(f"ref_model and sync_ref_model are not read where mu=0; leave them out (lam={lam:g}).")
            args.precompute_ref_log_probs = True  # on this branch TRL holds no reference, and asks the method below
        super().__init__(model, ref_model, args, data_collator, **kwargs)
        args.precompute_ref_log_probs = precompute
        self.precompute_ref_logps = precompute and needs_reference
        if self._is_vision_dataset:
            raise ValueError(
                "train_dataset holds images, which the loss from hidden states is not tested with; use text."
            )
        check_head(self.model)

    # ---- reference ----

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return super()._precompute_ref_logps(dataset, name, batch_size) if self.objective.needs_reference else dataset

    def compute_ref_log_probs(self, model, inputs) -> tuple[Tensor, Tensor]:
        """(chosen [B], rejected [B]) of a batch of TRL's collator, nats, without gradient."""
        adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),  # type: ignore[arg-type]
            adapter,
            self.accelerator.autocast(),
        ):
            logps = answer_logps(model, _answers(inputs), workspace_bytes=self.args.workspace_bytes)
        return logps[0::2], logps[1::2]

    def _reference(self, inputs) -> Tensor | None:
        """[B, 2], nats."""
        if not self.objective.needs_reference:
            return None
        if self.precompute_ref_logps:
            pair = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            pair = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        return torch.stack(pair, dim=1)

    # ---- loss ----

    def _compute_loss(self, model, inputs, return_outputs):
        ref_logps = self._reference(inputs)
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast():
            answers = Answers.of(model, _answers(inputs), **routed)
            output = answers.loss(
                linear_preference_loss,
                objective=self.objective,
                ref_logps=ref_logps,
                loss=self.loss_types[0],
                label_smoothing=self.label_smoothing,
                nll_coef=self.args.nll_coef,
                workspace_bytes=self.args.workspace_bytes,
                strategy=self.args.strategy,
            )
        loss = output.loss
        if self.aux_loss_enabled:
            assert answers.aux_loss is not None
            loss = loss + self.router_aux_loss_coef * answers.aux_loss.to(loss.device)
        self._record(inputs, output, answers.aux_loss if self.aux_loss_enabled else None)
        if not return_outputs:
            return loss
        with torch.no_grad():  # logits for compute_metrics cost a forward of their own, as in TRL
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    @torch.no_grad()
    def _record(self, inputs, output: PreferenceOutput, aux_loss: Tensor | None) -> None:
        """TRL's metrics, from one gather of a few numbers per pair."""
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        tokens = inputs["attention_mask"].sum(1).view(2, -1).sum(0)
        columns = [*output.rewards.unbind(1), *output.logps.unbind(1), output.accuracy, output.entropy.sum(1)]
        columns += [output.lengths.sum(1), tokens]
        pairs = self.accelerator.gather(torch.stack([column.double() for column in columns], dim=1))
        *means, _, _, _ = pairs.mean(0).tolist()
        entropy, length, tokens = pairs[:, -3:].sum(0).tolist()
        for name, mean in zip(_METRICS, means, strict=True):
            metrics[name].append(mean)
        metrics["rewards/margins"].append(means[0] - means[1])
        metrics["entropy"].append(entropy / max(length, 1))
        if aux_loss is not None:
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        if training:
            self._total_train_tokens += int(tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]


class HDPOTrainer(PairTrainer):
    """H-DPO on trl.DPOTrainer; see `PairTrainer`.

    Example:
        >>> args = HDPOConfig(output_dir="out", beta=0.1, alpha=0.9)                                     # doctest: +SKIP
        >>> HDPOTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=pairs).train()                       # doctest: +SKIP

    Source: arXiv 2411.07595.
    """

    config_class = HDPOConfig


class QEMPOTrainer(PairTrainer):
    """Offline QEMPO, and QEMPO-KL where mu > 0, on trl.DPOTrainer; see `PairTrainer`.

    Example:
        >>> args = QEMPOConfig(output_dir="out", lam=10.0, nll_coef=0.1)                                 # doctest: +SKIP
        >>> QEMPOTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=pairs).train()                      # doctest: +SKIP

    Source: arXiv 2602.15894.
    """

    config_class = QEMPOConfig


def _answers(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL's batch, all chosen and then all rejected sequences, as pairs: chosen_0, rejected_0, chosen_1, ..."""
    num_sequences = len(inputs["input_ids"])
    order = torch.arange(num_sequences, device=inputs["input_ids"].device).view(2, -1).t().flatten()
    ids, completion = inputs["input_ids"][order], inputs["completion_mask"][order]
    labels = ids.masked_fill(completion == 0, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"][order], "labels": labels}

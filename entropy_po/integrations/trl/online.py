"""Online QEMPO on TRL's GRPOTrainer: its generation and reward functions, with the shaped reward and dual control."""

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from entropy_po.objective import EntropyObjective
from entropy_po.policy_gradient import leave_one_out
from entropy_po.trainer.checkpoints import SavesAscent
from entropy_po.trainer.config import DualArguments

# What GRPOConfig must say for the gradient to be that of the objective, up to a constant: sums over an answer's tokens,
# rewards as they are, and the reference in the reward alone.
_NEEDED = {
    "loss_type": ("dr_grpo", "luspo"),
    "scale_rewards": ("none",),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "beta": (0.0,),
    # answers or tokens that do not count would be missing from the entropy and the KL, too
    "mask_truncated_completions": (False,),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "entropy_coef": (0.0,),
    "use_adaptive_entropy": (False,),
}


@dataclass
class QEMPOGRPOConfig(DualArguments, GRPOConfig):
    """Arguments of `QEMPOGRPOTrainer`: GRPOConfig's, `lam` and `mu`, and the targets that move them (`min_reward`, `max_kl`).

    Differences in defaults: `loss_type` dr_grpo and `scale_rewards` none. Normalised by an answer's length, or by the spread
    of its group's rewards, it would be another objective, and another constraint for each prompt. `beta` stays 0: what pulls
    to the reference is `mu`.

    Raises:
        ValueError: `lam` is missing, a number out of its range, or an option that would be another objective.
    Example:
        >>> QEMPOGRPOConfig(output_dir="out", lam=100.0, min_reward=0.7).dual_ascent().min_reward        # doctest: +SKIP
        0.7
    """

    lam: float | None = field(default=None, metadata={"help": "Multiplier of the reward constraint; > 0. Its start."})
    mu: float = field(default=0.0, metadata={"help": "Multiplier of the KL constraint; >= 0. Its start."})
    loss_type: str = field(default="dr_grpo", metadata={"help": "dr_grpo, or luspo with ratios of whole answers."})
    scale_rewards: str = field(default="none", metadata={"help": "none: rewards enter as they are."})

    def __post_init__(self):
        super().__post_init__()
        self._check_targets()
        for name, values in _NEEDED.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is another objective than QEMPO; leave it at {values[0]!r}."
                )
        if self.lam is None:
            raise ValueError("lam must be given; for example lam=100, a weight of 1 / lam = 0.01 on log pi.")
        self.entropy_objective  # noqa: B018  # ranges of the multipliers, in the objective's own words

    @property
    def entropy_objective(self) -> EntropyObjective:
        """The (a, b) objective of lam and mu as given."""
        assert self.lam is not None  # checked when it was made
        return EntropyObjective.qempo_kl(self.lam, self.mu)

    @property
    def needs_reference(self) -> bool:
        """Whether mu is, or may become, more than 0."""
        return self.mu > 0 or self.max_kl is not None


class QEMPOGRPOTrainer(SavesAscent, GRPOTrainer):
    """trl.GRPOTrainer that maximises E r + a H(pi) - b CE(pi, ref), with (a, b) from lam and mu, which may move.

    An answer's advantage is that of its shaped reward, a constant of the batch of samples,

        r - a sum_t log pi(y_t) + b sum_t log ref(y_t)      minus the mean of the same over the prompt's other answers

    with pi the policy that sampled. After each batch of samples lam and mu move towards `min_reward` and `max_kl`
    (`entropy_po.dual.DualAscent`). Everything else is TRL's: generation (vLLM too), reward functions, tools, clipping,
    adapters, evaluation, checkpoints; lam and mu lie in dual.json beside each. Where TRL has not scored the samples with the
    policy already, that is one more forward for each batch of samples. `accelerate_trl` makes all of its forwards faster.

    Args:
        args: QEMPOGRPOConfig.
        kwargs: as trl.GRPOTrainer takes them.
    Raises:
        ValueError: args of another class.
    Example:
        >>> args = QEMPOGRPOConfig(output_dir="out", lam=100.0, min_reward=0.7)                          # doctest: +SKIP
        >>> QEMPOGRPOTrainer("Qwen/Qwen3-0.6B", my_reward, args, train_dataset=prompts).train()          # doctest: +SKIP

    Source: arXiv 2602.15894; its own online surrogate could not be read, so this follows from the objective.
    """

    args: QEMPOGRPOConfig
    model: Any
    num_generations: int
    _logs: dict[str, Any]

    def __init__(self, model, reward_funcs=None, args: QEMPOGRPOConfig | None = None, *more, **kwargs):
        if not isinstance(args, QEMPOGRPOConfig):
            raise ValueError(
                f"args must be a QEMPOGRPOConfig, got {type(args).__name__}; it takes all that GRPOConfig takes."
            )
        self.ascent = args.dual_ascent()
        self._warned = False
        # A beta makes TRL hold a reference and score the samples with it; `_compute_loss` keeps its KL out of the loss.
        args.beta = float(args.needs_reference)
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        args.beta = 0.0

    @property  # where transformers keeps what a hyperparameter search asks for
    def objective(self) -> EntropyObjective:  # type: ignore[override]
        """The (a, b) that the next samples are weighed with."""
        return self.args.entropy_objective if self.ascent is None else self.ascent.objective

    def _calculate_rewards(self, *args, **kwargs) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)  # [answers of all ranks, functions]
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs) -> dict:
        """TRL's batch of samples, with advantages of the shaped reward; lam and mu move after it."""
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        per_func = self._rewards_per_func
        rewards = (per_func * self.reward_weights.to(per_func.device)).nansum(1).double()
        rewards[per_func.isnan().all(1)] = torch.nan
        logps = self._summed(self._policy_logps(output), mask)
        ref_logps = self._summed(output["ref_per_token_logps"], mask) if self.args.needs_reference else None
        shaped = self.objective.shaped_reward(rewards, logps, ref_logps).view(-1, self.num_generations)
        # an answer that no function judges has no advantage, and the mean of the others for theirs
        judged = torch.where(shaped.isnan(), shaped.nanmean(1, keepdim=True), shaped)
        advantages = leave_one_out(judged).nan_to_num().flatten().to(output["advantages"].dtype)
        self._logs["advantages"].extend(advantages.tolist())  # as long as its deque: TRL's own drop out
        here = self.accelerator.process_index * len(mask)
        output["advantages"] = advantages[here : here + len(mask)]
        self._record(rewards.nanmean().item(), logps, ref_logps)
        return output

    @torch.no_grad()
    def _policy_logps(self, output: dict) -> Tensor:
        """[S, T] of this rank's samples, nats, under the policy that learns, as it was when they were drawn."""
        if "old_per_token_logps" in output:
            return output["old_per_token_logps"]
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attended = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        length, batch_size = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
        score = self._get_per_token_logps_and_entropies
        images = {name: output[name] for name in inspect.signature(score).parameters if name in output}
        return score(self.model, ids, attended, length, batch_size, **images)[0]

    def _summed(self, per_token: Tensor, mask: Tensor) -> Tensor:
        """[answers of all ranks], fp64."""
        return self.accelerator.gather((per_token.double() * mask).sum(1))

    def _record(self, reward: float, logps: Tensor, ref_logps: Tensor | None) -> None:
        """Metrics of a batch of samples, and dual ascent."""
        metrics, objective = self._metrics["train"], self.objective
        metrics["entropy/sequence"].append(-logps.mean().item())
        metrics["policy_coef"].append(objective.policy_coef)
        metrics["ref_coef"].append(objective.ref_coef)
        kl = None
        if ref_logps is not None:
            kl = (logps - ref_logps).mean().item()
            metrics["kl"].append(kl)
        if self.ascent is None:
            return
        self.ascent.update(reward, kl)
        metrics["lam"].append(self.ascent.lam)
        metrics["mu"].append(self.ascent.mu)
        if self.ascent.infeasible and not self._warned:
            self._warned = True
            warnings.warn(f"step {self.state.global_step}: {self.ascent.verdict()}.", stacklevel=2)

    def _compute_loss(self, model, inputs) -> Tensor:
        beta, self.beta = self.beta, 0.0
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta

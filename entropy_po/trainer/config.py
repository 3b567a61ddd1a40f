"""Arguments of training: transformers' TrainingArguments plus the objective, the head, LoRA, and each trainer's own."""

import importlib.util
import json
import math
import os
import reprlib
import sys
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from entropy_po.arguments import choice, positive
from entropy_po.dual import DualAscent
from entropy_po.objective import LOSSES, EntropyObjective
from entropy_po.ops.checks import check_number
from entropy_po.plan import STRATEGIES
from entropy_po.trainer.data import ON_OVERLONG, TRUNCATION_MODES

# The arguments each method reads, with defaults; None must be given: the papers leave it to the task.
METHODS: dict[str, dict[str, float | None]] = {
    "hdpo": {"beta": 0.1, "alpha": 0.9},
    "dpo": {"beta": 0.1},
    "spl": {"alpha_s": None, "beta_s": None},
    "qempo": {"lam": None},
    "qempo_kl": {"lam": None, "mu": None},
}
# Online, the objective with a = b = beta has another name.
ONLINE_METHODS = {"rlhf" if name == "dpo" else name: arguments for name, arguments in METHODS.items()}
ESTIMATORS = ("sequence", "token", "bonus")
ADAPTER_RATE = 2e-5  # of a LoRA adapter, where none is given
_COEFFICIENTS = ("beta", "alpha", "alpha_s", "beta_s", "lam", "mu")


# What an argument's annotation admits, in words.
_KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    list[str]: "a list of texts",
    list[float]: "a list of finite numbers",
    type(None): "None",
}
_TRANSFORMERS_OWN = {argument.name for argument in fields(TrainingArguments)}


def _is_a(value, kind) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(x, get_args(kind)[0]) for x in value)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and abs(value if isinstance(value, int) else float(value)) <= sys.float_info.max
    return isinstance(value, kind)


def _arg(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingConfig(TrainingArguments):
    """What `EntropyPOConfig` and `OnlineConfig` share; everything in transformers.TrainingArguments is there too.

    Differences in defaults: `learning_rate` 1e-6 (2e-5 for an adapter), `logging_steps` 10, `per_device_train_batch_size`
    4, `report_to` tensorboard where it is installed, `bf16` where the GPU has it, and the CPU is used without further
    flags where there is no CUDA or ROCm GPU.

    Raises:
        ValueError: an argument out of its range, or one that the method does not read; the message names it.
    """

    methods: ClassVar[dict[str, dict[str, float | None]]] = METHODS

    method: str = _arg("hdpo", "hdpo, dpo (online: rlhf), spl, qempo or qempo_kl.")
    beta: float | None = _arg(None, "hdpo, dpo, rlhf: weight on log ref, > 0 (default 0.1).")
    alpha: float | None = _arg(None, "hdpo: below 1 sharpens, 1 is DPO, above 1 flattens, > 0 (default 0.9).")
    alpha_s: float | None = _arg(None, "spl: weight of the entropy, > 0.")
    beta_s: float | None = _arg(None, "spl: weight of the cross-entropy to the reference, >= 0.")
    lam: float | None = _arg(None, "qempo, qempo_kl: multiplier of the reward constraint, > 0; online, its start.")
    mu: float | None = _arg(None, "qempo_kl: multiplier of the KL constraint, >= 0; online, its start.")
    temperature: float = _arg(1.0, "Divides the logits of policy and reference alike.")

    max_prompt_length: int | None = _arg(None, "Longest prompt in tokens; of a longer one the end is kept.")
    workspace_bytes: int | None = _arg(None, "Bound on the head's working memory in bytes; None: the device's default.")
    strategy: str = _arg("auto", "How the head's gradients are made: auto, resident, deferred (pairs) or recompute.")
    disable_dropout: bool = _arg(True, "Switch the model's own dropout off, so that policy and reference start equal.")
    check_head: bool = _arg(True, "Compare the head with the model's own logits on a few tokens before training.")

    lora_r: int | None = _arg(None, "Rank of a LoRA adapter; None trains the whole model.")
    lora_alpha: float | None = _arg(None, "LoRA scaling; default 2 * lora_r.")
    lora_dropout: float = _arg(0.0, "Dropout on the adapter's input.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; default every linear layer but the head."}
    )

    # transformers declares these two without None, which is a default of ours
    learning_rate: float | None = _arg(None, "Peak learning rate; default 1e-6, of an adapter 2e-5.")  # type: ignore[assignment]
    per_device_train_batch_size: int = _arg(4, "Pairs, or prompts, per device and forward.")
    per_device_eval_batch_size: int = _arg(4, "The same in evaluation and in the reference pass.")
    logging_steps: float = _arg(10, "Steps between two rows of metrics.")
    bf16: bool | None = _arg(  # type: ignore[assignment]
        None, "Mixed precision in bf16; default: as accelerate launch has it, else yes on an accelerator that has it."
    )
    # HfArgumentParser reads this union in the parent's order only.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default=None, metadata={"help": "Loggers; default tensorboard where it is installed."}
    )
    remove_unused_columns: bool = _arg(False, "Unused: the trainer makes its own batches.")

    def __post_init__(self):
        self._check_types()
        self._check_method()
        self._check_ranges()
        self.entropy_objective  # noqa: B018  # ranges of the coefficients, in the objective's own words
        self.has_default_rate = self.learning_rate is None  # to be raised where the model comes with an adapter
        if self.learning_rate is None:
            self.learning_rate = 1e-6 if self.lora_r is None else ADAPTER_RATE
        if not torch.cuda.is_available():
            # No other accelerator has been trained on; and transformers refuses bf16 and warns about pinned memory where it was
            # not told that the CPU is meant.
            self.use_cpu = True
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # `accelerate launch` was told, or has its own
        if self.bf16 is None and launched is not None:
            self.bf16 = launched == "bf16"
        if self.bf16 is None:
            on_cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_cuda and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.report_to is None:
            self.report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") else "none"
        super().__post_init__()

    @property
    def entropy_objective(self) -> EntropyObjective:
        """The (a, b) objective that method and coefficients name."""
        coefficients = {name: getattr(self, name) for name in self.methods[self.method]}
        return getattr(EntropyObjective, "dpo" if self.method == "rlhf" else self.method)(**coefficients)

    def _check_types(self) -> None:
        """Of what this package adds; transformers looks at its own. A file or a program may hold anything."""
        hints = get_type_hints(type(self))  # HfArgumentParser rewrites the types of fields()
        for name in (argument.name for argument in fields(self) if argument.name not in _TRANSFORMERS_OWN):
            value, hint = getattr(self, name), hints[name]
            kinds = (hint,) if hint in _KINDS else get_args(hint)
            if not any(_is_a(value, kind) for kind in kinds):
                names = " or ".join(_KINDS[kind] for kind in kinds)
                raise ValueError(f"{name} must be {names}, got {reprlib.repr(value)}.")

    def _check_method(self) -> None:
        choice("method", self.method, tuple(self.methods))
        defaults = self.methods[self.method]
        for name in _COEFFICIENTS:
            value = getattr(self, name)
            if name not in defaults and value is not None:
                raise ValueError(
                    f"{name}={value:g} is not read by method={self.method!r}, which has {', '.join(defaults)}; drop it "
                    "or choose another method."
                )
            if name in defaults and value is None:
                if defaults[name] is None:
                    raise ValueError(f"{name} must be given for method={self.method!r}; for example {_EXAMPLES[name]}.")
                setattr(self, name, defaults[name])

    def _check_ranges(self) -> None:
        choice("strategy", self.strategy, STRATEGIES)
        check_number("temperature", self.temperature, "1 leaves the logits as they are")
        if self.workspace_bytes is not None:
            _check_number("workspace_bytes", self.workspace_bytes, 1, "leave it out for the device's default")
        if self.max_prompt_length is not None:
            _check_number("max_prompt_length", self.max_prompt_length, 1, "leave it out for no limit of its own")
        if self.lora_r is not None:
            _check_number("lora_r", self.lora_r, 1, "leave it out to train the whole model")
        else:
            given = {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout or None}
            given["lora_target_modules"] = self.lora_target_modules  # type: ignore[assignment]
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"{name}={reprlib.repr(value)} is read with lora_r alone; give lora_r, or drop it."
                    )
        if self.lora_alpha is not None:
            _check_number("lora_alpha", self.lora_alpha, 0, "leave it out for 2 * lora_r", strict=True)
        _check_number("lora_dropout", self.lora_dropout, 0, "0 is none")
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout={self.lora_dropout:g} must be below 1; it is the share that is dropped.")
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor:g} smooths token labels, which these losses have none "
                "of; for swapped pairs EntropyPOConfig has label_smoothing."
            )


@dataclass
class EntropyPOConfig(TrainingConfig):
    """Arguments of `PreferenceTrainer`, beside those of `TrainingConfig`. Batch sizes count pairs.

    Raises:
        ValueError: an argument out of its range, or one that the method does not read; the message names it.
    Example:
        >>> EntropyPOConfig(output_dir="out", method="hdpo", beta=0.1, alpha=0.8).entropy_objective
        EntropyObjective(policy_coef=0.08000000000000002, ref_coef=0.1)
    """

    loss: str = _arg("sigmoid", "Pair loss: sigmoid, robust, ipo or hinge.")
    label_smoothing: float = _arg(0.0, "Assumed share of swapped pairs, 0 to 0.5; sigmoid and robust only.")
    nll_coef: float = _arg(0.0, "Weight of the chosen answer's mean negative log-probability per token; 0: the papers.")

    max_length: int = _arg(1024, "Longest prompt plus answer, in tokens.")
    truncation_mode: str = _arg("keep_start", "What stays of a sequence over max_length: keep_start or keep_end.")
    on_overlong: str = _arg("error", "Pairs whose answers do not survive max_length: error, or drop (counted).")
    ref_cache_dir: str | None = _arg(None, "Folder of reference log-probs; default output_dir/reference_logps.")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        choice("loss", self.loss, LOSSES)
        choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        choice("on_overlong", self.on_overlong, ON_OVERLONG)
        _check_number("nll_coef", self.nll_coef, 0, "0 is the paper's loss")
        _check_number("max_length", self.max_length, 2, "it counts prompt and answer tokens")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for an answer in "
                f"max_length={self.max_length}; lower it or raise max_length."
            )
        # A margin of zero has a loss like any other: this checks the pair of arguments, not a value.
        loss: Any = self.loss
        EntropyObjective.dpo(1.0).pair_loss(torch.zeros(1), loss, self.label_smoothing)


@dataclass
class DualArguments:
    """Where dual ascent moves lam and mu to, and how fast; the class that uses it has `lam` and `mu`."""

    if TYPE_CHECKING:
        lam: float | None = None
        mu: float | None = None

    min_reward: float | None = _arg(None, "qempo, qempo_kl: R, the mean reward to reach; moves lam. None: lam stays.")
    max_kl: float | None = _arg(None, "qempo_kl: K, the KL budget in nats per answer; moves mu. None: mu stays.")
    relative_to: str | None = _arg(None, "Folder of a measured run: R is its reward + min_reward, K its KL * max_kl.")
    lam_lr: float = _arg(0.3, "Step of log lam per batch of samples and unit of reward.")
    mu_lr: float = _arg(0.02, "Step of log(1 + mu) per batch of samples and relative excess of the KL.")
    dual_horizon: float = _arg(100.0, "Batches that the policy takes to learn; lam and mu move by where it is heading.")
    lam_min: float | None = _arg(None, "Lower bound of lam; default lam / 1000.")
    lam_max: float | None = _arg(None, "Upper bound of lam; default lam * 1000.")
    mu_max: float = _arg(100.0, "Upper bound of mu.")
    dual_warmup: int = _arg(
        20, "Batches before lam and mu move; a fifth of dual_horizon or more, as no trend shows sooner."
    )
    dual_tolerance: float = _arg(0.02, "Below R in reward, or above K relatively, what still counts as holding it.")

    def _check_targets(self) -> None:
        for name in ("lam_lr", "mu_lr", "dual_tolerance", "dual_warmup"):
            _check_number(name, getattr(self, name), 0, "0 holds still")
        _check_number("dual_horizon", self.dual_horizon, 0, "0 is for a policy that follows lam and mu at once")
        if self.lam is not None:
            positive("lam", self.lam, "it multiplies the reward constraint")
        lam, mu = self.lam or 1.0, self.mu or 0.0
        if self.lam_min is not None and not 0 <= self.lam_min <= lam:
            raise ValueError(f"lam_min={self.lam_min:g} must be from 0 to lam={lam:g}, where lam starts.")
        if self.lam_max is not None and self.lam_max < lam:
            raise ValueError(f"lam_max={self.lam_max:g} must be at least lam={lam:g}, where lam starts.")
        if self.mu_max < mu:
            raise ValueError(f"mu_max={self.mu_max:g} must be at least mu={mu:g}, where mu starts.")
        if self.relative_to is not None and self.min_reward is None and self.max_kl is None:
            raise ValueError("relative_to needs min_reward, max_kl or both, which it is the origin of.")

    def dual_ascent(self) -> DualAscent | None:
        """The controller that the arguments ask for, None where lam and mu stay.

        Raises:
            ValueError: a target out of its range; FileNotFoundError: `relative_to` without metrics.jsonl.
        """
        if self.min_reward is None and self.max_kl is None:
            return None
        min_reward, max_kl = self.min_reward, self.max_kl
        if self.relative_to is not None:
            reward, kl = measured_run(self.relative_to)
            min_reward = None if min_reward is None else reward + min_reward
            if max_kl is not None:
                if kl is None:
                    raise ValueError(f"relative_to: {self.relative_to} measured no KL; run it with report_kl=True.")
                max_kl = kl * max_kl
        assert self.lam is not None  # a method that moves it asks for it
        return DualAscent(
            lam=self.lam,
            mu=self.mu or 0.0,
            min_reward=min_reward,
            max_kl=max_kl,
            lam_step=self.lam_lr,
            mu_step=self.mu_lr,
            horizon=self.dual_horizon,
            lam_bounds=(
                self.lam / 1000 if self.lam_min is None else self.lam_min,
                self.lam * 1000 if self.lam_max is None else self.lam_max,
            ),
            mu_bounds=(0.0, self.mu_max),
            warmup=self.dual_warmup,
            tolerance=self.dual_tolerance,
        )


@dataclass
class OnlineConfig(DualArguments, TrainingConfig):
    """Arguments of `OnlineTrainer`, beside those of `TrainingConfig`. Batch sizes count prompts, `num_generations` answers
    each.

    The method and its coefficients name an objective (a, b), as offline; `rlhf` is a = b = beta. With qempo and qempo_kl
    `lam` and `mu` are where dual ascent starts if `min_reward` and `max_kl` are given; without, they stay.

    With `relative_to`, the folder of an earlier run with metrics.jsonl, R and K are counted from what that run's last third
    measured: R = its reward + min_reward, K = its KL * max_kl. At exactly RLHF's own R and K (0 and 1) RLHF is the only
    feasible policy and the multipliers diverge: entropy is bought with reward or KL.

    Raises:
        ValueError: an argument out of its range, or one that the method does not read; the message names it.
    Example:
        >>> args = OnlineConfig(output_dir="out", method="qempo", lam=100.0, min_reward=0.7)
        >>> args.dual_ascent().min_reward
        0.7
    """

    methods: ClassVar[dict[str, dict[str, float | None]]] = ONLINE_METHODS

    method: str = _arg("qempo", "qempo, qempo_kl, rlhf, hdpo or spl.")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions as module:name, called as TRL calls its own: prompts, completions, columns."
        },
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Their weights; default 1 each."})

    num_generations: int = _arg(8, "Answers per prompt, >= 2.")
    num_iterations: int = _arg(1, "Optimiser steps on each batch of samples.")
    epsilon: float = _arg(0.2, "How far down the probability ratio may go before its gradient stops.")
    epsilon_high: float | None = _arg(None, "How far up; default epsilon.")
    importance_sampling_level: str = _arg("token", "Ratios of tokens, or of whole answers: token or sequence.")
    estimator: str = _arg(
        "sequence",
        "Of the entropy's gradient: sequence (from log-probs; its noise vanishes at the optimum), token (analytic entropy and "
        "reward-to-go; unbiased too) or bonus (analytic alone: biased, blind to the entropy of later tokens).",
    )
    report_kl: bool = _arg(False, "Measure the KL to the start also where the method needs no reference.")

    max_completion_length: int = _arg(256, "Longest answer in tokens, the end-of-sequence token included.")
    generation: str = _arg("transformers", "What samples: transformers, or vllm where it is installed.")
    generation_batch_size: int | None = _arg(None, "Answers sampled at a time; default all of a step's.")
    vllm_gpu_memory_utilization: float = _arg(0.3, "Share of the GPU's memory for vllm.")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        choice("estimator", self.estimator, ESTIMATORS)
        choice("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        choice("generation", self.generation, ("transformers", "vllm"))
        choice("strategy", self.strategy, ("auto", "resident", "recompute"))
        if self.importance_sampling_level == "sequence" and self.estimator != "sequence":
            raise ValueError(
                f"importance_sampling_level='sequence' weighs whole answers, estimator={self.estimator!r} tokens; use "
                "importance_sampling_level='token'."
            )
        _check_number("num_generations", self.num_generations, 2, "the other answers are the baseline")
        _check_number("num_iterations", self.num_iterations, 1, "1 uses every sample once")
        _check_number("max_completion_length", self.max_completion_length, 1, "it counts the end-of-sequence token")
        _check_number("epsilon", self.epsilon, 0, "0.2 is usual", strict=True)
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        _check_number(
            "vllm_gpu_memory_utilization", self.vllm_gpu_memory_utilization, 0, "0.3 leaves the rest", strict=True
        )
        if self.vllm_gpu_memory_utilization > 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization={self.vllm_gpu_memory_utilization:g} must be at most 1; it is a share."
            )
        _check_number("epsilon_high", self.epsilon_high, 0, "leave it out for epsilon", strict=True)
        self._check_targets()
        if self.generation_batch_size is not None:
            _check_number("generation_batch_size", self.generation_batch_size, 1, "leave it out for all at once")
        for name, readers in (("min_reward", ("qempo", "qempo_kl")), ("max_kl", ("qempo_kl",))):
            if getattr(self, name) is not None and self.method not in readers:
                raise ValueError(
                    f"{name}={getattr(self, name):g} is not read by method={self.method!r}; only {' and '.join(readers)} "
                    "move their multipliers."
                )
        if self.save_strategy == "steps" and self.save_steps >= 1 and self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps={self.save_steps:g} must be a multiple of num_iterations={self.num_iterations}: samples are "
                "not saved, so a run resumes where it draws new ones."
            )


def measured_run(folder: str | Path) -> tuple[float, float | None]:
    """Mean reward, and mean KL where it was measured, over the last third of a run's rows in metrics.jsonl.

    Raises:
        FileNotFoundError: no such file; ValueError: no row with a reward.
    """
    path = Path(folder).expanduser() / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"relative_to: {path}: no such file; give the output_dir of an online run.")
    lines, rows = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # else half a row, of a run that was killed
                raise ValueError(
                    f"relative_to: {path}, line {number}: {error}; give the output_dir of a run."
                ) from error
    rows = [row for row in rows if row.get("reward") is not None]
    if not rows:
        raise ValueError(f"relative_to: {path} has no row with a reward; give the output_dir of an online run.")
    rows = rows[len(rows) * 2 // 3 :]
    kls = [row["kl"] for row in rows if row.get("kl") is not None]
    return sum(row["reward"] for row in rows) / len(rows), sum(kls) / len(kls) if kls else None


_EXAMPLES = {
    "alpha_s": "alpha_s=0.11, with beta_s=0.1 the same as hdpo with alpha=1.1",
    "beta_s": "beta_s=0.1, the beta of DPO",
    "lam": "lam=10, a weight of 1 / lam = 0.1 on log pi in qempo",
    "mu": "mu=1, which with lam=10 gives weights 0.2 on log pi and 0.1 on log ref",
}


def _check_number(name: str, value: Any, low: float, remedy: str, *, strict: bool = False) -> None:
    is_number: bool = isinstance(value, Real)  # not in the condition, where mypy would take its comparisons away
    if not (is_number and (low < value if strict else low <= value) and value < math.inf):
        raise ValueError(f"{name}={reprlib.repr(value)} must be finite and {'>' if strict else '>='} {low}; {remedy}.")

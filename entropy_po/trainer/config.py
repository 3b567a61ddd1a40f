"""Arguments of preference training: transformers' TrainingArguments plus the objective, the data and LoRA."""

import importlib.util
import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from entropy_po.objective import LOSSES, EntropyObjective
from entropy_po.plan import STRATEGIES

# The arguments each method reads, with defaults; None must be given: the papers leave it to the task.
METHODS: dict[str, dict[str, float | None]] = {
    "hdpo": {"beta": 0.1, "alpha": 0.9},
    "dpo": {"beta": 0.1},
    "spl": {"alpha_s": None, "beta_s": None},
    "qempo": {"lam": None},
    "qempo_kl": {"lam": None, "mu": None},
}
_COEFFICIENTS = ("beta", "alpha", "alpha_s", "beta_s", "lam", "mu")


def _arg(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class EntropyPOConfig(TrainingArguments):
    """Arguments of `PreferenceTrainer`; everything in transformers.TrainingArguments is there too.

    Batch sizes count pairs. Differences in defaults: `learning_rate` 1e-6 (2e-5 with `lora_r`), `logging_steps` 10,
    `per_device_train_batch_size` 4, `report_to` tensorboard where it is installed, `bf16` where the accelerator has
    it, and the CPU is used without further flags where there is no accelerator.

    Raises:
        ValueError: an argument out of its range, or one that the method does not read; the message names it.
    Example:
        >>> EntropyPOConfig(output_dir="out", method="hdpo", beta=0.1, alpha=0.8).entropy_objective
        EntropyObjective(policy_coef=0.08000000000000002, ref_coef=0.1)
    """

    method: str = _arg("hdpo", "hdpo, dpo, spl, qempo or qempo_kl.")
    beta: float | None = _arg(None, "hdpo, dpo: weight on log ref, > 0 (default 0.1).")
    alpha: float | None = _arg(None, "hdpo: below 1 sharpens, 1 is DPO, above 1 flattens, > 0 (default 0.9).")
    alpha_s: float | None = _arg(None, "spl: weight of the entropy, > 0.")
    beta_s: float | None = _arg(None, "spl: weight of the cross-entropy to the reference, >= 0.")
    lam: float | None = _arg(None, "qempo, qempo_kl: multiplier of the reward constraint, > 0.")
    mu: float | None = _arg(None, "qempo_kl: multiplier of the KL constraint, >= 0.")
    loss: str = _arg("sigmoid", "Pair loss: sigmoid, robust, ipo or hinge.")
    label_smoothing: float = _arg(0.0, "Assumed share of swapped pairs, 0 to 0.5; sigmoid and robust only.")
    nll_coef: float = _arg(0.0, "Weight of the chosen answer's mean negative log-probability per token; 0: the papers.")
    temperature: float = _arg(1.0, "Divides the logits of policy and reference alike.")

    max_length: int = _arg(1024, "Longest prompt plus answer, in tokens.")
    max_prompt_length: int | None = _arg(None, "Longest prompt in tokens; of a longer one the end is kept.")
    truncation_mode: str = _arg("keep_start", "What stays of a sequence over max_length: keep_start or keep_end.")
    on_overlong: str = _arg("error", "Pairs whose answers do not survive max_length: error, or drop (counted).")

    workspace_bytes: int | None = _arg(None, "Bound on the head's working memory in bytes; None: the device's default.")
    strategy: str = _arg("auto", "How the head's gradients are made: auto, resident, deferred or recompute.")
    ref_cache_dir: str | None = _arg(None, "Folder of reference log-probs; default output_dir/reference_logps.")
    disable_dropout: bool = _arg(True, "Switch the model's own dropout off, so that policy and reference start equal.")
    check_head: bool = _arg(True, "Compare the head with the model's own logits on a few tokens before training.")

    lora_r: int | None = _arg(None, "Rank of a LoRA adapter; None trains the whole model.")
    lora_alpha: float | None = _arg(None, "LoRA scaling; default 2 * lora_r.")
    lora_dropout: float = _arg(0.0, "Dropout on the adapter's input.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; default every linear layer but the head."}
    )

    learning_rate: float | None = _arg(None, "Peak learning rate; default 1e-6, with lora_r 2e-5.")
    per_device_train_batch_size: int = _arg(4, "Pairs per device and forward.")
    per_device_eval_batch_size: int = _arg(4, "Pairs per device in evaluation and in the reference pass.")
    logging_steps: float = _arg(10, "Steps between two rows of metrics.")
    bf16: bool | None = _arg(None, "Mixed precision in bf16; default: yes on an accelerator that has it, no on a CPU.")
    # HfArgumentParser reads this union in the parent's order only.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default=None, metadata={"help": "Loggers; default tensorboard where it is installed."}
    )
    remove_unused_columns: bool = _arg(False, "Unused: the trainer makes its own batches.")

    def __post_init__(self):
        self._check_method()
        self._check_ranges()
        self.entropy_objective  # noqa: B018  # ranges of the coefficients, in the objective's own words
        if self.learning_rate is None:
            self.learning_rate = 1e-6 if self.lora_r is None else 2e-5
        if not torch.accelerator.is_available():
            # transformers refuses bf16 and warns about pinned memory where it was not told that this is meant.
            self.use_cpu = True
        if self.bf16 is None:
            on_cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_cuda and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.report_to is None:
            self.report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") else "none"
        super().__post_init__()

    @property
    def entropy_objective(self) -> EntropyObjective:
        """The (a, b) objective that method and coefficients name."""
        coefficients = {name: getattr(self, name) for name in METHODS[self.method]}
        return getattr(EntropyObjective, self.method)(**coefficients)

    def _check_method(self) -> None:
        _check_choice("method", self.method, tuple(METHODS))
        defaults = METHODS[self.method]
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
        _check_choice("loss", self.loss, LOSSES)
        _check_choice("strategy", self.strategy, STRATEGIES)
        _check_choice("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        _check_choice("on_overlong", self.on_overlong, ("error", "drop"))
        _check_number("nll_coef", self.nll_coef, 0, "0 is the paper's loss")
        _check_number("temperature", self.temperature, 0, "1 leaves the logits as they are", strict=True)
        _check_number("max_length", self.max_length, 2, "it counts prompt and answer tokens")
        if self.max_prompt_length is not None:
            _check_number("max_prompt_length", self.max_prompt_length, 1, "leave it out for no limit of its own")
            if self.max_prompt_length >= self.max_length:
                raise ValueError(
                    f"max_prompt_length={self.max_prompt_length} leaves no room for an answer in "
                    f"max_length={self.max_length}; lower it or raise max_length."
                )
        if self.lora_r is not None:
            _check_number("lora_r", self.lora_r, 1, "leave it out to train the whole model")
        # A margin of zero has a loss like any other: this checks the pair of arguments, not a value.
        EntropyObjective.dpo(1.0).pair_loss(torch.zeros(1), self.loss, self.label_smoothing)
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor:g} smooths token labels, which a preference loss "
                "has none of; use label_smoothing for swapped pairs."
            )


_EXAMPLES = {
    "alpha_s": "alpha_s=0.11, with beta_s=0.1 the same as hdpo with alpha=1.1",
    "beta_s": "beta_s=0.1, the beta of DPO",
    "lam": "lam=10, a weight of 1 / lam = 0.1 on log pi in qempo",
    "mu": "mu=1, which with lam=10 gives weights 0.2 on log pi and 0.1 on log ref",
}


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def _check_number(name: str, value, low: float, remedy: str, *, strict: bool = False) -> None:
    if not (math.isfinite(value) and (value > low if strict else value >= low)):
        raise ValueError(f"{name}={value} must be finite and {'>' if strict else '>='} {low}; {remedy}.")

"""TRL's own trainers through this library: its fused head and its helpers on logits, exchanged by one call."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils

from entropy_po.answers import IGNORE_INDEX
from entropy_po.integrations.logits import entropy_from_logits, logps_from_logits
from entropy_po.ops.linear_token_stats import linear_token_stats
from entropy_po.ops.token_stats import token_stats


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """TRL's function of this name (`trl.kernels`) in one read of the logits, on any device.

        logps = log softmax(logits / temperature)[index]        entropy = -sum_j p_j log p_j        (nats)

    Args:
        logits: [..., V], fp32 / bf16 / fp16 / fp64.
        index: [...], int64 or int32.
        temperature: positive.
        row_mask: [...] bool or int; rows of zero are skipped and give zero. None for all rows.
    Returns:
        (logps, entropy), [...] each, fp32 (fp64 for fp64 logits), differentiable.
    Raises:
        ValueError: as `token_stats`.
    Example:
        >>> logps, entropy = selective_log_softmax_and_entropy(torch.randn(2, 3, 10), torch.zeros(2, 3).long())
    """
    stats = token_stats(logits, _labels(index, row_mask), temperature=temperature)
    return stats.logps, stats.entropy


def accelerate_trl() -> None:
    """Route TRL's fused head, and its helpers on logits, through this library, in every trainer, old or new.

    Beside the arithmetic one thing changes: off CUDA, TRL 1.16 scores prompt and padding tokens too, and then drops them;
    here only tokens with a label are scored, as it does on CUDA. A second call does nothing; `restore_trl` undoes the first.

    Not routed: several candidates per position in `selective_log_softmax`, and distillation's divergences. A head sharded
    by ZeRO-3 is refused when it is reached.

    Example:
        >>> accelerate_trl()                                                       # doctest: +SKIP
        >>> trl.DPOTrainer(model, args=args, train_dataset=pairs).train()          # doctest: +SKIP
    """
    if _originals:
        return
    # TRL 1.15 has no `_use_triton`: it scores labelled tokens only, on CUDA only
    _originals.update({name: vars(utils)[name] for name in (*_HEAD, *_HELPERS) if name in vars(utils)})
    for name in _HEAD.keys() & _originals.keys():
        setattr(utils, name, _HEAD[name])
    _exchange({id(_originals[name]): ours for name, ours in _HELPERS.items()})


def restore_trl() -> None:
    """TRL as it was before `accelerate_trl`; without that, nothing."""
    for name in _HEAD.keys() & _originals.keys():
        setattr(utils, name, _originals[name])
    _exchange({id(ours): _originals[name] for name, ours in _HELPERS.items() if name in _originals})
    _originals.clear()


def _exchange(functions: Mapping[int, Any]) -> None:
    """Put other functions, given by the id of what they replace, wherever a module of TRL has imported them to."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "trl":
            for name, value in list(vars(module).items()):
                if id(value) in functions:
                    setattr(module, name, functions[id(value)])


def _labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    index = index.long()
    return index if row_mask is None else index.masked_fill(row_mask == 0, IGNORE_INDEX)


class _FusedHead:
    """Takes the place of `trl.kernels.ChunkedLogProbFunction`; one method, called as that one is."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """(logps, entropy, log_sum_sq_probs, mean_logit, is_top1), [N] each, None where not in `outputs`."""
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "weight: the head is sharded by ZeRO-3, which accelerate_trl cannot read in its backward; use ZeRO-2 or "
                "FSDP2, or restore_trl() before training."
            )
        names: Any = ("logps", *(ours for theirs, ours in _OUTPUTS.items() if theirs in outputs))
        stats = linear_token_stats(
            hidden,
            weight.to(hidden.dtype),  # cast_lm_head_to_fp32 hands over fp32 hidden states and the model's own weight
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            outputs=names,
            expect_entropy_grad=False,  # a metric, unless GRPO's entropy_coef is set
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        return stats.logps, *(getattr(stats, ours) for ours in _OUTPUTS.values())


_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


def _only_labelled_tokens(device: torch.device) -> bool:
    """Takes the place of `_use_triton` where the head asks whether to leave out tokens without a label."""
    return True


def _selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    if index.ndim == logits.ndim:  # [..., K]
        return _originals["selective_log_softmax"](logits, index, temperature, row_mask)
    return logps_from_logits(logits, _labels(index, row_mask), temperature=temperature)


def _selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `trl.trainer.utils` has it, with one more argument than `trl.kernels`."""
    logps, entropy = selective_log_softmax_and_entropy(logits, index, temperature, row_mask)
    return logps, entropy if entropy_requires_grad else entropy.detach()


def _entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return entropy_from_logits(logits)


# What takes the place of what, by the names in trl.trainer.utils: there alone, and wherever they were imported to.
_HEAD = {"_ChunkedLogProbFunction": _FusedHead, "_use_triton": _only_labelled_tokens}
_HELPERS = {
    "selective_log_softmax": _selective_log_softmax,
    "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
    "entropy_from_logits": _entropy_from_logits,
}
_originals: dict[str, Any] = {}

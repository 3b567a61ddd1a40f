"""`fuse_lm_head`: a transformers model whose forward with labels gives loss, log-probs and entropy without logits."""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from entropy_po.answers import IGNORE_INDEX
from entropy_po.heads import (
    check_head,
    default_tolerance,
    evaluation_mode,
    forward_without_logits,
    head_of,
    output_layer,
    unwrap,
)
from entropy_po.ops.linear_token_stats import linear_token_stats


@dataclass
class FusedOutput(ModelOutput):
    """What a fused model's forward with labels returns. T is L - 1, or L where `shift_labels` was given."""

    loss: Tensor | None = None  # scalar: mean of -logps over the labels, router loss included
    logps: Tensor | None = None  # [B, T], nats, 0 where the label is ignored
    entropy: Tensor | None = None  # [B, T], nats, likewise; None unless outputs names it
    aux_loss: Tensor | None = None  # scalar, before its coefficient
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def fuse_lm_head(
    model: nn.Module,
    *,
    outputs: tuple[str, ...] = ("logps", "entropy"),
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    check: bool = True,
) -> nn.Module:
    """Let `model(..., labels=...)` give loss, log-probs and entropy without logits; without labels nothing changes.

        logps[b, t] = log softmax(z[b, t])[labels[b, t + 1]]      loss = sum of -logps / their number + router loss

    with z the model's own logits over temperature: its softcap, logit scale, bias and tied or adapted weights included. The
    loss is the model's own: divided by `num_items_in_batch` where the call gives it, plus `router_aux_loss_coef` times the
    router loss where router logits are asked for. Generation, and every call without labels, takes the model's own forward.
    Any family is accepted whose numbers agree on a few tokens; none by its name.

    Args:
        model: a causal language model of transformers, or a PeftModel around one, not yet wrapped by FSDP2 or DDP. Changed in
            place, and again with other arguments by a second call; `unfuse_lm_head` undoes it.
        outputs: "logps", and "entropy" where it is wanted; an output that is not named costs nothing. With a frozen head (LoRA)
            log-probs alone take two vocabulary products a step, with entropies three.
        temperature: divides the logits of every fused call, the loss included.
        workspace_bytes: as in `linear_token_stats`.
        check: compare logits and loss with the model's own on a few tokens first; False where the weights are not whole yet.
    Returns:
        The model. Its forward with `labels` [B, L] (unshifted, -100 ignored) or `shift_labels` [B, L] returns a FusedOutput.
    Raises:
        ValueError: no output embeddings, an adapter on the head, a sharded head, an unknown output, or numbers that differ.
    Example:
        >>> model = fuse_lm_head(AutoModelForCausalLM.from_pretrained(name))      # doctest: +SKIP
        >>> output = model(input_ids=ids, labels=ids)                             # doctest: +SKIP
        >>> (output.loss - 0.01 * output.entropy.mean()).backward()               # doctest: +SKIP
    """
    if "logps" not in outputs or not set(outputs) <= {"logps", "entropy"}:
        raise ValueError(
            f"outputs={outputs!r} must hold 'logps', and may hold 'entropy': the loss is made of log-probs."
        )
    output_layer(model)  # or an error that says what is missing
    unfuse_lm_head(model)
    base = unwrap(model)
    # kept on the model, so that a deepcopy calls its own forward and not the original's
    base._unfused_forward = base.forward
    options = {"outputs": outputs, "temperature": temperature, "workspace_bytes": workspace_bytes}

    @functools.wraps(type(base).forward)  # generate and Trainer read the signature
    def forward(self, *args, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if labels is None and shift_labels is None:
            given = {name: value for name, value in given.items() if value is not None}
            return self._unfused_forward(*args, **given, **kwargs)
        return _fused_forward(self, args, kwargs, options, **given)

    base.forward = types.MethodType(forward, base)
    if check:
        try:
            _check(model)
        except ValueError:
            unfuse_lm_head(model)
            raise
    return model


def unfuse_lm_head(model: nn.Module) -> nn.Module:
    """The model with the forward that it had before `fuse_lm_head`; without that, as it is."""
    base = unwrap(model)
    if hasattr(base, "_unfused_forward"):
        base.forward = base.__dict__.pop("_unfused_forward")
    return model


def _fused_forward(model, args, kwargs, options, labels, shift_labels, num_items_in_batch) -> FusedOutput:
    if shift_labels is None:
        # shifted by padding and not by slicing: the hidden states need no copy
        shift_labels, num_positions = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), labels.shape[1] - 1
    else:
        num_positions = shift_labels.shape[1]
    kwargs = {"use_cache": False, **kwargs, "return_dict": True}
    hidden, plain = forward_without_logits(model, model._unfused_forward, shift_labels.shape, *args, **kwargs)
    head = head_of(model)
    # a model split over devices may end on another one than its head
    hidden, shift_labels = hidden.to(head.weight.device, head.weight.dtype), shift_labels.to(head.weight.device)
    stats = linear_token_stats(
        hidden.flatten(0, 1), head.weight, shift_labels.flatten(), **options, **head.options
    )  # fmt: skip
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != IGNORE_INDEX).sum().clamp_min(1)
    loss = -stats.logps.sum() / num_items_in_batch
    aux_loss = plain.get("aux_loss")
    if aux_loss is not None:
        loss = loss + model.config.get_text_config().router_aux_loss_coef * aux_loss.to(loss.device)
    logps, entropy = (None if x is None else x.view(shift_labels.shape)[:, :num_positions] for x in stats[:2])
    return FusedOutput(loss, logps, entropy, aux_loss, plain.get("hidden_states"), plain.get("attentions"))


@torch.no_grad()
def _check(model: nn.Module) -> None:
    """The logits, by `check_head`, and the loss: what a model adds to its loss beside the labels' log-probs shows there."""
    check_head(model)
    base = unwrap(model)
    weight = head_of(model).weight
    ids = torch.arange(1, 9, device=weight.device)[None] % weight.shape[0]
    with evaluation_mode(model):
        expected = base._unfused_forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss: Any = _fused_forward(base, (), {"input_ids": ids}, {}, ids, None, None).loss
    if expected is None or not (loss - expected).abs() <= default_tolerance(weight.dtype) * expected.abs():
        raise ValueError(
            f"model: the loss of {type(base).__name__} is {expected} where its labels' log-probs give {loss.item():.6g}; this "
            "architecture adds something to its loss and is not supported."
        )

"""The output head of any causal language model: its weight, its logit transform and the hidden states it reads.

The hidden states are what the model itself hands to its head, caught on the way in, so the final norm, embedding
projections and model-specific scalings before the head need no case here. What comes after the matrix product (scale,
softcap) is read from the configuration. No family is accepted by its name: `check_head` compares numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Configuration entries by what they do to the logits. `check_head` refuses a family that uses them otherwise.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)


@dataclass(frozen=True, eq=False)
class Head:
    """The linear map and transform that turn hidden states into logits; no copy of the weight.

        logits = cap((hidden_states @ weight.T + bias) * logit_scale),   cap(x) = softcap * tanh(x / softcap)

    Attributes:
        weight: [V, D]; the parameter itself, so gradients reach it.
        bias: [V], or None.
        softcap: positive float, or None for no cap.
        logit_scale: float.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `linear_token_stats` beside the weight."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Plain logits [..., V], for checks on a few tokens."""
        logits = nn.functional.linear(hidden_states, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model, plain or wrapped by PEFT.

    Args:
        model: a transformers causal LM, or a PeftModel around one. Under PEFT with `modules_to_save` the head is the
            trained copy, or the original one while the adapter is disabled.
    Returns:
        Head: cheap to make; call it again after the weight has been replaced.
    Raises:
        ValueError: no output embeddings, LoRA on the head itself, or a weight that is sharded over ranks.
    Example:
        >>> head = head_of(model)                                                      # doctest: +SKIP
        >>> stats = linear_token_stats(hidden, head.weight, labels, **head.options)    # doctest: +SKIP
    """
    module, config = output_layer(model), _text_config(model)
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"model: its output head carries an adapter ({type(module).__name__}), and the loss is computed from the "
            "head's weight alone; leave lm_head out of lora_target_modules, or train it whole with modules_to_save."
        )
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2 or type(weight.data).__name__ == "DTensor":
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"model: its output head ({type(module).__name__}) has no whole [V, D] weight here, got {shape}; under FSDP2 it "
            "is whole after a forward of backbone_hidden_states, under ZeRO-3 inside with_head (load the model by its name, or "
            "before the training arguments), under tensor parallelism never: use FSDP2, ZeRO or plain data parallelism."
        )
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(weight, getattr(module, "bias", None), softcap, float(scale))


def output_layer(model: nn.Module) -> nn.Module:
    """The module of the head that is in use, under PEFT with `modules_to_save` the trained copy or the original one."""
    module: Any = _head_module(model)
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        copies = module.modules_to_save
        module = module.original_module if module.disable_adapters else copies[module.active_adapters[0]]
    used: nn.Module = module
    return used


def with_head(model: nn.Module, call: Callable[[Head, Tensor], Any], hidden_states: Tensor) -> Any:
    """`call(head_of(model), hidden_states)`, at a time when the head is whole.

    Under ZeRO-3 a weight is whole within a forward of its own module, and again while the backward passes through what that
    forward returned. So the call becomes, once, the forward of the head's module: the engine gathers the weight for it, and
    reduces and scatters its gradient, as it does for every layer.

    Args:
        model: as for `backbone_hidden_states`, which must have been called before.
        call: a function of the head and the hidden states; it returns tensors, or tuples of them.
        hidden_states: differentiable; what `call` returns depends on the model through them and the head alone.
    Raises:
        ValueError: as `head_of`.
    """
    layer = output_layer(model)
    if not hasattr(getattr(layer, "weight", None), "ds_id"):
        return call(head_of(model), hidden_states)
    layer.forward = lambda hidden: call(head_of(model), hidden)
    try:
        return layer(hidden_states)
    finally:
        del layer.forward


def backbone_hidden_states(
    model: nn.Module,
    input_ids: Tensor,  # [B, L] int64
    attention_mask: Tensor | None = None,  # [B, L], 0 at padding
    position_ids: Tensor | None = None,  # [B, L] int64
    **inputs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The hidden states that the head reads, and the router loss of a mixture of experts; no logits are formed.

    Args:
        model: as for `head_of`, a DistributedDataParallel around one, or one that `fully_shard` was applied to.
        input_ids, attention_mask, position_ids, inputs: as the model's forward takes them.
    Returns:
        hidden_states [B, L, D], differentiable; and the scalar aux_loss where the model returns one, else None.
    Raises:
        ValueError: the model's forward never calls its output embeddings.
    """
    inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
    given = {name: value for name, value in inputs.items() if value is not None}
    hidden, outputs = forward_without_logits(
        model, model, input_ids.shape, input_ids=input_ids, use_cache=False, **given
    )
    return hidden, getattr(outputs, "aux_loss", None)


def forward_without_logits(
    model: nn.Module, forward: Callable[..., Any], shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """`forward(*args, **kwargs)` with the head handed zero tokens: the hidden states it would have read, and the outputs.

    The model's own forward runs whole, so wrappers (DDP, FSDP2, PEFT, autocast, activation checkpointing) see a normal
    call. Under FSDP2 the head's unit is told to stay gathered until its backward, as a root's does by default: the loss reads
    the weight after the head's forward, and its gradient then leaves with the unit's own.

    Args:
        model: as for `backbone_hidden_states`.
        forward: the model, or a forward of its own.
        shape: (B, L) of the tokens.
    Returns:
        hidden_states [B, L, D], differentiable; and what `forward` returned, its logits empty.
    Raises:
        ValueError: the forward does not call its output embeddings once over all tokens.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs.pop("input")
        caught.append(hidden)
        return (hidden[:, :0], *args[1:]), kwargs

    module: Any
    for module in (model, _head_module(model)):
        if hasattr(module, "set_reshard_after_forward"):  # FSDPModule; no import of torch.distributed.fsdp without it
            module.set_reshard_after_forward(False, recurse=False)
    hook = _head_module(model).register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        outputs = forward(*args, **kwargs)
    finally:
        hook.remove()
    if len(caught) != 1 or caught[0].shape[:2] != shape:
        seen = ", ".join(" x ".join(map(str, hidden.shape[:2])) for hidden in caught) or "none"
        raise ValueError(
            f"model: the forward of {type(unwrap(model)).__name__} called its output head {len(caught)} times, over {seen} "
            f"tokens, where once over all {' x '.join(map(str, shape))} was expected; this architecture, or this call of it, "
            "is not supported."
        )
    return caught[0], outputs


@torch.no_grad()
def check_head(model: nn.Module, num_tokens: int = 8, tolerance: float | None = None) -> float:
    """Compare the model's own logits on a few tokens with those from `head_of` and `backbone_hidden_states`.

    Args:
        model: as for `head_of`. It is run in evaluation mode, and its mode restored.
        num_tokens: length of the sequence of token ids tried.
        tolerance: largest error relative to the largest logit; None for the larger of 1e-4
            and 4 units in the last place of the dtype.
    Returns:
        The relative error found.
    Raises:
        ValueError: the two differ by more than `tolerance`; the message says by how much.
    """
    head = head_of(model)
    ids = torch.arange(1, num_tokens + 1, device=head.weight.device)[None] % head.weight.shape[0]
    with evaluation_mode(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden, _ = backbone_hidden_states(model, ids)
    got = head.logits(hidden.to(head.weight.dtype)).float()
    if tolerance is None:
        tolerance = default_tolerance(head.weight.dtype)
    error = float("inf")
    if got.shape == expected.shape:
        error = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not error <= tolerance:
        raise ValueError(
            f"model: the logits of {type(unwrap(model)).__name__} are off by {error:.2g} (relative; at most "
            f"{tolerance:.2g} allowed) from its head's weight with bias={'yes' if head.bias is not None else 'no'}, "
            f"logit_scale={head.logit_scale:g}, softcap={head.softcap}; this architecture does more after its head "
            "and is not supported."
        )
    return error


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative; what two ways of computing a head in this dtype may differ by."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP or DeepSpeed's engine, and PEFT."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _text_config(model: nn.Module) -> Any:
    config = unwrap(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _head_module(model: Any) -> Any:
    model = unwrap(model)
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(
            f"model: {type(model).__name__} has no output embeddings; give a causal language model "
            "(AutoModelForCausalLM), not a bare backbone."
        )
    return module

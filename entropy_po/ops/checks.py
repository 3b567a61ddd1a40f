"""Argument checks of the public operators. Every message names the argument, what it got, and what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_po.types import TokenStats, Transform

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_outputs(outputs: tuple[str, ...]) -> tuple[str, ...]:
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    unknown = [name for name in outputs if name not in TokenStats._fields]
    if unknown or not outputs:
        raise ValueError(f"outputs={outputs!r} must name one or more of {TokenStats._fields}.")
    return outputs


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}.")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} has dtype {tensor.dtype}; use float32, bfloat16, float16 or float64.")


def check_head(hidden_states: Tensor, weight: Tensor, labels: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
    """hidden_states [N, D] and weight [V, D], as autocast would have them, checked against each other and labels [N]."""
    hidden_name, weight_name = f"{prefix}hidden_states", f"{prefix}weight"
    check_matrix(hidden_name, hidden_states, "[N, D]")
    check_matrix(weight_name, weight, "[V, D]")
    if hidden_states.ndim != 2 or weight.ndim != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} has shape {tuple(hidden_states.shape)} and {weight_name} {tuple(weight.shape)}; expected "
            "[N, D] and [V, D] with the same D (flatten batch and sequence first)."
        )
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and hidden_states.dtype != torch.float64:
        autocast = torch.get_autocast_dtype(device_type)
        hidden_states, weight = hidden_states.to(autocast), weight.to(autocast)
    if weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"{weight_name} has dtype {weight.dtype}, {hidden_name} {hidden_states.dtype}; convert one, or use autocast."
        )
    check_device(weight_name, weight, hidden_states.device)
    check_labels(labels, hidden_states.shape[:1], hidden_states.device)
    return hidden_states, weight


def check_labels(labels: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be an int64 tensor, got {got}; use labels.long().")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(shape)}: one label per row.")
    check_device("labels", labels, device)


def check_offsets(cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else cu_seqlens
        raise ValueError(f"cu_seqlens must be a 1-D int32 or int64 tensor of offsets, got {got!r}.")
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens is empty; it starts with 0 and ends with the number of rows.")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other inputs are on {device}; move it there.")


def check_label_range(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Runs inside the operator, on CPU only: reading values would stall a CUDA stream (there a bad label gives NaN)."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"labels[{row}]={int(labels[row])} is outside [0, {vocab_size}) and is not ignore_index={ignore_index}; "
            "use ignore_index for rows without a label."
        )


def make_transform(
    rows: int,
    vocab_size: int,
    device: torch.device,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    bias: Tensor | None,
    keep_mask: Tensor | None,
) -> Transform:
    """Check the transform's arguments and gather them into one value."""
    row_temperature = None
    if isinstance(temperature, Tensor):
        if temperature.numel() not in (1, rows):
            raise ValueError(
                f"temperature has {temperature.numel()} entries for {rows} rows; give a float or one entry per row."
            )
        check_device("temperature", temperature, device)
        if device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
            raise ValueError(f"temperature has an entry of {float(temperature.min())}; every entry must be > 0.")
        row_temperature = temperature.detach().reshape(-1).expand(rows)
        temperature = 1.0
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a finite number > 0; use 1.0 for the model's own.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be a finite number > 0; use None for no cap.")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale={logit_scale} must be a finite number > 0; use 1.0 for no scale.")
    if bias is not None:
        if tuple(bias.shape) != (vocab_size,):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected ({vocab_size},): one entry per vocabulary id."
            )
        check_device("bias", bias, device)
    if keep_mask is not None:
        if keep_mask.dtype != torch.bool:
            raise ValueError(f"keep_mask has dtype {keep_mask.dtype}; it must be bool, True for entries that stay.")
        keep_mask = keep_mask.reshape(-1, keep_mask.shape[-1])
        if keep_mask.shape[0] not in (1, rows) or keep_mask.shape[1] != vocab_size:
            raise ValueError(
                f"keep_mask has shape {tuple(keep_mask.shape)}, expected ({rows}, {vocab_size}), or ({vocab_size},) for "
                "a mask that all rows share."
            )
        check_device("keep_mask", keep_mask, device)
    return Transform(logit_scale, softcap, temperature, row_temperature, bias, keep_mask)

"""Argument checks of the public operators. Every message names the argument, what it got, and what to do."""

from __future__ import annotations

import reprlib
from numbers import Real

import torch
from torch import Tensor

from entropy_po.tiles import BACKENDS_BY_DEVICE
from entropy_po.types import OutputName, TokenStats, Transform

# Of temperature, softcap and logit scale. Beyond, their quotients leave the range of fp32.
SMALLEST, LARGEST = 1e-12, 1e12
# Of logit_scale / temperature. Kernels take the maximum off by one fused multiply-add, so what is left of it is half the last place of
# the transformed maximum; at 2^30, logits of a thousand, that is as much as exp bears in fp32.
STEEPEST = 1e6
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_outputs(outputs: tuple[OutputName, ...]) -> tuple[OutputName, ...]:
    names = (outputs,) if isinstance(outputs, str) else outputs
    if not isinstance(names, (tuple, list, set, frozenset)) or not names or not set(names) <= set(TokenStats._fields):
        raise ValueError(f"outputs={outputs!r} must name one or more of {TokenStats._fields}.")
    return tuple(names)


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}.")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} has dtype {tensor.dtype}; use float32, bfloat16, float16 or float64.")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}; use {name}.to_dense().")
    check_loaded(name, tensor)


def check_loaded(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, which holds no values; load it first.")
    if tensor.device.type not in BACKENDS_BY_DEVICE:
        raise ValueError(
            f"{name} is on {tensor.device}, which these operators do not serve; move it to a CPU or a CUDA, ROCm or XPU GPU."
        )


def check_head(
    hidden_states: Tensor, weight: Tensor, names: tuple[str, str] = ("hidden_states", "weight")
) -> tuple[Tensor, Tensor]:
    """hidden_states [N, D] and weight [V, D], as autocast would have them, checked against each other."""
    hidden_name, weight_name = names
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
    check_loaded("cu_seqlens", cu_seqlens)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens is empty; it starts with 0 and ends with the number of rows.")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other inputs are on {device}; move it there.")


def check_values(
    labels: Tensor, vocab_size: int, ignore_index: int, row_temperature: Tensor | None, logit_scale: float
) -> None:
    """Runs inside the operators, on CPU only: reading values would stall a CUDA stream (there a bad one gives NaN)."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"labels[{row}]={int(labels[row])} is outside [0, {vocab_size}) and is not ignore_index={ignore_index}; "
            "use ignore_index for rows without a label."
        )
    if row_temperature is not None:
        bad = ~((row_temperature >= SMALLEST) & (row_temperature <= LARGEST))
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"temperature has an entry of {float(row_temperature[row]):g} at row {row}; every entry must be > 0, from "
                f"{SMALLEST:g} to {LARGEST:g}."
            )
        if row_temperature.numel():
            row = int(row_temperature.argmin())
            _check_steepness(f"temperature[{row}]", float(row_temperature[row]), logit_scale)


def _check_steepness(name: str, temperature: float, logit_scale: float) -> None:
    if logit_scale / temperature > STEEPEST * (1 + 1e-6):  # as 1e-6 rounds in fp32
        raise ValueError(
            f"{name}={temperature:g} and logit_scale={logit_scale:g} multiply logits by {logit_scale / temperature:g}, and kernels "
            f"bear at most {STEEPEST:g}; raise the temperature."
        )


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")


def check_int(name: str, value: int, remedy: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={reprlib.repr(value)} must be an int of 64 bits; {remedy}.")


def check_workspace(workspace_bytes: int | None) -> None:
    if workspace_bytes is not None:
        check_int("workspace_bytes", workspace_bytes, "give a whole number of bytes, or None for the default")


def check_number(name: str, value: float, remedy: str) -> None:
    if not isinstance(value, Real) or not SMALLEST <= value <= LARGEST:
        raise ValueError(
            f"{name}={reprlib.repr(value)} must be a finite number > 0, from {SMALLEST:g} to {LARGEST:g}; {remedy}."
        )


def check_bias(name: str, bias: Tensor | None, vocab_size: int, device: torch.device) -> None:
    if bias is None:
        return
    check_matrix(name, bias, "[V]")
    if tuple(bias.shape) != (vocab_size,):
        raise ValueError(
            f"{name} has shape {tuple(bias.shape)}, expected ({vocab_size},): one entry per vocabulary id."
        )
    check_device(name, bias, device)


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
    check_number("logit_scale", logit_scale, "use 1.0 for no scale")
    row_temperature = None
    if isinstance(temperature, Tensor):
        if temperature.numel() not in (1, rows):
            raise ValueError(
                f"temperature has {temperature.numel()} entries for {rows} rows; give a float or one entry per row."
            )
        check_device("temperature", temperature, device)
        row_temperature = temperature.detach().reshape(-1).expand(rows)
        temperature = 1.0
    else:
        check_number("temperature", temperature, "use 1.0 for the model's own")
        _check_steepness("temperature", temperature, logit_scale)
    if softcap is not None:
        check_number("softcap", softcap, "use None for no cap")
    check_bias("bias", bias, vocab_size, device)
    if keep_mask is not None:
        if not isinstance(keep_mask, Tensor) or keep_mask.dtype != torch.bool or keep_mask.ndim == 0:
            got = (
                f"{keep_mask.dtype} {tuple(keep_mask.shape)}"
                if isinstance(keep_mask, Tensor)
                else type(keep_mask).__name__
            )
            raise ValueError(f"keep_mask must be a bool tensor [..., V], True for entries that stay; got {got}.")
        keep_mask = keep_mask[None].flatten(0, -2)
        if keep_mask.shape[0] not in (1, rows) or keep_mask.shape[1] != vocab_size:
            raise ValueError(
                f"keep_mask has shape {tuple(keep_mask.shape)}, expected ({rows}, {vocab_size}), or ({vocab_size},) for "
                "a mask that all rows share."
            )
        check_device("keep_mask", keep_mask, device)
    return Transform(logit_scale, softcap, temperature, row_temperature, bias, keep_mask)


def check_linear(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    keep_mask: Tensor | None,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Transform]:
    """What every operator on a head checks: (hidden_states, weight), as autocast would have them, and the transform."""
    hidden_states, weight = check_head(hidden_states, weight)
    check_labels(labels, hidden_states.shape[:1], hidden_states.device)
    check_workspace(workspace_bytes)
    transform = make_transform(
        hidden_states.shape[0],
        weight.shape[0],
        hidden_states.device,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        bias=bias,
        keep_mask=keep_mask,
    )
    return hidden_states, weight, transform

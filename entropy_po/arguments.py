"""Checks of plain arguments. Every message names the argument, what it got, and what to do."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from numbers import Integral, Real

import torch
from torch import Tensor

REAL_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def real(name: str, value: float, remedy: str, above: float = -math.inf, rule: str = "") -> float:
    """The value as a float if it is finite and > above."""
    if isinstance(value, Real) and above < value < math.inf:
        with suppress(OverflowError):  # an int that no float holds
            return float(value)
    raise ValueError(f"{name} must be a finite number{rule}, got {reprlib.repr(value)}; {remedy}")


def positive(name: str, value: float, remedy: str) -> float:
    return real(name, value, remedy, above=0.0, rule=" > 0")


def non_negative(name: str, value: float, remedy: str) -> float:
    return real(name, value, remedy, above=-math.ulp(0.0), rule=" >= 0")


def whole(name: str, value: int, low: int, remedy: str) -> int:
    """The value if it is an int of 64 bits and >= low."""
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= value < 2**63:
        return int(value)
    raise ValueError(f"{name} must be a whole number >= {low}, got {reprlib.repr(value)}; {remedy}")


def at_least_fp32(name: str, x: Tensor) -> Tensor:
    """A dense tensor of real numbers in fp32, or in fp64 if it is that."""
    _check_real(name, x)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def same_shape(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Two dense tensors of real numbers with one shape."""
    _check_real(name, tensor)
    _check_real(like_name, like)
    # Equal, not broadcastable: [B] with [B, 1] would pair every response with every other.
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name} {tuple(like.shape)}, got {tuple(tensor.shape)}; reshape it"
        )


def _check_real(name: str, x: Tensor) -> None:
    if isinstance(x, Tensor) and x.dtype in REAL_DTYPES and x.layout == torch.strided:
        return
    got = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
    raise ValueError(f"{name} must be a dense tensor of real numbers, got {got}; convert it")


def texts(name: str, values: Sequence[str]) -> None:
    # a text is a sequence of texts too, of one letter each
    if isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values):
        return
    raise ValueError(f"{name} must be a list of texts, got {reprlib.repr(values)}; put a single text into a list")


def numbers(name: str, values: Sequence[float]) -> Tensor:
    """[n] in fp64, n >= 1, finite; from a list, an array or a tensor."""
    x = None
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        x = torch.as_tensor(values, dtype=torch.float64)
    if x is None or x.dim() != 1 or len(x) == 0 or not bool(x.isfinite().all()):
        raise ValueError(
            f"{name} must be one finite number or more, got {reprlib.repr(values)}; leave out what has none"
        )
    return x


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={reprlib.repr(value)} is unknown; choose one of {', '.join(choices)}.")

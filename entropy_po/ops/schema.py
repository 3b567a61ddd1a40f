"""What the registered operators share: the library, the flat form of their options, and their fixed-arity results.

A `torch.library` schema has neither dataclasses nor optional results, so a `Transform` crosses it flattened, outputs as
names, and an output that was not asked for as an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_po.ops import checks, parallel
from entropy_po.ops.parallel import VocabShards
from entropy_po.tiles import BACKENDS_BY_DEVICE
from entropy_po.types import TokenStats, Transform, state_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FlatOptions = tuple[Any, ...]  # a call's options as they lie in OPTIONS
LIBRARY = torch.library.Library("entropy_po", "DEF")

# Flat spelling of Transform (less the bias, which is differentiable) and of the options that every operator has.
OPTIONS = (
    "Tensor? row_temperature, Tensor? keep_mask, float temperature, float logit_scale, float? softcap, "
    "int ignore_index, str[] outputs, str backend, str vocab_group"
)
STATS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
FIELDS = TokenStats._fields


def register_kernel(name: str, kernel: Callable[..., Any]) -> None:
    """The operator's implementation, one for every device that a tile backend serves."""
    for device in BACKENDS_BY_DEVICE:
        LIBRARY.impl(name, kernel, device.upper())


def flat_options(
    transform: Transform,
    ignore_index: int,
    outputs: tuple[str, ...],
    backend: str | None,
    vocab_group: ProcessGroup | None,
) -> FlatOptions:
    checks.check_int("ignore_index", ignore_index, "it marks rows without a label")
    if backend is not None and not isinstance(backend, str):
        raise ValueError(f"backend={backend!r} must be a name from available_backends(), or None to choose by device.")
    t = transform
    options = t.row_temperature, t.keep_mask, float(t.temperature), float(t.logit_scale), t.softcap
    return *options, ignore_index, list(outputs), backend or "", parallel.group_name("vocab_group", vocab_group)


def transform_from_options(options: FlatOptions, bias: Tensor | None = None) -> Transform:
    row_temperature, keep_mask, temperature, logit_scale, softcap = options[:5]
    return Transform(logit_scale, softcap, temperature, row_temperature, bias, keep_mask)


def vocab_shards(columns: int, labels: Tensor, options: FlatOptions, **facts: object) -> VocabShards:
    """This rank's part of the vocabulary, once the ranks agree on labels, options and whatever else the caller names."""
    names = "temperature", "logit_scale", "softcap", "ignore_index", "outputs"
    return VocabShards(options[8], columns, labels, **dict(zip(names, options[2:7], strict=True)), **facts)


def empty_stats(n: int | torch.SymInt, outputs: list[str], like: Tensor) -> list[Tensor]:
    """The six results of a fold, uninitialised: [n] where asked for, [0] where not."""
    dtype = state_dtype(like.dtype)
    return [
        like.new_empty((n if name in outputs else 0,), dtype=torch.bool if name == "is_top1" else dtype)
        for name in FIELDS
    ]


def flat_stats(stats: TokenStats, like: Tensor) -> list[Tensor]:
    """The same results of a fold that has been made."""
    empty = empty_stats(0, [], like)
    return [made if value is None else value for value, made in zip(stats, empty, strict=True)]


def token_stats_from_flat(results: tuple[Tensor, ...], outputs: tuple[str, ...], shape: torch.Size) -> TokenStats:
    """Back to a TokenStats in the labels' shape, None where an output was not asked for."""
    return TokenStats(
        *(r.reshape(shape) if name in outputs else None for name, r in zip(FIELDS, results, strict=False))
    )


def refuse_second_order(name: str) -> None:
    """A backward that is itself recorded (create_graph=True) would drop the second-order term with a warning."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} is differentiable once; call backward without create_graph=True.")

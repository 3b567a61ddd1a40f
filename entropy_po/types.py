"""The values that cross the layers: the logit transform, the row state of a fold, and what the operators return."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# A Tensor where it was asked for, None where not: which of the two, the caller knows, and `Any` spares a check of it.
IfAsked = Tensor | Any
OutputName = Literal["logps", "entropy", "lse", "is_top1", "mean_logit", "log_sum_sq_probs"]  # fields of TokenStats


class TokenStats(NamedTuple):
    """Per-token statistics of a distribution over the vocabulary; `None` where not asked for.

    Every field has the shape of `labels`, fp32 (fp64 for fp64 input), and is 0 where the label is `ignore_index`.
    `logps` and `entropy` are differentiable, the others are not.
    """

    logps: IfAsked = None  # log p(label), nats
    entropy: IfAsked = None  # -sum_j p_j log p_j, nats
    lse: IfAsked = None  # log sum_j exp(z_j)
    is_top1: IfAsked = None  # bool: no logit is above the label's
    mean_logit: IfAsked = None  # mean of z_j over the entries with z_j > -inf
    log_sum_sq_probs: IfAsked = None  # log sum_j p_j^2: minus the Renyi-2 entropy, nats


class Level(IntEnum):
    """How much a fold accumulates; the values are those of csrc/tile.h."""

    LOGPS = 0  # enough for logps, lse, is_top1
    ENTROPY = 1
    EXTRAS = 2  # mean_logit, log_sum_sq_probs

    @classmethod
    def for_outputs(cls, outputs: tuple[str, ...]) -> Level:
        if "mean_logit" in outputs or "log_sum_sq_probs" in outputs:
            return cls.EXTRAS
        return cls.ENTROPY if "entropy" in outputs else cls.LOGPS


@dataclass(frozen=True)
class Transform:
    """From raw logits x to the z that the softmax sees, in the order the models apply it.

        z = softcap * tanh((x + bias) * logit_scale / softcap) / temperature,    -inf where keep_mask is False

    A raw logit of -inf stays -inf under a softcap: it means "not in the vocabulary".
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    row_temperature: Tensor | None = None  # [n], replaces `temperature`
    bias: Tensor | None = None  # [v]
    keep_mask: Tensor | None = None  # bool, broadcastable to [n, v]; True stays in the softmax

    def tile(self, rows: slice | Tensor, cols: slice, dtype: torch.dtype) -> Transform:
        """The transform of the tile [rows, cols], its vectors in the dtype of the tile's arithmetic."""
        row_temperature, bias, keep_mask = self.row_temperature, self.bias, self.keep_mask
        if row_temperature is not None:
            row_temperature = row_temperature[rows].to(dtype).contiguous()
        if bias is not None:
            bias = bias[cols].to(dtype).contiguous()
        if keep_mask is not None:
            keep_mask = keep_mask[..., cols] if keep_mask.shape[-1] > 1 else keep_mask
            if keep_mask.ndim == 2 and keep_mask.shape[0] > 1:
                keep_mask = keep_mask[rows]
        return replace(self, row_temperature=row_temperature, bias=bias, keep_mask=keep_mask)


# Rows of the state tensor [rows, n] that `fold_` accumulates, relative to the running maximum m (kernels/README.md):
#   m, s = sum exp(z - m), t = sum exp(z - m) (z - m), label_d = z_label - m, label_z; at Level.EXTRAS also
#   q = sum exp(z - m)^2, c = sum of z - m over live entries, live = how many entries are above -inf.
STATE_ROWS = {Level.LOGPS: 5, Level.ENTROPY: 5, Level.EXTRAS: 8}


# Of a row of which nothing is folded: a label that no tile has held reads NaN, not 0.
EMPTY = (-torch.inf, 0, 0, torch.nan, torch.nan, 0, 0, 0)
# Of a row that is not computed: every output made of it is 0.
IGNORED = (0, 1, 0, 0, -1, 1, 0, 1)


def new_state(n: int, level: Level, like: Tensor) -> Tensor:
    """The row state of `n` rows of which nothing is folded."""
    state = state_memory(n, level, like)
    return state.copy_(state_column(EMPTY, state))


def state_memory(n: int, level: Level, like: Tensor) -> Tensor:
    """What `fold_` makes a row state of with the first of a row's tiles."""
    return torch.empty((STATE_ROWS[level], n), dtype=state_dtype(like.dtype), device=like.device)


def state_column(values: tuple[float, ...], state: Tensor) -> Tensor:
    """EMPTY or IGNORED as a column [5 or 8, 1] of a state."""
    return torch.tensor(values[: len(state)], dtype=state.dtype, device=state.device)[:, None]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic and outputs are fp32, except that an fp64 input is served in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_states(states: Tensor, owner: Tensor) -> Tensor:
    """The state [rows, n] of the whole vocabulary from those of its P parts, [P, rows, n], each relative to its own maximum.

    The label's terms are those of the part `owner` [n]. Sums run over the parts in their order, in fp64.
    """
    parts = states.double()
    part_m, s, t, label_d, label_z = parts[:, :5].unbind(1)
    m = part_m.amax(0)
    # a part without a live entry has sums of 0, to which any finite distance will do
    delta = torch.where(part_m == -torch.inf, 0, part_m - m)
    shrink = delta.exp()

    def at_owner(values: Tensor) -> Tensor:
        return values.gather(0, owner[None])[0]

    moved = torch.where(shrink == 0, 0, (t + s * delta) * shrink)  # of an infinity perhaps
    merged = [m, (s * shrink).sum(0), moved.sum(0), at_owner(label_d + delta), at_owner(label_z)]
    if states.shape[1] > len(merged):
        q, c, live = parts[:, 5:].unbind(1)
        merged += [(q * shrink**2).sum(0), (c + live * delta).sum(0), live.sum(0)]
    return torch.stack(merged).to(states.dtype)


def exact_logps(state: Tensor) -> Tensor:
    """Log-probs [n] of a complete state in fp64. Rounded to fp32, as an output is, each of 12 nats would be off by up to 5e-7, and a sum
    over a long answer by what adds up."""
    return state[3].double() - state[1].double().log()


def stats_from_state(state: Tensor, outputs: tuple[str, ...]) -> TokenStats:
    """What a complete state [5 or 8, n] says of its rows: the specification of `entropy_po.tiles.stats`."""
    m, s, t, _, label_z = state[:5].double().unbind()
    log_s = s.log()
    made: dict[str, Tensor] = {}
    if "logps" in outputs:
        made["logps"] = exact_logps(state)
    if "entropy" in outputs:
        made["entropy"] = (log_s - t / s).clamp_min(0)
    if "lse" in outputs:
        made["lse"] = m + log_s
    if "is_top1" in outputs:
        made["is_top1"] = label_z >= m
    if "mean_logit" in outputs:
        made["mean_logit"] = m + state[6].double() / state[7].double()
    if "log_sum_sq_probs" in outputs:
        made["log_sum_sq_probs"] = state[5].double().log() - 2 * log_s
    return TokenStats(**{k: v if v.dtype == torch.bool else v.to(state.dtype) for k, v in made.items()})

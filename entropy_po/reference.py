"""The specification in plain torch, any dtype and device: the truth of the tests, and the backend of last resort.

`token_stats` is the whole operator, differentiable by autograd. `fold_` and `grad_` are the tile interface, for machines
where neither the compiled core nor Triton is at hand; they allocate temporaries of the tile's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_po.types import EMPTY, IGNORED, Level, TokenStats, Transform, state_column, state_dtype


def transformed(logits: Tensor, transform: Transform) -> Tensor:
    """z of `Transform` for logits [n, v], differentiable; in fp32 (fp64 for fp64 input)."""
    x = logits.to(state_dtype(logits.dtype))
    if transform.bias is not None:
        x = x + transform.bias.to(x.dtype)
    live = x > -torch.inf
    z = x * transform.logit_scale
    if transform.softcap is not None:
        capped = transform.softcap * torch.tanh(z / transform.softcap)
        z = torch.where(live, capped, z)
    if transform.row_temperature is not None:
        z = z / transform.row_temperature.to(z.dtype)[:, None]
    else:
        z = z / transform.temperature
    if transform.keep_mask is not None:
        z = z.masked_fill(~transform.keep_mask, -torch.inf)
    return z


def _slope(logits: Tensor, transform: Transform) -> Tensor:
    """dz / dlogits of `transformed`, [n, v] or what broadcasts to it; anything where z is -inf.

    Not by autograd: inside an operator of torch.library nothing is recorded."""
    slope = torch.full_like(logits[:, :1], transform.logit_scale)
    if transform.row_temperature is not None:
        slope = slope / transform.row_temperature.to(slope.dtype)[:, None]
    else:
        slope = slope / transform.temperature
    if transform.softcap is not None:
        x = logits if transform.bias is None else logits + transform.bias.to(logits.dtype)
        slope = slope * (1 - torch.tanh(x * transform.logit_scale / transform.softcap) ** 2)
    return slope


def token_stats(logits: Tensor, labels: Tensor, transform: Transform, ignore_index: int = -100) -> TokenStats:
    """All of `TokenStats` for logits [n, v] and labels [n], through the full softmax.

    With z the transformed logits and p = softmax(z): logps = log p[label], entropy = -sum_{p_j > 0} p_j log p_j.
    """
    ignored = labels == ignore_index
    index = labels.masked_fill(ignored, 0)[:, None]
    z = transformed(logits, transform)
    live = z > -torch.inf
    log_p = torch.log_softmax(z, dim=-1)
    logps = log_p.gather(1, index)[:, 0]
    # masked before the product: 0 * -inf would be NaN, in the value and again in the gradient
    entropy = -(log_p.exp() * log_p.masked_fill(~live, 0)).sum(-1)
    mean_logit = z.masked_fill(~live, 0).sum(-1) / live.sum(-1)
    values = (
        logps,
        entropy,
        z.logsumexp(-1),
        z.gather(1, index)[:, 0] >= z.amax(-1) if z.shape[0] else ignored,
        mean_logit,
        (2 * log_p).logsumexp(-1),
    )
    return TokenStats(*(torch.where(ignored, torch.zeros_like(v), v) for v in values))


def fold_(
    tile: Tensor,
    labels: Tensor,
    vocab_start: int,
    state: Tensor,
    transform: Transform,
    *,
    level: Level,
    ignore_index: int,
    first: bool = False,
) -> None:
    """Accumulate a tile [n, v] into `state` in place; see `entropy_po.tiles.fold_`."""
    if first:
        ignored, empty = state_column(IGNORED, state), state_column(EMPTY, state)
        state.copy_(torch.where(labels == ignore_index, ignored, empty))
    z = transformed(tile, transform)
    if z.shape[1] == 0 or z.shape[0] == 0:
        return
    old_m = state[0]
    new_m = torch.maximum(old_m, z.amax(-1))
    shrink = torch.where(
        old_m == new_m, torch.zeros_like(old_m), old_m - new_m
    )  # -inf for a row with nothing folded yet
    factor = shrink.exp()
    shift = torch.where(new_m == -torch.inf, torch.zeros_like(new_m), new_m)
    d = z - shift[:, None]
    e = d.exp()
    finite_d = d.masked_fill(d == -torch.inf, 0)
    updated = state.clone()
    updated[0] = new_m
    updated[1] = state[1] * factor + e.sum(-1)
    finite_shrink = shrink.masked_fill(shrink == -torch.inf, 0)
    if level >= Level.ENTROPY:
        moved = (state[2] + state[1] * finite_shrink) * factor  # of an infinity perhaps, where the factor is 0
        updated[2] = moved.masked_fill(factor == 0, 0) + (e * finite_d).sum(-1)
    index = labels - vocab_start
    here = (index >= 0) & (index < tile.shape[1])
    label_z = z.gather(1, index.clamp(0, tile.shape[1] - 1)[:, None])[:, 0]
    updated[3] = torch.where(here, label_z - shift, state[3] + finite_shrink)
    updated[4] = torch.where(here, label_z, state[4])
    if level >= Level.EXTRAS:
        updated[5] = state[5] * factor**2 + (e * e).sum(-1)
        updated[6] = state[6] + state[7] * finite_shrink + finite_d.sum(-1)
        updated[7] = state[7] + (z > -torch.inf).sum(-1)
    state.copy_(torch.where(labels == ignore_index, state, updated))


def grad_(
    tile: Tensor,
    labels: Tensor,
    vocab_start: int,
    state: Tensor,
    g_logp: Tensor | None,
    g_ent: Tensor | None,
    transform: Transform,
    *,
    ignore_index: int,
    out: Tensor,
) -> None:
    """Write d loss / d tile into `out`; see `entropy_po.tiles.grad_`."""
    z = transformed(tile, transform)
    m, s, t = state[0], state[1], state[2]
    d = z - m[:, None]
    p = d.exp() / s[:, None]
    gz = torch.zeros_like(p)
    index = labels - vocab_start
    here = ((index >= 0) & (index < tile.shape[1]))[:, None]
    one_hot = torch.zeros_like(p).scatter_(1, index.clamp(0, max(tile.shape[1] - 1, 0))[:, None], here.to(p.dtype))
    active = labels != ignore_index
    if g_logp is not None:
        gz += g_logp[:, None] * (one_hot - p)
        active = active & ((g_logp != 0) | (g_ent != 0 if g_ent is not None else False))
    elif g_ent is not None:
        active = active & (g_ent != 0)
    if g_ent is not None:
        gz -= g_ent[:, None] * p * (d.masked_fill(d == -torch.inf, 0) - (t / s)[:, None])
    gx = gz * _slope(tile.to(state.dtype), transform)
    out.copy_(gx.masked_fill((z == -torch.inf) | ~active[:, None] | (s == 0)[:, None], 0))

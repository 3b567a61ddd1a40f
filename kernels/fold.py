"""fold: a tile of logits [n, v] into the row state, in one read.

One program owns one row and walks its columns in blocks; sums stay per lane until the row ends, so that a block costs
one reduction, its maximum. Traffic per row: its logits once, 28 to 72 bytes of label and state, which is read only where tiles
of the row came before. Nothing is shared between programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from entropy_po.kernels.config import (
    LaunchConfig,
    check_last_dim_contiguous,
    launch_config,
    on_device,
    rows_aligned,
    transform_arguments,
)
from entropy_po.kernels.row_math import (
    LEVEL_ENTROPY,
    LEVEL_EXTRAS,
    MINUS_INF,
    floored,
    rescale,
    row_pointer,
    row_scales,
    transformed,
)
from entropy_po.types import Level, Transform


@triton.jit
def _fold_block(u, k, m, s, t, q, c, live, LEVEL: tl.constexpr):
    m, s, t, q, c = rescale(m, s, t, q, c, live, tl.max(u, axis=0) * k, LEVEL)
    # Nothing but -inf so far: any finite reference gives exact zeros, and still lets a NaN through.
    raw = tl.fma(u, k, -tl.where(m == MINUS_INF, 0.0, m))
    d = floored(raw)
    e = tl.exp(d)
    if LEVEL >= LEVEL_ENTROPY:
        t += e * d
    s += e
    if LEVEL >= LEVEL_EXTRAS:
        alive = raw != MINUS_INF
        q += e * e
        c += tl.where(alive, raw, 0.0)
        live += tl.where(alive, 1.0, 0.0)
    return m, s, t, q, c, live


# Sizes, strides and offsets are not specialised on: no value of theirs compiles anew. What 16-byte loads need to know of
# the strides comes as one flag, ALIGNED; of the wide pointers, from Triton's own test of their alignment.
_RUNTIME = ["n_cols", "tile_stride", "state_stride", "keep_stride", "vocab_start", "ignore_index", "first"]
_ANY_ALIGNMENT = ["labels_ptr", "state_ptr", "row_temperature_ptr"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _fold_kernel(
    tile_ptr,  # [n_rows, n_cols], any row stride
    labels_ptr,  # [n_rows] int64
    state_ptr,  # [5 or 8, n_rows], updated
    bias_ptr,  # [n_cols] or None
    keep_ptr,  # [n_rows, n_cols] bytes or None
    row_temperature_ptr,  # [n_rows] or None
    n_cols,
    tile_stride,
    state_stride,
    keep_stride,
    vocab_start,
    ignore_index,
    first,  # 1: of the row's tiles; the state is written and not read
    k,
    before_tanh,
    slope_scale,
    LEVEL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP_STRIDE_V: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # before the first multiply: rows * stride passes 2^31
    label = tl.load(labels_ptr + row)
    state_ptr += row
    step = tl.full((), state_stride, tl.int64)
    if label == ignore_index:
        # entropy_po.types.IGNORED: every output made of it is 0
        tl.store(state_ptr, 0.0, mask=first != 0)
        tl.store(state_ptr + step, 1.0, mask=first != 0)
        tl.store(state_ptr + 2 * step, 0.0, mask=first != 0)
        tl.store(state_ptr + 3 * step, 0.0, mask=first != 0)
        tl.store(state_ptr + 4 * step, -1.0, mask=first != 0)
        if LEVEL >= LEVEL_EXTRAS:
            tl.store(state_ptr + 5 * step, 1.0, mask=first != 0)
            tl.store(state_ptr + 6 * step, 0.0, mask=first != 0)
            tl.store(state_ptr + 7 * step, 1.0, mask=first != 0)
        return
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    x_ptr = row_pointer(tile_ptr, row, tile_stride, ALIGNED)
    if keep_ptr is not None:
        keep_ptr = row_pointer(keep_ptr, row, keep_stride, ALIGNED)
    k, slope_scale = row_scales(k, slope_scale, row_temperature_ptr, row, dtype)

    # What earlier tiles left enters as the sums of lane 0.
    lanes = tl.arange(0, BLOCK_V)
    old = first == 0
    old_m = tl.load(state_ptr, mask=old, other=MINUS_INF)
    # spelled out: a module's constexpr is compared with itself at every launch, and a NaN has then changed
    old_label_d = tl.load(state_ptr + 3 * step, mask=old, other=float("nan"))
    old_label_z = tl.load(state_ptr + 4 * step, mask=old, other=float("nan"))
    m = old_m
    s = tl.where(lanes == 0, tl.load(state_ptr + step, mask=old, other=0.0), 0.0)
    t = tl.zeros_like(s)
    q = tl.zeros_like(s)
    c = tl.zeros_like(s)
    live = tl.zeros_like(s)
    if LEVEL >= LEVEL_ENTROPY:
        t = tl.where(lanes == 0, tl.load(state_ptr + 2 * step, mask=old, other=0.0), 0.0)
    if LEVEL >= LEVEL_EXTRAS:
        q = tl.where(lanes == 0, tl.load(state_ptr + 5 * step, mask=old, other=0.0), 0.0)
        c = tl.where(lanes == 0, tl.load(state_ptr + 6 * step, mask=old, other=0.0), 0.0)
        live = tl.where(lanes == 0, tl.load(state_ptr + 7 * step, mask=old, other=0.0), 0.0)

    # After each block m is the maximum so far and every sum is relative to it. Whole blocks go without a mask: one with an
    # arbitrary width would cut 16-byte loads into single elements.
    whole = n_cols // BLOCK_V * BLOCK_V
    for col in tl.range(0, whole, BLOCK_V, num_stages=NUM_STAGES):
        u, _ = transformed(x_ptr, col + lanes, None, bias_ptr, keep_ptr, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype)
        m, s, t, q, c, live = _fold_block(u, k, m, s, t, q, c, live, LEVEL)
    if whole < n_cols:
        offs_v = whole + lanes
        u, _ = transformed(
            x_ptr, offs_v, offs_v < n_cols, bias_ptr, keep_ptr, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype
        )
        m, s, t, q, c, live = _fold_block(u, k, m, s, t, q, c, live, LEVEL)

    # The label's logit is read once more, alone: comparing every column with it would cost more. A label of another tile
    # or of no tile is masked off and never read.
    index = label - vocab_start
    here = (index >= 0) & (index < n_cols)
    u, _ = transformed(x_ptr, index, here, bias_ptr, keep_ptr, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype)
    moved = tl.where(old_m == MINUS_INF, 0.0, old_m - m)
    label_d = tl.where(here, tl.fma(u, k, -tl.where(m == MINUS_INF, 0.0, m)), old_label_d + moved)
    label_z = tl.where(here, u * k, old_label_z)  # rounded as the maximum is, so that the two compare exactly

    tl.store(state_ptr, m)
    tl.store(state_ptr + step, tl.sum(s, axis=0))
    if LEVEL >= LEVEL_ENTROPY:
        tl.store(state_ptr + 2 * step, tl.sum(t, axis=0))
    else:
        tl.store(state_ptr + 2 * step, 0.0)
    tl.store(state_ptr + 3 * step, label_d)
    tl.store(state_ptr + 4 * step, label_z)
    if LEVEL >= LEVEL_EXTRAS:
        tl.store(state_ptr + 5 * step, tl.sum(q, axis=0))
        tl.store(state_ptr + 6 * step, tl.sum(c, axis=0))
        tl.store(state_ptr + 7 * step, tl.sum(live, axis=0))


def fold_(
    tile: Tensor,  # [n, v] fp32 / bf16 / fp16 / fp64, last dimension contiguous
    labels: Tensor,  # [n] int64
    vocab_start: int,
    state: Tensor,  # [5 or 8, n], updated
    transform: Transform,  # of this tile
    *,
    level: Level,
    first: bool = False,
    ignore_index: int = -100,
    config: LaunchConfig | None = None,  # None: by width and dtype
) -> None:
    """Accumulate a tile into the row state; see `entropy_po.tiles.fold_`."""
    check_last_dim_contiguous("tile", tile)
    if tile.numel() == 0:
        return
    config = config or launch_config("fold", tile)
    arguments = transform_arguments(tile, transform)
    with on_device(tile):
        _fold_kernel[(tile.shape[0],)](
            tile_ptr=tile,
            labels_ptr=labels.contiguous(),
            state_ptr=state,
            n_cols=tile.shape[1],
            tile_stride=tile.stride(0),
            state_stride=state.stride(0),
            vocab_start=vocab_start,
            ignore_index=ignore_index,
            first=int(first),
            LEVEL=int(level),
            ALIGNED=rows_aligned(tile, arguments["keep_ptr"]),
            BLOCK_V=config.block_v,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            **arguments,
        )

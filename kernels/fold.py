"""fold: a tile of logits [n, v] into the row state, in one read.

One program owns one row and walks its columns in blocks; a lane's sums, and the maximum that they are relative to, are its own
until the row ends: no thread waits for another before. Traffic per row: its logits once, 28 to 72 bytes of label and state,
which is read only where tiles of the row came before. Nothing is shared between programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from entropy_po.dispatch import on_device
from entropy_po.kernels.config import (
    LaunchConfig,
    alignment,
    check_last_dim_contiguous,
    compiler_options,
    launch_config,
    transform_arguments,
)
from entropy_po.kernels.row_math import (
    FLOOR_OF_U,
    LEVEL_ENTROPY,
    LEVEL_EXTRAS,
    LOG2E,
    LOWEST,
    LOWEST64,
    MINUS_INF,
    at_columns,
    before_boundary,
    body_end,
    edge_columns,
    exp2,
    floored,
    from_boundary,
    moved,
    row_pointer,
    row_scales,
    whole_block,
)
from entropy_po.types import Level, Transform


@triton.jit
def _fold_block(u, k2, top, s, t, q, c, live, LEVEL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Each lane takes what its own thread has loaded, so that nothing here waits for another thread."""
    u = tl.reshape(u, (u.shape[0] // (LANES * WIDTH), LANES, WIDTH))
    before = top
    top = tl.maximum(top, tl.max(tl.max(u, axis=2), axis=0))
    s, t, q, c = moved(before - top, exp2((before - top) * k2), s, t, q, c, live, LEVEL)
    d = u - top[None, :, None]
    e = exp2(d * k2)
    s += _per_lane(e)
    if LEVEL >= LEVEL_ENTROPY:
        t += _per_lane(e * floored(d, FLOOR_OF_U))
    if LEVEL >= LEVEL_EXTRAS:
        alive = u != MINUS_INF  # a NaN is
        q += _per_lane(e * e)
        c += _per_lane(tl.where(alive, d, 0.0))
        live += _per_lane(tl.where(alive, 1.0, 0.0))
    return top, s, t, q, c, live


@triton.jit
def _per_lane(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


# Sizes, strides and offsets are not specialised on: no value of theirs compiles anew. What 16-byte loads need to know comes
# as one flag, ALIGNED, and from Triton's own test of the wide pointers' alignment.
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
    ALIGNED: tl.constexpr,  # rows begin at multiples of 16 bytes and have a multiple of 16 columns,
    HAS_EDGES: tl.constexpr,  # but for their edges
    KEEP_ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,  # sums per row; a lane adds WIDTH neighbours at a time
    WIDTH: tl.constexpr,
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
    x_ptr = row_pointer(tile_ptr, row, tile_stride, ALIGNED and not HAS_EDGES)
    if keep_ptr is not None:
        keep_ptr = row_pointer(keep_ptr, row, keep_stride, KEEP_ALIGNED)
    k, slope_scale = row_scales(k, slope_scale, row_temperature_ptr, row, dtype)
    k2 = k * LOG2E

    # A lane's sums are relative to its own largest u, and d is a difference of two u: (6) of README.md.
    top = tl.full((LANES,), LOWEST64 if dtype == tl.float64 else LOWEST, dtype)
    s = tl.zeros((LANES,), dtype)
    t = tl.zeros((LANES,), dtype)
    q = tl.zeros((LANES,), dtype)
    c = tl.zeros((LANES,), dtype)
    live = tl.zeros((LANES,), dtype)
    x_body, bias_body, keep_body, n_body = x_ptr, bias_ptr, keep_ptr, n_cols
    if HAS_EDGES:
        head = before_boundary(tile_ptr, row, tile_stride)
        n_body = (tl.maximum(n_cols - head, 0) // 16 * 16).to(tl.int32)
        x_body = from_boundary(tile_ptr, row, tile_stride, head)
        if bias_ptr is not None:
            bias_body += head
        if keep_ptr is not None:
            keep_body += head * KEEP_STRIDE_V
    whole = n_body // BLOCK_V * BLOCK_V
    for col in tl.range(0, whole, BLOCK_V, num_stages=NUM_STAGES):
        u, _ = whole_block(
            x_body, bias_body, keep_body, col, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, BLOCK_V, ALIGNED, dtype
        )
        top, s, t, q, c, live = _fold_block(u, k2, top, s, t, q, c, live, LEVEL, LANES, WIDTH)
    if whole < n_body:
        offs_v = whole + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body_end(n_body, ALIGNED)
        u, _ = at_columns(x_body, bias_body, keep_body, offs_v, mask_v, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype)
        top, s, t, q, c, live = _fold_block(u, k2, top, s, t, q, c, live, LEVEL, LANES, WIDTH)
    if HAS_EDGES:  # last, so that the loop's sums lie where its loads leave them
        edge_v = edge_columns(tl.arange(0, LANES * WIDTH if LANES * WIDTH > 32 else 32), head, n_body)
        edge_u, _ = at_columns(
            x_ptr, bias_ptr, keep_ptr, edge_v, edge_v < n_cols, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype
        )
        top, s, t, q, c, live = _fold_block(edge_u, k2, top, s, t, q, c, live, LEVEL, LANES, WIDTH)

    # The tile's sums, relative to its largest u. Without a live entry they are 0, but for a NaN.
    u_max = tl.max(top, axis=0)
    s, t, q, c = moved(top - u_max, exp2((top - u_max) * k2), s, t, q, c, live, LEVEL)
    s = tl.sum(s, axis=0)
    is_empty = (s == 0.0) | (u_max * k == MINUS_INF)
    weight = tl.where(is_empty, 0.0, 1.0)
    s, t, q = s * weight, tl.sum(t, axis=0) * weight * k, tl.sum(q, axis=0) * weight
    c = tl.where(is_empty, 0.0, tl.sum(c, axis=0) * k)  # it may be infinite
    live = tl.where(is_empty, 0.0, tl.sum(live, axis=0))

    # And relative to m, the rounded product, of this tile or of earlier ones. As an fma, the difference has what that rounding
    # took; as a difference, it would be contracted into one without a word, and have it or not.
    old = first == 0
    old_m = tl.load(state_ptr, mask=old, other=MINUS_INF)
    m = tl.maximum(old_m, tl.where(is_empty, MINUS_INF, u_max * k))
    delta = tl.where(is_empty, 0.0, tl.fma(u_max, k, -m))
    old_delta = tl.where(old_m == MINUS_INF, 0.0, old_m - m)
    s, t, q, c = moved(delta, tl.exp(delta), s, t, q, c, live, LEVEL)
    old_s = tl.load(state_ptr + step, mask=old, other=0.0)
    old_t = tl.zeros_like(old_s)
    old_q = tl.zeros_like(old_s)
    old_c = tl.zeros_like(old_s)
    old_live = tl.zeros_like(old_s)
    if LEVEL >= LEVEL_ENTROPY:
        old_t = tl.load(state_ptr + 2 * step, mask=old, other=0.0)
    if LEVEL >= LEVEL_EXTRAS:
        old_q = tl.load(state_ptr + 5 * step, mask=old, other=0.0)
        old_c = tl.load(state_ptr + 6 * step, mask=old, other=0.0)
        old_live = tl.load(state_ptr + 7 * step, mask=old, other=0.0)
    old_s, old_t, old_q, old_c = moved(old_delta, tl.exp(old_delta), old_s, old_t, old_q, old_c, old_live, LEVEL)

    # The label's logit is read once more, alone: comparing every column with it would cost more. A label of another tile
    # or of no tile is masked off and never read.
    index = label - vocab_start
    here = (index >= 0) & (index < n_cols)
    u, _ = at_columns(x_ptr, bias_ptr, keep_ptr, index, here, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype)
    # spelled out: a module's constexpr is compared with itself at every launch, and a NaN has then changed
    old_label_d = tl.load(state_ptr + 3 * step, mask=old, other=float("nan"))
    old_label_z = tl.load(state_ptr + 4 * step, mask=old, other=float("nan"))
    label_d = tl.where(here, tl.fma(u, k, -tl.where(m == MINUS_INF, 0.0, m)), old_label_d + old_delta)
    label_z = tl.where(here, u * k, old_label_z)  # rounded as the maximum is, so that the two compare exactly

    tl.store(state_ptr, m)
    tl.store(state_ptr + step, old_s + s)
    tl.store(state_ptr + 2 * step, old_t + t)  # 0 at a level that has none
    tl.store(state_ptr + 3 * step, label_d)
    tl.store(state_ptr + 4 * step, label_z)
    if LEVEL >= LEVEL_EXTRAS:
        tl.store(state_ptr + 5 * step, old_q + q)
        tl.store(state_ptr + 6 * step, old_c + c)
        tl.store(state_ptr + 7 * step, old_live + live)


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
    config = config or launch_config("fold", tile, transform)
    arguments = transform_arguments(tile, transform)
    lanes, width = config.lanes(tile)
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
            **alignment(tile, tile, arguments["keep_ptr"]),
            BLOCK_V=config.block_v,
            LANES=lanes,
            WIDTH=width,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            **compiler_options(),
            **arguments,
        )

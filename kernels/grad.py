"""grad: d loss / d tile from the finished row state, in one read and one write, normally in place.

One program owns one row. The output may be the tile, another tensor, or a bf16 overlay in the memory of an fp32 tile.
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
    FLOOR,
    LOG2E,
    at_columns,
    at_label,
    before_boundary,
    body_end,
    divide,
    edge_columns,
    exp2,
    floored,
    from_boundary,
    row_pointer,
    row_scales,
    whole_block,
)
from entropy_po.types import Transform


@triton.jit
def _grad_block(u, k, m, mean_d, logp_scale, entropy_scale, WANT_ENTROPY: tl.constexpr):
    """dz * chain of a block, (4) of README.md without the label's term."""
    if WANT_ENTROPY:
        d = tl.fma(u, k, -m)
        return exp2(d * LOG2E) * (logp_scale + entropy_scale * (floored(d, FLOOR) - mean_d))
    else:
        return exp2(tl.fma(u, k, -m) * LOG2E) * logp_scale


# See fold.py: no value of a size, stride or offset compiles anew.
_RUNTIME = ["n_cols", "tile_stride", "out_stride", "state_stride", "keep_stride", "vocab_start", "ignore_index"]
_ANY_ALIGNMENT = ["labels_ptr", "state_ptr", "g_logp_ptr", "g_ent_ptr", "row_temperature_ptr"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _grad_kernel(
    tile_ptr,  # [n_rows, n_cols], any row stride
    out_ptr,  # [n_rows, n_cols], may share the tile's memory
    labels_ptr,  # [n_rows] int64
    state_ptr,  # [3 or more, n_rows]: m, s, t
    g_logp_ptr,  # [n_rows] or None
    g_ent_ptr,  # [n_rows] or None: no entropy gradient, and no work for one
    bias_ptr,  # [n_cols] or None
    keep_ptr,  # [n_rows, n_cols] bytes or None
    row_temperature_ptr,  # [n_rows] or None
    n_cols,
    tile_stride,
    out_stride,
    state_stride,
    keep_stride,
    vocab_start,
    ignore_index,
    k,
    before_tanh,
    slope_scale,
    HAS_SOFTCAP: tl.constexpr,
    KEEP_STRIDE_V: tl.constexpr,
    NARROWS: tl.constexpr,  # the output's elements are narrower than the tile's
    ALIGNED: tl.constexpr,  # rows begin at multiples of 16 bytes and have a multiple of 16 columns,
    HAS_EDGES: tl.constexpr,  # but for their edges, which are the same columns of the tile and of the output
    KEEP_ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    WANT_ENTROPY: tl.constexpr = g_ent_ptr is not None
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # before the first multiply: rows * stride passes 2^31
    x_ptr = row_pointer(tile_ptr, row, tile_stride, ALIGNED and not HAS_EDGES)
    row_out_ptr = row_pointer(out_ptr, row, out_stride, ALIGNED and not HAS_EDGES)
    if keep_ptr is not None:
        keep_ptr = row_pointer(keep_ptr, row, keep_stride, KEEP_ALIGNED)
    x_body, out_body, bias_body, keep_body, n_body = x_ptr, row_out_ptr, bias_ptr, keep_ptr, n_cols
    if HAS_EDGES:
        head = before_boundary(tile_ptr, row, tile_stride)
        n_body = (tl.maximum(n_cols - head, 0) // 16 * 16).to(tl.int32)
        x_body = from_boundary(tile_ptr, row, tile_stride, head)
        out_body = from_boundary(out_ptr, row, out_stride, head)
        if bias_ptr is not None:
            bias_body += head
        if keep_ptr is not None:
            keep_body += head * KEEP_STRIDE_V
        edge_v = edge_columns(tl.arange(0, 32), head, n_body)
    lanes = tl.arange(0, BLOCK_V)
    whole = n_body // BLOCK_V * BLOCK_V

    label = tl.load(labels_ptr + row)
    g_logp = tl.full((), 0.0, dtype)
    g_ent = tl.full((), 0.0, dtype)
    if g_logp_ptr is not None:
        g_logp = tl.load(g_logp_ptr + row)
    if WANT_ENTROPY:
        g_ent = tl.load(g_ent_ptr + row)
    step = tl.full((), state_stride, tl.int64)
    state_ptr += row
    m = tl.load(state_ptr)
    s = tl.load(state_ptr + step)
    # An ignored row, a row nobody differentiates (0 * NaN must stay 0) and a row without a live entry have no gradient.
    if (label == ignore_index) | ((g_logp == 0.0) & (g_ent == 0.0)) | (s == 0.0):
        zeros = tl.zeros((BLOCK_V,), out_dtype)
        for col in range(0, whole, BLOCK_V):
            tl.store(out_body + (col + lanes), zeros)
        tl.store(out_body + (whole + lanes), zeros, mask=whole + lanes < body_end(n_body, ALIGNED))
        if HAS_EDGES:
            tl.store(row_out_ptr + edge_v, 0.0, mask=edge_v < n_cols)
        return

    mean_d = tl.full((), 0.0, dtype)
    if WANT_ENTROPY:
        mean_d = divide(tl.load(state_ptr + 2 * step), s)
    k, slope_scale = row_scales(k, slope_scale, row_temperature_ptr, row, dtype)
    chain = slope_scale if HAS_SOFTCAP else k  # dz/dx, but for tanh's slope

    logp_scale = -divide(g_logp * chain, s)
    entropy_scale = -divide(g_ent * chain, s)

    # The label's is another formula, and its one store the last: to look for it in every block would cost as much as the
    # block. Its logit is read first: another warp may soon write over it.
    index = label - vocab_start
    here = (index >= 0) & (index < n_cols)
    label_u, label_slope = at_columns(
        x_ptr, bias_ptr, keep_ptr, index, here, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype
    )
    label_dz = at_label(tl.fma(label_u, k, -m), s, mean_d, g_logp, g_ent) * chain
    tl.debug_barrier()

    # Each block is read, then written.
    for col in tl.range(0, whole, BLOCK_V, num_stages=NUM_STAGES):
        offs_v = col + lanes
        u, slope = whole_block(
            x_body, bias_body, keep_body, col, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, BLOCK_V, ALIGNED, dtype
        )
        dz = _grad_block(u, k, m, mean_d, logp_scale, entropy_scale, WANT_ENTROPY)
        if NARROWS:
            # A narrow row overlays the front of its wide one: this block lands on columns of itself and of blocks
            # before, that a slower warp may still have to read. It never reaches a later block.
            tl.debug_barrier()
        tl.store(out_body + offs_v, (dz * slope).to(out_dtype))
    if whole < n_body:
        offs_v = whole + lanes
        mask_v = offs_v < body_end(n_body, ALIGNED)
        u, slope = at_columns(
            x_body, bias_body, keep_body, offs_v, mask_v, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype
        )
        dz = _grad_block(u, k, m, mean_d, logp_scale, entropy_scale, WANT_ENTROPY)
        if NARROWS:
            tl.debug_barrier()
        tl.store(out_body + offs_v, (dz * slope).to(out_dtype), mask=mask_v)
    if HAS_EDGES:
        edge_u, edge_slope = at_columns(
            x_ptr, bias_ptr, keep_ptr, edge_v, edge_v < n_cols, before_tanh, HAS_SOFTCAP, KEEP_STRIDE_V, dtype
        )
        edge_dz = _grad_block(edge_u, k, m, mean_d, logp_scale, entropy_scale, WANT_ENTROPY)
        tl.debug_barrier()  # each thread has read all edges; and a narrow row's may land where a slower warp still reads
        tl.store(row_out_ptr + edge_v, (edge_dz * edge_slope).to(out_dtype), mask=edge_v < n_cols)
    tl.debug_barrier()
    tl.store(row_out_ptr + index, (label_dz * label_slope).to(out_dtype), mask=here)


def grad_(
    tile: Tensor,  # [n, v], overwritten if it is `out`
    labels: Tensor,  # [n] int64
    vocab_start: int,
    state: Tensor,  # [5 or 8, n], complete
    g_logp: Tensor | None,  # [n] in the state's dtype
    g_ent: Tensor | None,
    transform: Transform,  # of this tile
    *,
    ignore_index: int = -100,
    out: Tensor | None = None,  # [n, v]: the tile, its bf16 overlay, or another tensor
    config: LaunchConfig | None = None,  # None: by width and dtype
) -> None:
    """Write d loss / d tile; see `entropy_po.tiles.grad_`."""
    out = tile if out is None else out
    check_last_dim_contiguous("tile", tile)
    check_last_dim_contiguous("out", out)
    if tile.numel() == 0:
        return
    config = config or launch_config("grad", tile, transform)
    arguments = transform_arguments(tile, transform)
    with on_device(tile):
        _grad_kernel[(tile.shape[0],)](
            tile_ptr=tile,
            out_ptr=out,
            labels_ptr=labels.contiguous(),
            state_ptr=state,
            g_logp_ptr=None if g_logp is None else g_logp.contiguous(),
            g_ent_ptr=None if g_ent is None else g_ent.contiguous(),
            n_cols=tile.shape[1],
            tile_stride=tile.stride(0),
            out_stride=out.stride(0),
            state_stride=state.stride(0),
            vocab_start=vocab_start,
            ignore_index=ignore_index,
            NARROWS=out.itemsize < tile.itemsize,
            **alignment(tile, out, arguments["keep_ptr"]),
            BLOCK_V=config.block_v,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            **compiler_options(),
            **arguments,
        )

"""stats: a complete row state into the outputs that are wanted, (3) of README.md, in one launch instead of one per operation.

Traffic per row: 20 to 32 bytes of state, 4 per output. Differences are taken in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_po.dispatch import on_device
from entropy_po.kernels.config import compiler_options
from entropy_po.types import TokenStats

BLOCK_ROWS = 128


@triton.jit(do_not_specialize=["n_rows", "state_stride"])
def _stats_kernel(
    state_ptr,  # [5 or 8, n_rows]
    n_rows,
    state_stride,
    logps_ptr,  # [n_rows] or None, as all that follow
    entropy_ptr,
    lse_ptr,
    is_top1_ptr,  # bytes
    mean_logit_ptr,
    log_sum_sq_probs_ptr,
    BLOCK_ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = rows < n_rows
    step = tl.full((), state_stride, tl.int64)
    state_ptr += rows
    m = tl.load(state_ptr, mask=mask, other=0.0).to(tl.float64)
    s = tl.load(state_ptr + step, mask=mask, other=1.0).to(tl.float64)
    log_s = tl.log(s)
    if logps_ptr is not None:
        label_d = tl.load(state_ptr + 3 * step, mask=mask, other=0.0).to(tl.float64)
        tl.store(logps_ptr + rows, label_d - log_s, mask=mask)
    if entropy_ptr is not None:
        t = tl.load(state_ptr + 2 * step, mask=mask, other=0.0).to(tl.float64)
        entropy = log_s - t / s
        tl.store(entropy_ptr + rows, tl.where(entropy < 0.0, 0.0, entropy), mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, m + log_s, mask=mask)
    if is_top1_ptr is not None:
        label_z = tl.load(state_ptr + 4 * step, mask=mask, other=0.0).to(tl.float64)
        tl.store(is_top1_ptr + rows, (label_z >= m).to(tl.uint8), mask=mask)
    if mean_logit_ptr is not None:
        c = tl.load(state_ptr + 6 * step, mask=mask, other=0.0).to(tl.float64)
        live = tl.load(state_ptr + 7 * step, mask=mask, other=1.0).to(tl.float64)
        tl.store(mean_logit_ptr + rows, m + c / live, mask=mask)
    if log_sum_sq_probs_ptr is not None:
        q = tl.load(state_ptr + 5 * step, mask=mask, other=1.0).to(tl.float64)
        tl.store(log_sum_sq_probs_ptr + rows, tl.log(q) - 2.0 * log_s, mask=mask)


def stats_(
    state: Tensor,  # [5 or 8, n], complete
    outputs: TokenStats,  # [n] each or None, written
) -> None:
    """Write what the state says of its rows; see `entropy_po.tiles.stats`."""
    n = state.shape[1]
    if n == 0:
        return
    pointers = {f"{name}_ptr": x for name, x in outputs._asdict().items()}
    if outputs.is_top1 is not None:
        pointers["is_top1_ptr"] = outputs.is_top1.view(torch.uint8)
    with on_device(state):
        _stats_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
            state_ptr=state,
            n_rows=n,
            state_stride=state.stride(0),
            BLOCK_ROWS=BLOCK_ROWS,
            **compiler_options(),
            **pointers,
        )

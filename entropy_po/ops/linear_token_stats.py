"""`linear_token_stats`: per-token statistics from hidden states and the lm_head weight, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_po import tiles
from entropy_po.ops import checks, gemm, schema
from entropy_po.plan import DEFAULT_CPU_WORKSPACE, TilePlan, plan_tiles
from entropy_po.types import Level, TokenStats, Transform, new_state, state_dtype, stats_from_state

_INPUTS = "Tensor hidden_states, Tensor weight, Tensor? bias, Tensor labels"
schema.LIBRARY.define(
    f"linear_token_stats({_INPUTS}, {schema.OPTIONS}, int workspace_bytes) -> ({schema.STATS}, Tensor)"
)
schema.LIBRARY.define(
    f"linear_token_stats_backward(Tensor? grad_logps, Tensor? grad_entropy, {_INPUTS}, Tensor state, {schema.OPTIONS}, "
    "int workspace_bytes, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


def linear_token_stats(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    outputs: tuple[str, ...] = ("logps", "entropy"),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Per-token log-probability, entropy and more of a language-model head, without its logits.

    For row i with z = softcap * tanh((h_i W^T + bias) * logit_scale / softcap) / temperature and p = softmax(z),

        logps[i] = z_label - log sum_j exp(z_j)        entropy[i] = -sum_j p_j log p_j        (nats)

    evaluated tile by tile: no tensor with a token and a vocabulary axis outlives a tile. The backward recomputes the
    tiles: four vocabulary products in all, three when the weight is frozen.

    Args:
        hidden_states: [N, D], fp32 / bf16 / fp16 / fp64, last dimension contiguous (copied otherwise).
        weight: [V, D], the same dtype and device. A weight without `requires_grad` costs no gradient buffer and no
            product. Under autocast both are cast to its dtype, as `torch.nn.functional.linear` does.
        labels: [N], int64, already shifted. Rows with `ignore_index` give 0 and no gradient, and are not computed.
        bias: [V], or None.
        workspace_bytes: bound on the tile and what goes with it; None for the default of the device (32 MiB on a CPU).
            Beside it live the inputs, the gradients, and fp32 sums of those gradients where tiles are added into them.
        outputs, temperature, softcap, logit_scale, keep_mask, ignore_index, backend: as in `token_stats`.

    Returns:
        TokenStats, [N] each, fp32 (fp64 for fp64). `logps` and `entropy` are differentiable once, by hidden_states,
        weight and bias.

    Raises:
        ValueError: a shape, dtype, device or range that can never work, or a label outside [0, V) (on CUDA: NaN).
        NotImplementedError: a backend that cannot serve this device.

    Numerics:
        Tile values and sums are fp32 whatever the operands are. With bf16 operands the tile's gradient is rounded to
        bf16 once, for the two products that follow.

    Example:
        >>> hidden, head = torch.randn(6, 16, requires_grad=True), torch.nn.Linear(16, 50, bias=False)
        >>> stats = linear_token_stats(hidden, head.weight, torch.randint(50, (6,)))
        >>> (-stats.logps - 0.01 * stats.entropy).mean().backward()
    """
    outputs = checks.check_outputs(outputs)
    checks.check_matrix("hidden_states", hidden_states, "[N, D]")
    checks.check_matrix("weight", weight, "[V, D]")
    if hidden_states.ndim != 2 or weight.ndim != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and weight {tuple(weight.shape)}; expected [N, D] and "
            "[V, D] with the same D (flatten batch and sequence first)."
        )
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and hidden_states.dtype != torch.float64:
        autocast = torch.get_autocast_dtype(device_type)
        hidden_states, weight = hidden_states.to(autocast), weight.to(autocast)
    if weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"weight has dtype {weight.dtype}, hidden_states {hidden_states.dtype}; convert one, or use autocast."
        )
    checks.check_device("weight", weight, hidden_states.device)
    checks.check_labels(labels, hidden_states.shape[:1], hidden_states.device)
    transform = checks.make_transform(
        hidden_states.shape[0],
        weight.shape[0],
        hidden_states.device,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        bias=bias,
        keep_mask=keep_mask,
    )
    if workspace_bytes is None:
        workspace_bytes = DEFAULT_CPU_WORKSPACE
    options = schema.flat_options(transform, ignore_index, outputs, backend)
    results = torch.ops.entropy_po.linear_token_stats(
        hidden_states, weight, bias, labels, *options, int(workspace_bytes)
    )
    return schema.token_stats_from_flat(results, outputs, labels.shape)


class _Tile(NamedTuple):
    rows: slice
    cols: slice
    logits: Tensor  # [n, v], fp32, ready to be folded or overwritten by its gradient
    hidden: dict[torch.dtype, Tensor]  # [n, D], as given and as multiplied
    weight: dict[torch.dtype, Tensor]  # [v, D], likewise
    state: Tensor  # [5 or 8, n]
    transform: Transform


class _Problem:
    """One call's inputs, reduced to the rows that count, with the tile loop that forward and backward share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: tuple):
        *flat, workspace_bytes = options
        self.hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        self.weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        self.ignore_index, self.outputs, backend = flat[5], tuple(flat[6]), flat[7]
        self.backend = tiles.resolve_backend(backend, hidden.device)
        self.level = Level.for_outputs(self.outputs)
        self.arithmetic = state_dtype(hidden.dtype)
        self.scratch = gemm.Scratch(hidden.device)
        if hidden.device.type == "cpu":
            checks.check_label_range(labels, weight.shape[0], self.ignore_index)
        # Rows without a label never reach a product. They are gathered tile by tile, so that no second copy of the
        # hidden states lives; `None` is "all rows", and costs nothing.
        kept = (labels != self.ignore_index).nonzero()[:, 0]
        self.kept = None if kept.numel() == labels.numel() else kept
        self.labels = labels.contiguous() if self.kept is None else labels[kept]
        transform = schema.transform_from_options(tuple(flat), bias)
        self.transform = transform if self.kept is None else _rows_of(transform, kept)
        self.plan: TilePlan = plan_tiles(
            self.labels.numel(),
            weight.shape[0],
            weight.shape[1],
            element=self.arithmetic.itemsize,
            operand_copies=gemm.operand_copies(hidden.dtype, hidden.device, hidden.shape[1]),
            workspace_bytes=workspace_bytes,
        )

    def tiles(self, state: Tensor) -> Iterator[_Tile]:
        """Every tile of the logits. Columns are the outer loop: a weight tile is converted once per call, and dW is
        finished tile by tile, so that its fp32 sum is never larger than a tile's columns."""
        if self.labels.numel() == 0:
            return
        for cols in self.plan.col_slices():
            weight = self.weight[cols]
            weight_operand = gemm.operand(weight, "weight", self.scratch)
            for rows in self.plan.row_slices():
                hidden = self.hidden[rows] if self.kept is None else self.hidden[self.kept[rows]]
                hidden_operand = gemm.operand(hidden, "hidden", self.scratch)
                out = self.scratch("tile", (hidden.shape[0], weight.shape[0]), self.arithmetic)
                yield _Tile(
                    rows,
                    cols,
                    gemm.logits_tile(hidden_operand, weight_operand, out, hidden.dtype),
                    {hidden.dtype: hidden, hidden_operand.dtype: hidden_operand},
                    {weight.dtype: weight, weight_operand.dtype: weight_operand},
                    state[:, rows],
                    self.transform.tile(rows, cols, self.arithmetic),
                )

    def scatter(self, values: Tensor, n: int) -> Tensor:
        """Values of the kept rows back among all `n` rows, 0 elsewhere."""
        if self.kept is None:
            return values
        return values.new_zeros((n, *values.shape[1:])).index_copy_(0, self.kept, values)

    def gather(self, per_row: Tensor | None) -> Tensor | None:
        if per_row is None or per_row.numel() == 0:
            return None
        per_row = per_row.to(self.arithmetic)
        return per_row.contiguous() if self.kept is None else per_row[self.kept]


def _rows_of(transform: Transform, kept: Tensor) -> Transform:
    row_temperature, keep_mask = transform.row_temperature, transform.keep_mask
    if row_temperature is not None:
        row_temperature = row_temperature[kept]
    if keep_mask is not None and keep_mask.shape[0] > 1:
        keep_mask = keep_mask[kept]
    return replace(transform, row_temperature=row_temperature, keep_mask=keep_mask)


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options) -> tuple[Tensor, ...]:
    p = _Problem(hidden, weight, bias, labels, options)
    # One column per row of the call, although only the kept rows' are used: a size that does not depend on the labels.
    state = new_state(labels.numel(), p.level, hidden)
    state[:, p.labels.numel() :] = 0
    for tile in p.tiles(state):
        tiles.fold_(
            tile.logits,
            p.labels[tile.rows],
            tile.cols.start,
            tile.state,
            tile.transform,
            level=p.level,
            ignore_index=p.ignore_index,
            backend=p.backend,
        )
    results = schema.empty_stats(0, [], hidden)
    for i, value in enumerate(stats_from_state(state[:, : p.labels.numel()], p.outputs)):
        if value is not None:
            results[i] = p.scatter(value, labels.numel())
    return *results, state


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options) -> tuple[Tensor, ...]:
    outputs = options[6]
    rows = new_state(0, Level.for_outputs(tuple(outputs)), hidden).shape[0]
    state = hidden.new_empty((rows, hidden.shape[0]), dtype=state_dtype(hidden.dtype))
    return *schema.empty_stats(hidden.shape[0], outputs, hidden), state


def _backward(grad_logps, grad_entropy, hidden, weight, bias, labels, state, *rest) -> tuple[Tensor, Tensor, Tensor]:
    *options, needs = rest
    p = _Problem(hidden, weight, bias, labels, tuple(options))
    need_hidden, need_weight, need_bias = needs
    g_logp, g_ent = p.gather(grad_logps), p.gather(grad_entropy)
    n, d = p.labels.numel(), hidden.shape[1]
    products = -(-p.plan.v // p.plan.cols)
    grad_hidden = grad_weight = grad_bias = None
    if need_hidden:
        grad_hidden = hidden.new_zeros((n, d), dtype=gemm.accumulator_dtype(hidden.dtype, products))
    if need_weight:
        grad_weight = (torch.empty if n else torch.zeros)(weight.shape, dtype=weight.dtype, device=weight.device)
    if need_bias:
        grad_bias = torch.zeros(weight.shape[0], dtype=p.arithmetic, device=weight.device)
    for tile in p.tiles(state):
        rows, cols = tile.rows, tile.cols
        gradient = gemm.gradient_tile(tile.logits, hidden.dtype)
        tiles.grad_(
            tile.logits,
            p.labels[rows],
            cols.start,
            tile.state,
            None if g_logp is None else g_logp[rows],
            None if g_ent is None else g_ent[rows],
            tile.transform,
            ignore_index=p.ignore_index,
            out=gradient,
            backend=p.backend,
        )
        if need_hidden:
            right = tile.weight[gradient.dtype]
            gemm.add_product(grad_hidden[rows], gradient, right, cols.start == 0, p.scratch)
        if need_weight:
            right = tile.hidden[gradient.dtype]
            whole = p.plan.one_row_tile and gradient.dtype == weight.dtype
            total = grad_weight[cols] if whole else p.scratch("dW", (cols.stop - cols.start, d), p.arithmetic)
            gemm.add_product(total, gradient.t(), right, rows.start == 0, p.scratch)
            if not whole and rows.stop == n:
                grad_weight[cols] = total
        if need_bias:
            grad_bias[cols] += gradient.sum(0, dtype=p.arithmetic)
    empty = hidden.new_empty(0)
    return (
        p.scatter(grad_hidden.to(hidden.dtype), labels.numel()) if need_hidden else empty,
        grad_weight if need_weight else empty.clone(),
        grad_bias.to(bias.dtype) if need_bias else empty.clone(),
    )


def _fake_backward(grad_logps, grad_entropy, hidden, weight, bias, labels, state, *rest):
    need_hidden, need_weight, need_bias = rest[-1]
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else hidden.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else hidden.new_empty(0),
        torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, row_temperature, keep_mask, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, row_temperature, keep_mask, output[-1])
    ctx.mark_non_differentiable(*output[2:])
    ctx.options = rest


def _autograd(ctx, grad_logps, grad_entropy, *_):
    needs = list(ctx.needs_input_grad[:3])
    none = (None,) * (len(ctx.options) + 6)
    if not any(needs) or (grad_logps is None and grad_entropy is None):
        return none
    schema.refuse_second_order("linear_token_stats")
    hidden, weight, bias, labels, row_temperature, keep_mask, state = ctx.saved_tensors
    grads = torch.ops.entropy_po.linear_token_stats_backward(
        grad_logps, grad_entropy, hidden, weight, bias, labels, state, row_temperature, keep_mask, *ctx.options, needs
    )
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *none[3:]


for _name, _kernel, _fake in (
    ("linear_token_stats", _forward, _fake_forward),
    ("linear_token_stats_backward", _backward, _fake_backward),
):
    schema.LIBRARY.impl(_name, _kernel, "CPU")
    schema.LIBRARY.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"entropy_po::{_name}", _fake, lib=schema.LIBRARY)
torch.library.register_autograd(
    "entropy_po::linear_token_stats", _autograd, setup_context=_setup_context, lib=schema.LIBRARY
)

"""`linear_token_stats`: per-token statistics from hidden states and the lm_head weight, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_po.ops import checks, gemm, parallel, schema, sequences
from entropy_po.ops.gemm import Operand
from entropy_po.ops.lm_head import HiddenSum, LmHead
from entropy_po.plan import DEFAULT_CPU_WORKSPACE, DEFAULT_GPU_WORKSPACE, TilePlan, plan_tiles
from entropy_po.types import Level, OutputName, TokenStats, state_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from entropy_po.tiles import BackendName

_INPUTS = "Tensor hidden_states, Tensor weight, Tensor? bias, Tensor labels"
schema.LIBRARY.define(
    f"linear_token_stats({_INPUTS}, {schema.OPTIONS}, int workspace_bytes, bool ahead) -> ({schema.STATS}, Tensor, Tensor)"
)
schema.LIBRARY.define(
    f"linear_token_stats_backward(Tensor? grad_logps, Tensor? grad_entropy, {_INPUTS}, Tensor state, {schema.OPTIONS}, "
    "int workspace_bytes, bool[] needs) -> (Tensor, Tensor, Tensor)"
)

DETERMINISTIC_ROWS = 4 * gemm.BLOCK_ROWS  # that the budget's tiles are shaped for in deterministic mode


def linear_token_stats(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    outputs: tuple[OutputName, ...] = ("logps", "entropy"),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    expect_entropy_grad: bool = True,
    vocab_group: ProcessGroup | None = None,
    backend: BackendName | None = None,
) -> TokenStats:
    """Per-token log-probability, entropy and more of a language-model head, without its logits.

    For row i with z = softcap * tanh((h_i W^T + bias) * logit_scale / softcap) / temperature and p = softmax(z),

        logps[i] = z_label - log sum_j exp(z_j)        entropy[i] = -sum_j p_j log p_j        (nats)

    evaluated tile by tile: no tensor with a token and a vocabulary axis outlives a tile. The backward recomputes the
    tiles: four vocabulary products in all, three when the weight is frozen.

    Two, where weight and bias are frozen and only log-probs will have a gradient: a row's is then d logps[i] / d h_i times
    one number, so it is made in the forward, from the same tiles, kept [N, D] and multiplied by that number in the backward.
    (Not over a vocab_group.) A forward that no backward will follow costs one product under torch.no_grad().

    Args:
        hidden_states: [N, D], fp32 / bf16 / fp16 / fp64, last dimension contiguous (copied otherwise).
        weight: [V, D], the same dtype and device. A weight without `requires_grad` costs no gradient buffer and no
            product. Under autocast both are cast to its dtype, as `torch.nn.functional.linear` does.
        labels: [N], int64, already shifted. Rows with `ignore_index` give 0 and no gradient, and are not computed.
        bias: [V], or None.
        workspace_bytes: bound on the tile and what goes with it; None for 1 GiB on a GPU and 64 MiB on a CPU, where more is not
            used. Beside it live the inputs, the gradients, and fp32 sums of those gradients where tiles are added into them.
        expect_entropy_grad: whether a gradient of `entropy` will come, where it is among the outputs. Say False where it is a
            metric: with a frozen head that is two products and not three. One that comes all the same is right, at four; so is,
            under torch.compile, an entropy that leaves the compiled function without detach().
        vocab_group: the ranks that split the vocabulary, None for none. Each calls this, forward and backward, with the same
            hidden states and labels, and with weight [V_r, D], bias [V_r] and keep_mask [..., V_r] of its own ids: those
            that follow the shards of the ranks before it. Shards may differ in size; padding leaves by keep_mask. weight
            and bias may be DTensors, Shard(0) over the group. All ranks get the same results and the same whole gradient
            of hidden_states; the weight's stays local.
        outputs, temperature, softcap, logit_scale, keep_mask, ignore_index, backend: as in `token_stats`.

    Returns:
        TokenStats, [N] each, fp32 (fp64 for fp64). `logps` and `entropy` are differentiable once, by hidden_states,
        weight and bias.

    Raises:
        ValueError: a shape, dtype, device or range that can never work, a label outside [0, V) (on CUDA: NaN), or ranks of
            vocab_group that were called with different rows, labels, dtypes or options.
        NotImplementedError: a backend that cannot serve this device.

    CUDA graphs:
        A capture computes all N rows, those that are ignored then and those that will be when it is replayed. Without one, their
        number is asked for, which waits for the device. Over a vocab_group there is no capture: the ranks compare their calls.

    Numerics:
        Tile values and sums of products are fp32 whatever the operands are; one product that is a result by itself is rounded
        as torch rounds it (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`). With bf16 operands the tile's
        gradient is rounded to bf16 once, for the two products that follow, as is a gradient that is kept for the backward. On a
        CPU under torch.use_deterministic_algorithms, a row's values have the same bits in any batch.

    Example:
        >>> hidden, head = torch.randn(6, 16, requires_grad=True), torch.nn.Linear(16, 50, bias=False)
        >>> stats = linear_token_stats(hidden, head.weight, torch.randint(50, (6,)))
        >>> (-stats.logps - 0.01 * stats.entropy).mean().backward()
    """
    outputs = checks.check_outputs(outputs)
    checks.check_bool("expect_entropy_grad", expect_entropy_grad)
    weight, bias = parallel.local_shards(vocab_group, weight=weight, bias=bias)
    hidden_states, weight, transform = checks.check_linear(
        hidden_states, weight, labels, bias, temperature, softcap, logit_scale, keep_mask, workspace_bytes
    )
    if workspace_bytes is None:
        workspace_bytes = DEFAULT_CPU_WORKSPACE if hidden_states.device.type == "cpu" else DEFAULT_GPU_WORKSPACE
    only_logps = "logps" in outputs and not ("entropy" in outputs and expect_entropy_grad)
    ahead = only_logps and vocab_group is None and _only_hidden_states(hidden_states, weight, bias)
    options = schema.flat_options(transform, ignore_index, outputs, backend, vocab_group)
    return stats_and_state(hidden_states, weight, bias, labels, options, int(workspace_bytes), ahead)[0]


def stats_and_state(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: schema.FlatOptions,
    workspace_bytes: int,
    ahead: bool,
) -> tuple[TokenStats, Tensor]:
    """The operator itself: differentiable outputs, and the row state [5 or 8, N] that they were made of, 0 at ignored rows.
    `ahead`: with d logps / d hidden made on the way, for a frozen head."""
    results = torch.ops.entropy_po.linear_token_stats(hidden, weight, bias, labels, *options, workspace_bytes, ahead)
    return schema.token_stats_from_flat(results, options[6], labels.shape), results[-2]


def _only_hidden_states(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient of them, and of nothing else, may be wanted."""
    others = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and not others


def _plan(head: LmHead, workspace_bytes: int, frozen: bool = False) -> TilePlan:
    on_cpu = head.hidden.device.type == "cpu"
    # Where a row is cut shows in its last bits: deterministic mode cuts it on a CPU as if it were always among as many rows.
    deterministic = torch.are_deterministic_algorithms_enabled() and on_cpu
    rows = DETERMINISTIC_ROWS if deterministic else head.num_kept
    plan = plan_tiles(
        rows,
        head.shards.widest,  # rows are cut alike on all ranks of a vocab_group
        head.dim,
        element=head.arithmetic.itemsize,
        operand_copies=head.operand_copies,
        workspace_bytes=min(workspace_bytes, DEFAULT_CPU_WORKSPACE) if on_cpu else workspace_bytes,
        frozen=frozen and not deterministic,
        device_type=head.hidden.device.type,
    )
    return replace(plan, n=head.num_kept, v=head.vocab_size)


def _tiles(head: LmHead, plan: TilePlan) -> Iterator[tuple[slice, slice, Operand, Operand, Tensor]]:
    """Every tile of the logits, with its rows, columns and operands. Columns are the outer loop: a weight tile is
    converted once per call, and dW is finished tile by tile, so that its fp32 sum is never larger than a tile's columns."""
    if not head.num_kept:
        return
    for cols in plan.col_slices():
        weight = head.weight_rows(cols)
        for rows in plan.row_slices():
            hidden = head.hidden_rows(rows)
            out = head.tile(rows.stop - rows.start, cols.stop - cols.start)
            yield rows, cols, hidden, weight, head.logits(hidden, weight, out)


def fold(head: LmHead, workspace_bytes: int) -> Tensor:
    """The row state [5 or 8, K] of the kept rows: one pass over the logits."""
    state = head.state(head.num_kept)
    for rows, cols, _, _, tile in _tiles(head, _plan(head, workspace_bytes)):
        head.fold_(tile, rows, cols, state[:, rows])
    head.complete_(state, slice(0, head.num_kept))
    return state


def gradients(
    head: LmHead,
    workspace_bytes: int,
    state: Tensor,
    g_logp: Tensor | None,
    g_ent: Tensor | None,
    needs: list[bool],
    to_be_scaled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, dW and dbias, empty where not needed, from upstream gradients at the kept rows: a second pass over the logits.
    `to_be_scaled`: in the dtype that a gradient is kept in until its upstream scalar is known, not in the input's."""
    plan, n = _plan(head, workspace_bytes), head.num_kept
    dtype_for = sequences.held_dtype if to_be_scaled else lambda dtype: dtype
    need_hidden, need_weight, need_bias = needs
    hidden, weight, bias = head.hidden, head.weight, head.transform.bias
    hidden_sum: HiddenSum | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    if need_hidden:
        hidden_sum = HiddenSum(head, products=-(-plan.v // plan.cols), dtype=dtype_for(hidden.dtype))
    if need_weight:
        make = torch.empty if n else torch.zeros
        grad_weight = make(weight.shape, dtype=dtype_for(weight.dtype), device=weight.device)
    if need_bias:
        grad_bias = torch.zeros(head.vocab_size, dtype=head.arithmetic, device=weight.device)
    for rows, cols, hidden_rows, weight_rows, tile in _tiles(head, plan):
        upstream = (None if g is None else g[rows] for g in (g_logp, g_ent))
        gradient = head.grad_(tile, rows, cols, state[:, rows], *upstream)
        if hidden_sum is not None:
            hidden_sum.add_product(rows, gradient, weight_rows, cols.start == 0)
        if grad_weight is not None:
            whole = plan.one_row_tile and gradient.dtype == grad_weight.dtype
            shape = (cols.stop - cols.start, head.dim)
            total = grad_weight[cols] if whole else head.scratch("dW", shape, head.arithmetic)
            head.add_product(total, gradient.t(), hidden_rows, rows.start == 0)
            if not whole and rows.stop == n:
                grad_weight[cols] = total
        if grad_bias is not None:
            grad_bias[cols] += gradient.sum(0, dtype=head.arithmetic)
    empty = hidden.new_empty(0)
    return (
        empty if hidden_sum is None else hidden_sum.finish(),
        empty.clone() if grad_weight is None else grad_weight,
        empty.clone() if grad_bias is None or bias is None else grad_bias.to(dtype_for(bias.dtype)),
    )


def fold_and_gradient(head: LmHead, workspace_bytes: int) -> tuple[Tensor, HiddenSum]:
    """The row state as `fold`'s, and d logps[i] / d h_i of the kept rows: one pass over the logits, two products.
    Over a vocab_group, the budget must be the same on all ranks.

        d logps / d h = x'_label (1 - p_label) W_label - 1/s sum_{j != label} exp(z_j - m) x'_j W_j,    x'_j = dz_j / dlogit_j

    The sum over a row's tiles is kept relative to the largest z so far, as an online softmax is, and divided by s at the end.
    The label stays out of it: where p_label is almost 1, what is left of that row is a difference of its two terms.
    """
    plan = _plan(head, workspace_bytes, frozen=True)
    state = head.state(head.num_kept)
    result = HiddenSum(head, products=1, dtype=sequences.held_dtype(head.hidden.dtype))
    for rows in plan.row_slices():
        part, n = state[:, rows], rows.stop - rows.start
        target = result.rows[rows]
        direct = target.dtype == head.arithmetic
        total = target if direct else head.scratch("sum", (n, head.dim), head.arithmetic)
        labels, ones = part.new_full((n,), -torch.inf), part.new_ones(n)
        hidden = head.hidden_rows(rows)
        for cols in plan.col_slices():
            weight = head.weight_rows(cols)
            tile = head.logits(hidden, weight, head.tile(n, cols.stop - cols.start))
            before = part[0].clone() if cols.start else None
            head.fold_(tile, rows, cols, part)
            head.take_labels_(tile, rows, cols, labels)
            so_far = torch.zeros_like(part)
            so_far[0], so_far[1] = part[0], part[1].sign()  # exp(z - m) / 1; a row without a live entry yet stays empty
            gradient = head.grad_(tile, rows, cols, so_far, ones, None)
            if before is not None and (
                head.hidden.device.type != "cpu" or not torch.equal(before, part[0])
            ):  # on a GPU, to look would be to wait
                total *= _moved(before, part[0])[:, None]
            head.add_product(total, gradient, weight, cols.start == 0)
        if not head.vocab_size:  # an empty shard
            total.zero_()
        own_m = part[0].clone()
        head.complete_(part, rows)
        m, s = part[:2]
        scale = _moved(own_m, m) / torch.where(s == 0, 1, s)
        at_label = head.label_gradients(labels, rows, part)
        for few in sequences.few_rows(total):
            piece = total[few].mul_(scale[few, None])
            if head.vocab_size:
                own = (head.labels[rows][few] - head.shards.start).clamp(0, head.vocab_size - 1)
                piece.addcmul_(head.weight[own].to(piece.dtype), at_label[few, None])
            if not direct:
                target[few] = piece
    return state, result


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """What a sum relative to one maximum is multiplied by to be relative to another; both may be -inf."""
    return torch.where(before == after, 1, (before - after).exp())


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *options, workspace_bytes, ahead = rest
    head = LmHead(hidden, weight, bias, labels, tuple(options))
    if ahead:
        state, hidden_sum = fold_and_gradient(head, workspace_bytes)
        gradient = hidden_sum.finish()
    else:
        state, gradient = fold(head, workspace_bytes), hidden.new_empty(0)
    stats = head.stats(state, tuple(options[6]))
    scattered = TokenStats(*(None if value is None else head.scatter(value) for value in stats))
    return *schema.flat_stats(scattered, hidden), head.scatter(state), gradient


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    outputs, ahead = options[6], options[-1]
    state = state_memory(hidden.shape[0], Level.for_outputs(tuple(outputs)), hidden)
    gradient = hidden.new_empty(0)
    if ahead:
        gradient = torch.empty(hidden.shape, dtype=sequences.held_dtype(hidden.dtype), device=hidden.device)
    return *schema.empty_stats(hidden.shape[0], outputs, hidden), state, gradient


def _backward(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    state: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, workspace_bytes, needs = rest
    head = LmHead(hidden, weight, bias, labels, tuple(options), inputs_that_need_a_gradient=needs)
    upstream = head.gather(grad_logps), head.gather(grad_entropy)
    return gradients(head, workspace_bytes, state if head.kept is None else state[:, head.kept], *upstream, needs)


def _fake_backward(
    grad_logps: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-1]
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else hidden.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else hidden.new_empty(0),
        torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, row_temperature, keep_mask, *rest, ahead = inputs
    ctx.set_materialize_grads(False)
    ctx.options, ctx.ahead, ctx.dtype = rest, ahead, hidden.dtype
    ctx.mark_non_differentiable(*output[2:])
    *_, state, gradient = output
    if ahead and "entropy" not in ctx.options[4]:  # no logits will be made again
        ctx.save_for_backward(None, None, None, labels, None, None, None, gradient)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, row_temperature, keep_mask, state, gradient)


def _autograd(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    none = (None,) * (len(ctx.options) + 7)
    if "entropy" not in ctx.options[4]:
        grad_entropy = None  # tracing makes one of the empty output
    if not any(needs) or (grad_logps is None and grad_entropy is None):
        return none
    schema.refuse_second_order("linear_token_stats")
    hidden, weight, bias, labels, row_temperature, keep_mask, state, gradient = ctx.saved_tensors
    if ctx.ahead and grad_entropy is None:
        assert grad_logps is not None
        upstream = grad_logps.masked_fill(labels == ctx.options[3], 0)  # an ignored row's may be anything
        return sequences.rows_scaled(gradient, upstream, ctx.dtype), *none[1:]
    grads = torch.ops.entropy_po.linear_token_stats_backward(
        grad_logps, grad_entropy, hidden, weight, bias, labels, state, row_temperature, keep_mask, *ctx.options, needs
    )
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *none[3:]


for _name, _kernel, _fake in (
    ("linear_token_stats", _forward, _fake_forward),
    ("linear_token_stats_backward", _backward, _fake_backward),
):
    schema.register_kernel(_name, _kernel)
    torch.library.register_fake(f"entropy_po::{_name}", _fake, lib=schema.LIBRARY)
torch.library.register_autograd(
    "entropy_po::linear_token_stats", _autograd, setup_context=_setup_context, lib=schema.LIBRARY
)

"""`token_stats`: per-token statistics from logits that already exist."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_po import tiles
from entropy_po.ops import checks, schema
from entropy_po.types import Level, OutputName, TokenStats, new_state, state_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from entropy_po.tiles import BackendName

_SCHEMA = f"(Tensor logits, Tensor labels, {schema.OPTIONS}, bool inplace_backward)"
_BACKWARD = (
    f"(Tensor? grad_logps, Tensor? grad_entropy, Tensor{{}} logits, Tensor labels, Tensor state, {schema.OPTIONS})"
)

schema.LIBRARY.define(f"token_stats{_SCHEMA} -> ({schema.STATS}, Tensor)")
schema.LIBRARY.define(f"token_stats_backward{_BACKWARD.format('')} -> Tensor")
schema.LIBRARY.define(f"token_stats_backward_{_BACKWARD.format('(a!)')} -> ()")


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    outputs: tuple[OutputName, ...] = ("logps", "entropy"),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    vocab_group: ProcessGroup | None = None,
    backend: BackendName | None = None,
) -> TokenStats:
    """Per-token log-probability, entropy and more, from logits, in one read of them.

    With z = softcap * tanh(logits * logit_scale / softcap) / temperature, restricted to `keep_mask`, and p = softmax(z):

        logps = z_label - log sum_j exp(z_j)        entropy = -sum_j p_j log p_j        (nats)

    The forward allocates nothing of the logits' size; the backward writes one gradient, over the logits if asked to.

    Args:
        logits: [..., V], fp32 / bf16 / fp16 / fp64, last dimension contiguous (copied otherwise).
        labels: [...], int64. Rows with `ignore_index` give 0 and no gradient, and are not computed.
        outputs: names of the `TokenStats` fields to compute. One that is not named costs nothing.
        temperature: positive float, or a tensor with one entry per row. Divides last. Not differentiable.
        softcap: cap c of c * tanh(x / c), as Gemma has it; None for none.
        logit_scale: multiplies the logits first (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        keep_mask: bool [..., V] or [V]; False entries leave the softmax (top-k, top-p, padded vocabulary).
        ignore_index: the label of rows to skip.
        inplace_backward: overwrite `logits` with their gradient in the backward. Saves a tensor of their size; anything
            that still needs the logits' values, a second backward among them, then raises torch's in-place error.
        vocab_group: the ranks that split the vocabulary, None for none: each calls this, forward and backward, with the
            same labels and with logits [..., V_r] and keep_mask of its own ids, those that follow the shards of the ranks
            before it. All get the same results; the gradient is that of the rank's own logits.
        backend: "cpp", "triton", "cuda" or "torch"; None chooses by device (`available_backends`), between "triton"
            and "cuda" by each tile's shape (`describe()["dispatch"]`).

    Returns:
        TokenStats of the labels' shape, fp32 (fp64 for fp64 logits). `logps` and `entropy` are differentiable once.

    Raises:
        ValueError: a shape, dtype, device or range that can never work, a label outside [0, V) (on CUDA: NaN), or ranks of
            vocab_group that were called with different labels or options.
        NotImplementedError: a backend that cannot serve this device.

    Numerics:
        fp32 arithmetic relative to the row maximum, so a common offset changes nothing; fp64 for fp64 logits.

    Example:
        >>> logits = torch.randn(4, 100, requires_grad=True)
        >>> stats = token_stats(logits, torch.tensor([1, 2, 3, -100]))
        >>> (-stats.logps.sum() - 0.01 * stats.entropy.sum()).backward()
    """
    outputs = checks.check_outputs(outputs)
    checks.check_matrix("logits", logits, "[..., V]")
    if logits.ndim < 1 or (logits.shape[-1] < 1 and vocab_group is None):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; the last dimension is the vocabulary and needs an entry."
        )
    checks.check_labels(labels, logits.shape[:-1], logits.device)
    checks.check_bool("inplace_backward", inplace_backward)
    rows = logits if logits.ndim > 1 else logits[None]
    if rows.stride(-1) != 1 or (inplace_backward and _rows_overlap(rows)):
        rows = rows.contiguous()
    transform = checks.make_transform(
        labels.numel(),
        logits.shape[-1],
        logits.device,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        bias=None,
        keep_mask=keep_mask,
    )
    options = schema.flat_options(transform, ignore_index, outputs, backend, vocab_group)
    results = torch.ops.entropy_po.token_stats(rows, labels.reshape(-1), *options, inplace_backward)
    return schema.token_stats_from_flat(results, outputs, labels.shape)


def _rows_overlap(logits: Tensor) -> bool:
    """Whether two rows share memory, as those of an expanded tensor do: each would overwrite the other's gradient."""
    return any(
        size > 1 and stride < logits.shape[-1]
        for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True)
    )


def _row_blocks(logits: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The rows of [..., V] logits as views [n, V], each with its place among all rows: one block where the rows lie at
    even distances, else one per leading index, so that the usual shift, `logits[:, :-1]`, copies nothing."""
    if logits.shape[-1] == 0:  # an empty shard
        return
    try:
        block = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        for part in logits:
            yield from _row_blocks(part, start)
            start += math.prod(part.shape[:-1])
    else:
        yield slice(start, start + block.shape[0]), block


def _forward(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    ignore_index, outputs, backend = options[5:8]
    shards = schema.vocab_shards(logits.shape[-1], labels, options)
    if logits.device.type == "cpu":
        checks.check_values(labels, shards.total, ignore_index, options[0], options[3])
    level = Level.for_outputs(tuple(outputs))
    labels, chosen = labels.contiguous(), tiles.resolve_backend(backend, logits.device)
    state = (state_memory if logits.shape[-1] else new_state)(labels.numel(), level, logits)
    transform = schema.transform_from_options(options)
    for rows, block in _row_blocks(logits):
        tiles.fold_(
            block,
            labels[rows],
            shards.start,
            state[:, rows],
            transform.tile(rows, slice(None), state.dtype),
            level=level,
            first=True,
            ignore_index=ignore_index,
            backend=chosen,
        )
    shards.complete_(state, labels, ignore_index)
    return *schema.flat_stats(tiles.stats(state, tuple(outputs), backend=chosen), logits), state


def _fake_forward(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    outputs = options[6]
    state = state_memory(labels.shape[0], Level.for_outputs(tuple(outputs)), logits)
    return *schema.empty_stats(labels.shape[0], outputs, logits), state


def _grad_into(
    out: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    *options: Any,
) -> None:
    ignore_index, _, backend = options[5:8]
    shards = schema.vocab_shards(logits.shape[-1], labels, options)
    labels, transform = labels.contiguous(), schema.transform_from_options(options)
    chosen = tiles.resolve_backend(backend, logits.device)
    flat_out = None if out is logits else out.flatten(0, -2)
    for rows, block in _row_blocks(logits):
        tiles.grad_(
            block,
            labels[rows],
            shards.start,
            state[:, rows],
            None if grad_logps is None else grad_logps[rows],
            None if grad_entropy is None else grad_entropy[rows],
            transform.tile(rows, slice(None), state.dtype),
            ignore_index=ignore_index,
            out=block if flat_out is None else flat_out[rows],
            backend=chosen,
        )


def _backward(grad_logps: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _grad_into(out, grad_logps, grad_entropy, logits, *rest)
    return out


def _fake_backward(grad_logps: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward_(grad_logps: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any) -> None:
    _grad_into(logits, grad_logps, grad_entropy, logits, *rest)
    # the kernel wrote behind autograd's back: whoever still needs the logits must get its error, not a gradient
    torch.autograd.graph.increment_version(logits)


def _fake_backward_(*args: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, row_temperature, keep_mask, *rest, inplace_backward = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, row_temperature, keep_mask, output[-1])
    ctx.mark_non_differentiable(*output[2:])
    ctx.options, ctx.inplace_backward = rest, inplace_backward


def _autograd(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0] or (grad_logps is None and grad_entropy is None):
        return (None,) * 12
    schema.refuse_second_order("token_stats")
    logits, labels, row_temperature, keep_mask, state = ctx.saved_tensors
    # An output that was not asked for has an empty gradient when something upstream materialised it.
    upstream = [g.contiguous() if g is not None and g.numel() else None for g in (grad_logps, grad_entropy)]
    options = (row_temperature, keep_mask, *ctx.options)
    if ctx.inplace_backward:
        torch.ops.entropy_po.token_stats_backward_(*upstream, logits, labels, state, *options)
        grad = logits
    else:
        grad = torch.ops.entropy_po.token_stats_backward(*upstream, logits, labels, state, *options)
    return grad, *(None,) * 11


for _name, _kernel, _fake in (
    ("token_stats", _forward, _fake_forward),
    ("token_stats_backward", _backward, _fake_backward),
    ("token_stats_backward_", _backward_, _fake_backward_),
):
    schema.register_kernel(_name, _kernel)
    torch.library.register_fake(f"entropy_po::{_name}", _fake, lib=schema.LIBRARY)
torch.library.register_autograd("entropy_po::token_stats", _autograd, setup_context=_setup_context, lib=schema.LIBRARY)

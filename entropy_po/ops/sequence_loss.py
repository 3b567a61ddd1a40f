"""`sequence_loss`: any loss of sequences' log-probs and entropies, from hidden states, without logits held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from entropy_po.ops import checks, linear_token_stats, parallel, schema, sequences
from entropy_po.ops.lm_head import LmHead
from entropy_po.ops.sequences import GradientSums, RowTiles, Sequences
from entropy_po.plan import Choice, SequencePlan, Strategy, row_slices
from entropy_po.types import IfAsked, OutputName, exact_logps, state_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from entropy_po.tiles import BackendName


class SequenceBatch(NamedTuple):
    """What a `loss_fn` of `sequence_loss` sees: some of the call's sequences, whole groups of them.

    S sequences with n labelled tokens; log-probs and entropies in nats, differentiable. Index tensors of your own with
    `sequences` (one entry per sequence), `sequence_ids` (a sequence's entry, at each of its tokens) or `rows` (per token).
    """

    token_logps: Tensor  # [n]
    token_entropy: IfAsked  # [n]; None unless outputs names it
    rows: Tensor  # [n] int64, places among the N rows of the call
    sequence_ids: Tensor  # [n] int64
    lengths: Tensor  # int64, labelled tokens of every sequence of the call
    sequences: slice | Any = None  # which sequences; None where a term reads one token alone
    logps: IfAsked = None  # [S], fp64, sums over each sequence's tokens, of which none was rounded to fp32
    entropy: IfAsked = None  # [S], fp64


class SequenceLossOutput(NamedTuple):
    """What `sequence_loss` returns. Only `loss` is differentiable."""

    loss: Tensor  # scalar, the sum of all terms
    logps: Tensor  # [S], sums over labelled tokens, nats
    entropy: IfAsked  # [S], likewise; None unless outputs names it
    lengths: Tensor  # [S] int64
    token_logps: Tensor  # [N], 0 where the label is ignored
    choice: Choice

    @property
    def strategy(self) -> str:
        """How the gradients were made: "resident", "deferred" or "recompute"."""
        return self.choice.name

    @property
    def reason(self) -> str:
        """Why that strategy."""
        return self.choice.reason


LossFunction = Callable[[SequenceBatch], Tensor]


# torch.compiler.disable would import the compiler, and Triton, with this package; this does at the first call, as torch's
# own optimizers do.
@torch._disable_dynamo
def sequence_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    loss_fn: LossFunction,
    *,
    coupled: int = 1,
    outputs: tuple[OutputName, ...] = ("logps",),
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    strategy: Strategy = "auto",
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    backend: BackendName | None = None,
) -> SequenceLossOutput:
    """A loss of your own over packed sequences, with gradients for hidden states, weight and bias.

    The loss must be a sum of terms, each over `coupled` consecutive sequences: 2 for pairs, G for a group of G answers, 1 for
    a sequence alone, 0 for a token alone. `loss_fn` is called with some whole groups at a time and returns the sum of
    their terms; where their logits fit the budget its derivatives are taken while the logits are there: three products, two
    with a frozen head. Otherwise it is called once with everything, and the logits are computed again: one more product.
    With a frozen head and log-probs alone it is called once with everything, at two products on any budget.

    Args:
        hidden_states, weight, labels, cu_seqlens: as in `linear_preference_loss`; [S + 1] offsets, any number of sequences.
        loss_fn: SequenceBatch -> scalar. It may use constants; a parameter of its own would get no gradient from resident tiles, and is refused.
        coupled: consecutive sequences that a term reads together.
        outputs: "logps", and "entropy" where the loss needs it; what is not named costs nothing.
        vocab_group, sequence_group: as in `linear_preference_loss`. Over a sequence_group, `logps`, `entropy` and `lengths`
            are those of whole sequences and the tokens this rank's: a term over sequences must read no tokens, so that
            it is the same number on every rank, and terms over tokens alone (coupled=0) are summed over the ranks.
        workspace_bytes: as in `linear_preference_loss`.
        strategy: "auto", "resident", "recompute", or, with a frozen head, log-probs alone and no vocab_group, "deferred".
        bias, temperature, softcap, logit_scale, keep_mask, ignore_index, backend: as in `linear_token_stats`.

    Returns:
        SequenceLossOutput. `loss` is differentiable once.

    Raises:
        ValueError: an argument that can never work, or a `loss_fn` that returns no scalar with a gradient.

    Note:
        Under torch.compile the call runs as it is, outside the graph: `loss_fn` is Python.

    Example:
        >>> hidden, head = torch.randn(9, 16, requires_grad=True), torch.nn.Linear(16, 50, bias=False)
        >>> labels, cu_seqlens = torch.randint(50, (9,)), torch.tensor([0, 4, 9])
        >>> def simpo(batch, beta=2.0, gamma=0.5):  # arXiv 2405.14734
        ...     reward = beta * batch.logps / batch.lengths[batch.sequences]
        ...     return -torch.nn.functional.logsigmoid(reward[0::2] - reward[1::2] - gamma).sum()
        >>> sequence_loss(hidden, head.weight, labels, cu_seqlens, simpo, coupled=2).loss.backward()
    """
    outputs = checks.check_outputs(outputs)
    if not set(outputs) <= {"logps", "entropy"}:
        raise ValueError(f"outputs={outputs!r}: only logps and entropy are differentiable.")
    outputs = ("logps", "entropy") if "entropy" in outputs else ("logps",)
    weight, bias = parallel.local_shards(vocab_group, weight=weight, bias=bias)
    hidden_states, weight, transform = checks.check_linear(
        hidden_states, weight, labels, bias, temperature, softcap, logit_scale, keep_mask, workspace_bytes
    )
    checks.check_offsets(cu_seqlens)
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of a SequenceBatch, got {loss_fn!r}.")
    if not isinstance(coupled, int) or coupled < 0 or (coupled and (cu_seqlens.numel() - 1) % coupled):
        raise ValueError(
            f"coupled={coupled!r} must be 0 (a term reads one token) or divide the {cu_seqlens.numel() - 1} sequences."
        )
    options = schema.flat_options(transform, ignore_index, outputs, backend, vocab_group)
    inputs = hidden_states, weight, bias
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    with torch.no_grad():
        shared = {"coupled": coupled, "strategy": strategy, "needs_grad": needs}
        head = LmHead(hidden_states, weight, bias, labels, options, **shared)
        seqs = Sequences(head, cu_seqlens, parallel.group_name("sequence_group", sequence_group), **shared)
    # over a vocab_group, linear_token_stats makes the logits twice
    row_by_row = needs == (True, False, False) and outputs == ("logps",) and vocab_group is None
    plan = sequences.plan_for(head, seqs, needs, strategy, workspace_bytes, coupled=coupled, row_by_row=row_by_row)
    batches = _Batches(head, seqs, coupled)
    if plan.choice.name in ("recompute", "deferred"):
        budget = sequences.any_shape_budget(head, plan.choice.workspace_bytes, strategy)
        stats, state = linear_token_stats.stats_and_state(
            *inputs, labels, options, budget, ahead=plan.choice.name == "deferred"
        )
        kept = slice(None) if head.kept is None else head.kept
        token_logps = stats.logps[kept]
        token_entropy: IfAsked = stats.entropy[kept] if "entropy" in outputs else None
        exact = exact_logps(state[:, kept])
        everything = slice(0, head.num_kept), slice(0, len(seqs))
        batch = batches.of(*everything, token_logps, exact, token_entropy)
        loss = _checked(loss_fn(batch), stats.logps.requires_grad)
    else:
        loss, token_logps, exact, token_entropy = _Resident.apply(  # type: ignore[no-untyped-call]
            *inputs, head, plan, batches, loss_fn, needs
        )
    if not coupled:
        loss = seqs.ranks.sum(loss)
    return SequenceLossOutput(
        loss.to(state_dtype(hidden_states.dtype)),
        seqs.sums(exact).to(token_logps.dtype),
        seqs.sums(token_entropy.detach()).to(token_logps.dtype) if "entropy" in outputs else None,
        seqs.lengths,
        head.scatter(token_logps.detach()),
        plan.choice,
    )


class _Batches:
    """Makes the SequenceBatch of some sequences, or of some rows where a term reads one token alone."""

    def __init__(self, head: LmHead, seqs: Sequences, coupled: int):
        self.seqs, self.coupled = seqs, coupled
        self.rows = torch.arange(head.num_rows, device=head.labels.device) if head.kept is None else head.kept
        self.sequence_ids = seqs.per_row(torch.arange(len(seqs), device=head.labels.device))

    def of(self, rows: slice, part: slice, logps: Tensor, exact: Tensor, entropy: Tensor | None) -> SequenceBatch:
        """Of the kept rows `rows`, which are sequences `part` unless a term reads one token alone. `exact`: `logps` before they
        were rounded."""
        batch = SequenceBatch(logps, entropy, self.rows[rows], self.sequence_ids[rows], self.seqs.lengths)
        if not self.coupled:
            return batch
        to_sum = _Unrounded.apply(logps, exact), entropy  # type: ignore[no-untyped-call]
        sums = [None if x is None else self.seqs.sums(x, part.start, part.stop) for x in to_sum]
        return batch._replace(sequences=part, logps=sums[0], entropy=sums[1])

    def parts(self, plan: SequencePlan) -> Iterator[tuple[slice, slice]]:
        """(rows, sequences) of every tile. Over a sequence_group, the same sequences on all ranks: rows may be none."""
        if not self.coupled:
            parts = row_slices(0, self.rows.numel(), max(plan.choice.tile_rows, 1), self.rows.device.type)
            yield from ((rows, slice(0, 0)) for rows in parts)
        for group in plan.groups:  # those without a label too: their terms are part of the loss
            yield self.seqs.rows(group.start, group.stop), slice(group.start, group.stop)


class _Unrounded(torch.autograd.Function):
    """Log-probs in fp64 as they were before they were rounded, with the gradient of those that were."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, exact: Tensor) -> Tensor:
        ctx.dtype = logps.dtype
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _Resident(torch.autograd.Function):
    """Each group's loss is differentiated while its logits are there; the backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LmHead,
        plan: SequencePlan,
        batches: _Batches,
        loss_fn: LossFunction,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles = RowTiles(head, plan.weight_cols)
        parts = list(batches.parts(plan))
        tiles.reserve(rows for rows, _ in parts)
        sums = GradientSums(tiles, needs, num_tiles=len(parts))
        total = hidden.new_zeros((), dtype=torch.float64)
        for rows, part in parts:
            folded = tiles.fold(rows) if rows.stop > rows.start else None
            # hooks of its own: those of a checkpoint around this would make everything again for each tile
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                leaves = [tiles.logps[rows].clone().requires_grad_()]
                if head.level:
                    leaves.append(tiles.entropy[rows].clone().requires_grad_())
                exact, entropy = tiles.exact_logps[rows], leaves[1] if head.level else None
                batch = batches.of(rows, part, leaves[0], exact, entropy)
                loss = _checked(loss_fn(batch), True)
                _refuse_other_leaves(loss, leaves)
                upstream = torch.autograd.grad(loss, leaves, allow_unused=True)
            total += loss.detach()
            if folded is None:
                continue
            states, tile, state = folded
            gradient = head.grad_(tile, rows, tiles.all_cols, state, *upstream, *(None,) * (2 - len(upstream)))
            sums.add(rows, gradient, states, sums.vocab)
        ctx.save_for_backward(*sums.finish())
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(tiles.logps, tiles.exact_logps, tiles.entropy)
        return total, tiles.logps, tiles.exact_logps, tiles.entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        schema.refuse_second_order("sequence_loss")
        return *sequences.all_scaled(ctx, grad_loss), *(None,) * 5


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _checked(loss: Tensor, wants_gradient: bool) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, the sum of its batch's terms; got {got}.")
    if wants_gradient and not loss.requires_grad:
        raise ValueError("loss_fn returned a constant; it must depend on the batch's logps or entropy, undetached.")
    return loss.reshape(())


def _refuse_other_leaves(loss: Tensor, leaves: list[Tensor]) -> None:
    """A parameter inside loss_fn would get no gradient from here, and nobody would notice."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                f"loss_fn uses a tensor of shape {tuple(variable.shape)} that requires a gradient and would get none; "
                "detach it, or use strategy='recompute'."
            )
        todo += [following for following, _ in node.next_functions]

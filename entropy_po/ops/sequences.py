"""Packed sequences over a head: tiles of whole rows, and the sums that their gradients are added into."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from entropy_po.ops import gemm
from entropy_po.ops.gemm import Operand
from entropy_po.ops.lm_head import HiddenSum, LmHead
from entropy_po.ops.parallel import Ranks
from entropy_po.plan import (
    DEFAULT_CPU_SEQUENCE_WORKSPACE,
    DEFAULT_CPU_WORKSPACE,
    DEFAULT_GPU_WORKSPACE,
    GPU_WORKSPACE_SHARE,
    MIN_TILE_SIDE,
    Choice,
    SequencePlan,
    kind_of,
    plan_sequences,
    slices,
    tile_bytes,
)
from entropy_po.types import exact_logps

logger = logging.getLogger("entropy_po")
_logged: set[tuple[int, int]] = set()

# More saves no time, and a backward that makes logits again may find less memory than the forward did.
ANY_SHAPE_WORKSPACE = {"cpu": DEFAULT_CPU_WORKSPACE, "gpu": DEFAULT_GPU_WORKSPACE}


def default_workspace(device: torch.device, any_shape: bool) -> int:
    """For tiles of whole rows 256 MiB on a CPU; on a GPU a quarter of the memory that is free there now, of what torch's allocator has
    in reserve too: in training that is where most of it is. For tiles of any shape at most `ANY_SHAPE_WORKSPACE`."""
    if device.type == "cpu":
        return ANY_SHAPE_WORKSPACE["cpu"] if any_shape else DEFAULT_CPU_SEQUENCE_WORKSPACE
    memory = torch.get_device_module(device)
    reserve = memory.memory_reserved(device) - memory.memory_allocated(device)
    share = int(GPU_WORKSPACE_SHARE * (memory.mem_get_info(device)[0] + reserve))
    return min(share, ANY_SHAPE_WORKSPACE["gpu"]) if any_shape else share


class Sequences:
    """Where each sequence lies among the kept rows of a head; over a sequence_group, where this rank's part of it does."""

    def __init__(self, head: LmHead, cu_seqlens: Tensor, sequence_group: str = "", **facts: object):
        """`facts` are what else must be equal on all ranks of a sequence_group, beside the number of sequences.

        Raises:
            ValueError: the offsets do not run from 0 to the number of rows without a step back; or ranks that differ.
        """
        self.starts = offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != head.num_rows or any(b < a for a, b in pairwise(offsets)):
            shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
            raise ValueError(f"cu_seqlens={shown} must rise from 0 to the {head.num_rows} rows of hidden_states.")
        if head.kept is not None:
            self.starts = torch.searchsorted(head.kept, cu_seqlens.to(head.kept)).tolist()
        self.lengths_here = torch.tensor(self.starts, device=head.labels.device).diff()
        self.ranks = Ranks("sequence_group", sequence_group)
        self.ranks.agree(head.labels.device, sequences=len(self), **facts)
        lengths = self.ranks.gather(self.lengths_here)
        self.lengths = lengths.sum(0)  # [S], of whole sequences
        self.longest_parts = self.host_lengths if len(lengths) == 1 else lengths.amax(0).tolist()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def host_lengths(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.starts)]

    def rows(self, start: int, stop: int) -> slice:
        """The rows of sequences [start, stop)."""
        return slice(self.starts[start], self.starts[stop])

    def sums(self, values: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Per sequence, of values at the rows of sequences [start, stop), in fp64: a long answer's log-prob is large,
        and a margin is a difference of two. Over all ranks' parts, which makes this an exchange."""
        return self.ranks.sum(segment_sums(values, self.lengths_here[start:stop]))

    def per_row(self, values: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """A value per sequence of [start, stop) at each of its rows."""
        rows = self.rows(start, len(self) if stop is None else stop)
        return values.repeat_interleave(self.lengths_here[start:stop], output_size=rows.stop - rows.start)


def plan_for(
    head: LmHead,
    seqs: Sequences,
    needs: Sequence[bool],
    strategy: str,
    workspace_bytes: int | None,
    row_by_row: bool,
    **loss: Any,
) -> SequencePlan:
    """`plan_sequences` for a head; `loss` says what it knows of the loss: coupled, can_defer, anchored. The budget, the default for
    None, is `choice.workspace_bytes`.

    Every tile is an exchange over the groups that are there, so all ranks plan alike: by the widest shard of the vocabulary,
    the longest part of each sequence, and the smallest budget.
    """
    if workspace_bytes is None:
        workspace_bytes = default_workspace(head.hidden.device, row_by_row and strategy in ("auto", "deferred"))
    for ranks in (head.shards.ranks, seqs.ranks):
        workspace_bytes = ranks.smallest(workspace_bytes, head.hidden.device)
    plan = plan_sequences(
        seqs.longest_parts,
        head.shards.widest,
        head.dim,
        element=head.arithmetic.itemsize,
        trained=needs[1],
        wanted=any(needs),
        converts=head.operand_copies,
        device_type=head.hidden.device.type,
        workspace_bytes=workspace_bytes,
        strategy=strategy,
        row_by_row=row_by_row,
        **loss,
    )
    _log(plan.choice)
    return plan


def _log(choice: Choice) -> None:
    """Each kind of choice once a process, not once a step: its numbers may differ from batch to batch."""
    if (choice.strategy, choice.why) not in _logged and logger.isEnabledFor(logging.INFO):
        _logged.add((choice.strategy, choice.why))
        logger.info("gradients of sequences: %s (%s)", choice.name, choice.reason)


def any_shape_budget(head: LmHead, workspace_bytes: int, strategy: str) -> int:
    """For tiles of any shape; a call that names its strategy gets one, whatever the budget, also where nothing is trained."""
    budget = min(workspace_bytes, ANY_SHAPE_WORKSPACE[kind_of(head.hidden.device.type)])
    if strategy == "auto":
        return budget
    element, copies = head.arithmetic.itemsize, head.operand_copies
    return max(budget, tile_bytes(MIN_TILE_SIDE, MIN_TILE_SIDE, head.dim, element=element, operand_copies=copies))


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[S] in fp64, the sums of consecutive segments; the order of the sum is fixed, also on a GPU."""
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, initial=0, unsafe=True)


class RowTiles:
    """Tiles of whole rows: fold one, and its log-probs and entropies are known while its logits are still there."""

    def __init__(self, head: LmHead, weight_cols: int):
        self.head, self.weight_cols = head, weight_cols
        self.logps = head.hidden.new_empty(head.num_kept, dtype=head.arithmetic)  # [K], nats
        self.exact_logps = self.logps.new_empty(head.num_kept, dtype=torch.float64)  # to be summed
        self.entropy = self.logps.new_zeros(head.num_kept)  # [K], nats; 0 unless the head's outputs name it

    def reserve(self, parts: Iterable[slice]) -> None:
        """Memory for the tallest of these tiles, so that it is never asked for beside that of a lower one."""
        self.head.tile(max((rows.stop - rows.start for rows in parts), default=0), self.head.vocab_size)

    @property
    def all_cols(self) -> slice:
        return slice(0, self.head.vocab_size)

    def col_slices(self) -> Iterator[slice]:
        return slices(0, self.head.vocab_size, self.weight_cols)

    def fold(self, rows: slice) -> tuple[Operand, Tensor, Tensor]:
        """The rows' hidden states, logits and complete row state."""
        head, n = self.head, rows.stop - rows.start
        hidden = head.hidden_rows(rows)
        tile = head.tile(n, head.vocab_size)
        for cols in self.col_slices():
            head.logits(hidden, head.weight_rows(cols), tile[:, cols])
        state = head.state(n)
        head.fold_(tile, rows, self.all_cols, state)
        head.complete_(state, rows)
        stats = head.stats(state, ("logps", "entropy") if head.level else ("logps",))
        self.logps[rows], self.exact_logps[rows] = stats.logps, exact_logps(state)
        if stats.entropy is not None:
            self.entropy[rows] = stats.entropy
        return hidden, tile, state


class VocabSums:
    """Sums over the rows of a call: dW [V, D] and dbias [V], each None where it is not wanted."""

    def __init__(self, tiles: RowTiles, weight_dtype: torch.dtype | None, wants_bias: bool):
        head = tiles.head
        self.tiles, self.empty = tiles, True
        self.finished: Tensor | None = None  # dW as it will be returned, where the last product has made that
        self.factor: Tensor | None = None  # that the sums are still to be multiplied by
        self.weight = self.bias = None
        if weight_dtype is not None:
            self.weight = head.weight.new_empty(head.weight.shape, dtype=weight_dtype)
        if wants_bias:
            self.bias = head.weight.new_zeros(head.vocab_size, dtype=head.arithmetic)

    def add_product(self, gradient: Tensor, hidden: Operand, factor: Tensor | None = None, last: bool = False) -> None:
        """A tile's gradient [n, V], transposed, times its hidden states [n, D]; then all that was added is multiplied by a scalar
        tensor. `last`: nothing will be added after it."""
        self._multiply()
        if self.weight is not None:
            right, head = hidden.beside(gradient), self.tiles.head
            dtype = held_dtype(head.weight.dtype)
            for cols in self.tiles.col_slices():
                total, left = self.weight[cols], gradient[:, cols].t()
                if last and factor is not None and gemm.scales_sums(left, right, dtype):
                    if self.finished is None:
                        same = self.weight.dtype == dtype
                        self.finished = self.weight if same else torch.empty_like(self.weight, dtype=dtype)
                    gemm.add_last_product(total, left, right, self.empty, factor, self.finished[cols])
                else:
                    head.add_product(total, left, hidden, self.empty)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        self.empty, self.factor = False, factor

    def _multiply(self) -> None:
        if self.factor is not None:
            for total in self._totals():
                total.mul_(_with_all_digits(self.factor, total))
            self.factor = None

    def add_(self, other: VocabSums, factor: Tensor) -> None:
        """self += factor * other, in one pass."""
        self._multiply()
        for total, part in zip(self._totals(), other._totals(), strict=True):
            if self.empty:
                torch.mul(part, factor.to(part.dtype), out=total)
            else:
                total.addcmul_(part, factor.to(part.dtype))
        self.empty = False

    def clear(self) -> None:
        """Forget the sums; the next product overwrites dW."""
        self.empty, self.factor = True, None
        if self.bias is not None:
            self.bias.zero_()

    def finish(self, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
        """(dW, dbias); dW is 0 where nothing was added."""
        if self.weight is not None and self.empty:
            self.weight.zero_()
        grad_weight, grad_bias = self.finished, None
        if self.weight is not None and grad_weight is None:
            grad_weight = _times(self.weight, self.factor, weight_dtype)
        if self.bias is not None and bias_dtype is not None:
            grad_bias = _times(self.bias, self.factor, bias_dtype)
        return grad_weight, grad_bias

    def _totals(self) -> list[Tensor]:
        return [total for total in (self.weight, self.bias) if total is not None]


class GradientSums:
    """dH, dW and dbias of one call over row tiles. A result is kept in its own dtype, fp16 in fp32: what comes back through
    a loss scale must not have been rounded without it."""

    def __init__(self, tiles: RowTiles, needs: Sequence[bool], num_tiles: int):
        head = tiles.head
        self.tiles = tiles
        wants_hidden, wants_weight, wants_bias = needs
        self.hidden = None
        if wants_hidden:
            products = -(-head.vocab_size // tiles.weight_cols)
            self.hidden = HiddenSum(head, products, held_dtype(head.hidden.dtype))
        self.weight_dtype = None
        if wants_weight:
            self.weight_dtype = held_dtype(gemm.accumulator_dtype(head.weight.dtype, num_tiles))
        self.vocab = VocabSums(tiles, self.weight_dtype, wants_bias)

    def another_vocab(self) -> VocabSums:
        return VocabSums(self.tiles, self.weight_dtype, self.vocab.bias is not None)

    def add(
        self,
        rows: slice,
        gradient: Tensor,
        hidden: Operand,
        vocab: VocabSums,
        factor: Tensor | None = None,
        last: bool = False,
    ) -> None:
        """The products of one tile: dH of its rows, and its part of dW as `vocab.add_product`."""
        if self.hidden is not None:
            for cols in self.tiles.col_slices():
                weight = self.tiles.head.weight_rows(cols)
                self.hidden.add_product(rows, gradient[:, cols], weight, cols.start == 0)
        vocab.add_product(gradient, hidden, factor, last)

    def scale_hidden_(self, rows: slice, factor: Tensor) -> None:
        """By a scalar tensor."""
        if self.hidden is not None:
            self.hidden.rows[rows] *= _with_all_digits(factor, self.hidden.rows)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dH, dW, dbias), [0] where not wanted."""
        head = self.tiles.head
        empty = head.hidden.new_empty(0)
        bias = head.transform.bias
        grad_weight, grad_bias = self.vocab.finish(
            held_dtype(head.weight.dtype), None if bias is None else held_dtype(bias.dtype)
        )
        return (
            empty if self.hidden is None else self.hidden.finish(),
            empty.clone() if grad_weight is None else grad_weight,
            empty.clone() if grad_bias is None else grad_bias,
        )


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """How a gradient is kept until its upstream scalar is known."""
    return torch.float32 if dtype == torch.float16 else dtype


def all_scaled(ctx: Any, factor: Tensor) -> list[Tensor | None]:
    """The saved gradients of (hidden states, weight, bias) times the upstream scalar."""
    parts = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    return [scaled(saved, factor, dtype) if need else None for saved, dtype, need in parts]


def scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A saved gradient times the upstream scalar, in the input's dtype: in its own memory, unless the graph will be used
    again, or is being traced."""
    if type(saved) is not Tensor or _graph_is_kept():
        return (saved * _with_all_digits(factor, saved)).to(dtype)
    is_one = factor.device.type == "cpu" and factor == 1  # on a GPU, to look would be to wait
    return _times(saved, None if is_one else factor, dtype)


def _with_all_digits(factor: Tensor, x: Tensor) -> Tensor:
    """A scalar tensor as `x * factor` takes it without rounding it to a narrow dtype of x first.

    On a CPU that is one of no dimension, and one with dimensions would have all of x copied to its dtype; on a GPU one of no
    dimension would be rounded, and one with dimensions costs nothing."""
    factor = factor.to(torch.promote_types(x.dtype, torch.float32))
    return factor if x.device.type == "cpu" else factor.reshape((1,) * x.ndim)


def _times(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x times a scalar tensor (None: 1) in that dtype, in one pass; in x's own memory where that is its dtype."""
    if factor is None:
        return x.to(dtype)
    factor = _with_all_digits(factor, x)
    if x.dtype == dtype:
        return x.mul_(factor)
    result = torch.empty_like(x, dtype=dtype)
    for rows in few_rows(x):
        torch.mul(x[rows], factor, out=result[rows])
    return result


def rows_scaled(saved: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The same with a factor per row [N]."""
    if type(saved) is not Tensor:
        return torch.where(factors[:, None] == 0, 0, saved * factors[:, None]).to(dtype)
    result = torch.empty_like(saved) if _graph_is_kept() else saved
    scale_rows(saved, factors, out=result)
    return result.to(dtype)


def scale_rows(x: Tensor, factors: Tensor, out: Tensor) -> None:
    """x [N, D] times a factor per row [N]; a row whose factor is 0 is 0, whatever it holds."""
    for rows in few_rows(x):
        factor = factors[rows, None]
        out[rows] = (x[rows] * factor).masked_fill_(factor == 0, 0)


def few_rows(x: Tensor) -> Iterator[slice]:
    """The rows of `x` [n, ...], some megabytes at a time: an expression's temporaries are never as large as it is."""
    elements = 1 << (20 if x.device.type == "cpu" else 22)
    return slices(0, len(x), max(1, elements // max(x[:1].numel(), 1)))


def _graph_is_kept() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()

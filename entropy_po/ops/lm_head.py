"""A language-model head on one call's inputs: the tiles of its logits, and the sums of their gradients.

The operators above are loops over this: which tiles, in which order, with which upstream gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from entropy_po import tiles
from entropy_po.ops import checks, gemm, schema
from entropy_po.ops.gemm import Operand
from entropy_po.plan import slices
from entropy_po.types import Level, TokenStats, new_state, state_dtype, state_memory


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class LmHead:
    """hidden states [N, D], weight [V, D] and labels [N], reduced to the K rows whose label counts.

    Rows without a label never reach a product. They are gathered tile by tile, so that no second copy of the hidden states
    lives. Every row index here is one among the kept rows.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: schema.FlatOptions,
        **facts: object,
    ):
        """`facts` are what else must be equal on all ranks of a vocab_group, beside the options."""
        self.hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        self.weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        self.num_rows, self.dim = hidden.shape
        self.vocab_size = weight.shape[0]  # of this rank's shard, where the vocabulary is split
        self.ignore_index, outputs, backend = options[5], tuple(options[6]), options[7]
        self.backend = tiles.resolve_backend(backend, hidden.device)
        self.level = Level.for_outputs(outputs)
        self.arithmetic = state_dtype(hidden.dtype)
        self.operand_copies = gemm.operand_copies(hidden.dtype, hidden.device)
        self.scratch = gemm.Scratch(hidden.device)
        facts |= {"dtype": hidden.dtype, "temperature per row": options[0] is not None}
        self.shards = schema.vocab_shards(self.vocab_size, labels, options, **facts)
        if hidden.device.type == "cpu":
            checks.check_values(labels, self.shards.total, self.ignore_index, options[0], options[3])
        self.kept: Tensor | None = None  # all rows, which costs nothing
        # a graph will be replayed with other labels; kernels skip what is ignored, too
        if not _is_captured(hidden.device):
            kept = (labels != self.ignore_index).nonzero()[:, 0]
            self.kept = None if kept.numel() == labels.numel() else kept
        self.labels = labels.contiguous() if self.kept is None else labels[kept]
        self.transform = schema.transform_from_options(options, bias)  # its rows are the call's

    @property
    def num_kept(self) -> int:
        return self.labels.numel()

    def _places(self, rows: slice) -> slice | Tensor:
        """Where kept rows are among all rows of the call."""
        return rows if self.kept is None else self.kept[rows]

    def hidden_rows(self, rows: slice) -> Operand:
        return Operand(self.hidden[self._places(rows)], "hidden", self.scratch)

    def weight_rows(self, cols: slice) -> Operand:
        return Operand(self.weight[cols], "weight", self.scratch)

    def logits(self, hidden: Operand, weight: Operand, out: Tensor) -> Tensor:
        """The tile of raw logits, fp32 whatever the operands are, ready to be folded or overwritten by its gradient."""
        return gemm.logits_tile(hidden.for_logits, weight.for_logits, out, self.hidden.dtype, self.scratch)

    def tile(self, num_rows: int, num_cols: int) -> Tensor:
        """Memory for logits. Rows begin at a multiple of 64 bytes, of 32 as bf16: from anywhere, matrix products are slower."""
        pitch = -(-num_cols // 16) * 16
        return self.scratch("tile", (num_rows, pitch), self.arithmetic)[:, :num_cols]

    def take_labels_(self, tile: Tensor, rows: slice, cols: slice, raw: Tensor) -> None:
        """Move the logits of the labels that are among the columns from the tile into `raw` [n]; -inf stays in their place."""
        index = self.labels[rows, None] - (self.shards.start + cols.start)
        absent = (index < 0) | (index >= tile.shape[1])
        index = index.clamp(0, tile.shape[1] - 1)
        here = tile.gather(1, index)
        raw.copy_(torch.where(absent, raw[:, None], here)[:, 0])
        tile.scatter_(1, index, torch.where(absent, here, -torch.inf))

    def label_gradients(self, raw: Tensor, rows: slice, state: Tensor) -> Tensor:
        """d logps / d logit at the labels [n], from those logits and the rows' complete state; 0 where `raw` is -inf."""
        if not self.vocab_size:  # an empty shard
            return torch.zeros_like(raw)
        index = (self.labels[rows] - self.shards.start).clamp(0, self.vocab_size - 1)
        transform = replace(self.transform, bias=None, keep_mask=None)
        if self.transform.bias is not None:
            raw = raw + self.transform.bias[index].to(raw.dtype)
        if self.transform.keep_mask is not None:
            places = torch.arange(self.num_rows, device=raw.device)[self._places(rows)]
            keep = self.transform.keep_mask.expand(self.num_rows, self.vocab_size)[places, index]
            raw = raw.masked_fill(~keep, -torch.inf)
        tile = raw[:, None].clone()
        tiles.grad_(
            tile,
            torch.zeros_like(index),  # the one column is the label's
            0,
            state,
            torch.ones_like(raw),
            None,
            transform.tile(self._places(rows), slice(0, 1), self.arithmetic),
            ignore_index=-1,
            out=tile,
            backend=self.backend,
        )
        return tile[:, 0]

    def state(self, num_rows: int) -> Tensor:
        """Memory of a row state for `fold_`; what nothing will be folded into where this rank has no column."""
        return (state_memory if self.vocab_size else new_state)(num_rows, self.level, self.hidden)

    def complete_(self, state: Tensor, rows: slice) -> None:
        """The state of those rows, once all columns that are here have been folded, becomes that of the vocabulary."""
        self.shards.complete_(state, self.labels[rows], self.ignore_index)

    def stats(self, state: Tensor, outputs: tuple[str, ...]) -> TokenStats:
        """What a complete state says of its rows."""
        return tiles.stats(state, outputs, backend=self.backend)

    def fold_(self, tile: Tensor, rows: slice, cols: slice, state: Tensor) -> None:
        """Accumulate the logits [rows, cols] into the state of those rows, which those of the columns from 0 on begin."""
        tiles.fold_(
            tile,
            self.labels[rows],
            self.shards.start + cols.start,
            state,
            self.transform.tile(self._places(rows), cols, self.arithmetic),
            level=self.level,
            first=cols.start == 0,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )

    def grad_(
        self, tile: Tensor, rows: slice, cols: slice, state: Tensor, g_logp: Tensor | None, g_ent: Tensor | None
    ) -> Tensor:
        """The tile's gradient, in the tile's memory and in the dtype that the products after it take; state and upstream
        gradients (None: none) are those of its rows, in the arithmetic's dtype."""
        gradient = gemm.gradient_tile(tile, self.hidden.dtype)
        tiles.grad_(
            tile,
            self.labels[rows],
            self.shards.start + cols.start,
            state,
            g_logp,
            g_ent,
            self.transform.tile(self._places(rows), cols, self.arithmetic),
            ignore_index=self.ignore_index,
            out=gradient,
            backend=self.backend,
        )
        return gradient

    def add_product(self, total: Tensor, gradient: Tensor, operand: Operand, first: bool) -> None:
        """total (+)= gradient @ operand, as `gemm.add_product`."""
        right = operand.beside(gradient)
        with gemm.in_tf32(right.is_cuda and operand.given.dtype == torch.float16):
            gemm.add_product(total, gradient, right, first, self.scratch)

    # ---- between the kept rows and all rows ----

    def gather(self, per_row: Tensor | None) -> Tensor | None:
        """An upstream gradient [N] at the kept rows; None stays None, and so does the empty one that torch materialises."""
        if per_row is None or per_row.numel() == 0:
            return None
        per_row = per_row.to(self.arithmetic)
        return per_row.contiguous() if self.kept is None else per_row[self.kept]

    def scatter(self, values: Tensor) -> Tensor:
        """Values [..., K] of the kept rows among all N rows, 0 elsewhere."""
        if self.kept is None:
            return values
        return values.new_zeros((*values.shape[:-1], self.num_rows)).index_copy_(-1, self.kept, values)


class HiddenSum:
    """dH [N, D] of a head, added up over tiles; `rows` holds the kept rows first."""

    def __init__(self, head: LmHead, products: int, dtype: torch.dtype):
        """Sums of `products` products per row, for a result of `dtype`."""
        self.head, self.dtype = head, dtype
        sum_dtype = gemm.accumulator_dtype(dtype, products * len(head.shards.stops))
        # of all rows where it is the result itself, so that the kept rows are spread in it and not copied
        num_rows = head.num_rows if sum_dtype == dtype else head.num_kept
        self.rows = head.hidden.new_empty((num_rows, head.dim), dtype=sum_dtype)
        if not head.vocab_size:  # an empty shard adds no product
            self.rows.zero_()

    def add_product(self, rows: slice, gradient: Tensor, weight: Operand, first: bool) -> None:
        self.head.add_product(self.rows[rows], gradient, weight, first)

    def finish(self) -> Tensor:
        """The result, every row in its place and 0 where the label is ignored."""
        head, result = self.head, self.rows
        head.shards.ranks.sum_(result[: head.num_kept])
        if result.dtype != self.dtype:
            result = head.hidden.new_empty(head.hidden.shape, dtype=self.dtype)
            result[: head.num_kept] = self.rows
        if head.kept is None:
            return result
        # From the last to the first: a kept row's place never lies before it, so nothing is overwritten unmoved.
        # On a GPU, launches are what it costs.
        chunk = 128 if result.device.type == "cpu" else max(128, (1 << 24) // max(head.dim, 1))
        for part in reversed(list(slices(0, head.num_kept, chunk))):
            result.index_copy_(0, head.kept[part], result[part].clone())
        ignored = torch.ones(head.num_rows, dtype=torch.bool, device=result.device).index_fill_(0, head.kept, False)
        return result.index_fill_(0, ignored.nonzero()[:, 0], 0)

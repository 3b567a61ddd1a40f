"""From a byte budget to tile shapes. Integers only; no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

# On a CPU, 64 MiB take 1 to 4 % less time than 32; beyond, pages cost what larger tiles save. A GPU's products want thousands
# of rows and columns.
DEFAULT_CPU_WORKSPACE, DEFAULT_GPU_WORKSPACE = 64 << 20, 1 << 30
MIN_TILE_SIDE = 16  # a narrower tile is a matrix-vector product: the budget is refused instead
# Matrix products work on so many rows at a time, and as long on fewer: the compiled core's 12; 128 on a GPU.
ROW_BLOCK = {"cpu": 12, "gpu": 128}
COL_BLOCK = 64  # then rows stay aligned


def kind_of(device_type: str) -> Literal["cpu", "gpu"]:
    """Whose numbers a device goes by."""
    return "cpu" if device_type == "cpu" else "gpu"


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """start .. stop in pieces of at most `size`."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def even_size(length: int, most: int, block: int) -> int:
    """The size of as few pieces of at most `most` as there can be: whole blocks, if they fit, and none much smaller than the others."""
    pieces = max(1, math.ceil(length / most))
    return max(1, min(most, block * math.ceil(length / pieces / block)))


def row_slices(start: int, stop: int, most: int, device_type: str) -> Iterator[slice]:
    """Rows start .. stop in tiles of such a size."""
    return slices(start, stop, even_size(stop - start, most, ROW_BLOCK[kind_of(device_type)]))


@dataclass(frozen=True)
class TilePlan:
    """Tiles of at most `rows` x `cols` over a [n, v] problem, and the workspace bytes they take."""

    n: int
    v: int
    rows: int
    cols: int
    workspace_bytes: int

    def row_slices(self) -> Iterator[slice]:
        return slices(0, self.n, self.rows)

    def col_slices(self) -> Iterator[slice]:
        return slices(0, self.v, self.cols)

    @property
    def one_row_tile(self) -> bool:
        return self.rows >= self.n


def tile_bytes(rows: int, cols: int, d: int, *, element: int, operand_copies: bool, frozen: bool = False) -> int:
    """Bytes of the buffers that one call reuses from tile to tile: the tile [rows, cols], the sum of dW's columns (dH's rows
    where the head is frozen), one product that is added into dW or dH, and, with half-precision operands on a CPU, fp32
    copies of hidden and weight rows.
    """
    copies = (rows + cols) * d if operand_copies else 0
    sums = 2 * rows * d if frozen else cols * d + max(rows, cols) * d
    return element * (rows * cols + sums + copies)


def plan_tiles(
    n: int,
    v: int,
    d: int,
    *,
    element: int,
    operand_copies: bool,
    workspace_bytes: int,
    frozen: bool = False,
    device_type: str = "cpu",
) -> TilePlan:
    """The largest balanced tile within the budget.

    Beside its matrix products a tile costs one pass over its dW columns and one over its dH rows, in all
    n * v * (1/rows + 1/cols) times d: least, for a given area, when the tile is square. A side that reaches the whole
    problem gives its room to the other.

    Raises:
        ValueError: the budget cannot hold even a 16 x 16 tile with its operand copies.
    """

    def needed(rows: int, cols: int) -> int:
        return tile_bytes(rows, cols, d, element=element, operand_copies=operand_copies, frozen=frozen)

    def fits(rows: int, cols: int) -> bool:
        return needed(rows, cols) <= workspace_bytes

    n, v = max(n, 1), max(v, 1)
    smallest = min(n, MIN_TILE_SIDE), min(v, MIN_TILE_SIDE)
    if not fits(*smallest):
        raise ValueError(
            f"workspace_bytes={workspace_bytes} holds no tile; give at least {needed(*smallest)} for hidden size {d}."
        )
    if fits(n, v):
        rows, cols = n, v
    else:
        side = _largest(lambda k: fits(min(k, n), min(k, v)), max(n, v))
        rows, cols = min(side, n), min(side, v)
        if rows == n:
            cols = _largest(lambda k: fits(rows, k), v)
        elif cols == v:
            rows = _largest(lambda k: fits(k, cols), n)
        # equal tiles instead of full ones and a sliver
        rows, cols = even_size(n, rows, ROW_BLOCK[kind_of(device_type)]), even_size(v, cols, COL_BLOCK)
    return TilePlan(n, v, rows, cols, needed(rows, cols))


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest k in [1, upper] with fits(k), for a property that only ever turns from true to false."""
    low, high = 1, upper
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


# ---- losses over sequences ----

Strategy = Literal["auto", "resident", "deferred", "recompute"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
DEFAULT_CPU_SEQUENCE_WORKSPACE = 256 << 20
GPU_WORKSPACE_SHARE = 0.25  # of the memory that is free when the call begins
# A tile of few rows reads the weight twice, and reads and writes the sum of dW, for little arithmetic; computing the logits
# again in square tiles costs one product more. On a CPU the two are even below 100 rows (`python -m benchmarks.tile_rows`);
# the GPU's number is an estimate from its FLOPs per byte.
MIN_TILE_ROWS = {"cpu": 100, "gpu": 1024}


class Choice(NamedTuple):
    """The strategy that was chosen, and the numbers it was chosen by; integers, so that an operator can return it."""

    strategy: int  # index into STRATEGIES
    why: int  # index into WHY
    longest: int  # rows of the longest group of sequences that the loss reads together
    tile_rows: int  # rows of logits that the budget holds
    workspace_bytes: int
    extra_bytes: int  # of a second sum of dW

    @property
    def name(self) -> str:
        return STRATEGIES[self.strategy]

    @property
    def reason(self) -> str:
        return WHY[self.why].format(**self._asdict())


WHY = (
    "asked for by name",
    "no gradient is wanted: one pass over the logits",
    "the longest group, {longest} rows, is within the {tile_rows} rows of logits that {workspace_bytes} bytes hold",
    "the longest group has {longest} rows, and {workspace_bytes} bytes hold {tile_rows} rows of logits",
    "{workspace_bytes} bytes hold {tile_rows} rows of logits beside {extra_bytes} bytes for a second sum of dW: too few rows "
    "to read and write that sum for",
    "the longest group has {longest} rows, {workspace_bytes} bytes hold {tile_rows} rows of logits, and the loss does not "
    "depend on a group through one number alone",
    "the head is frozen: a row's gradient is made from tiles of any shape, up to one number that is multiplied in at the end",
)
_BY_NAME, _NO_GRADIENT, _FITS, _LONG, _FEW_ROWS, _NOT_ONE_NUMBER, _ROW_BY_ROW = range(len(WHY))


class Group(NamedTuple):
    """Sequences [start, stop) whose gradients are made together: from one tile, or `deferred` over several."""

    start: int
    stop: int
    deferred: bool = False


@dataclass(frozen=True)
class SequencePlan:
    """How the gradients of a loss over sequences are made."""

    choice: Choice
    weight_cols: int = 0  # columns per product: all, unless operands are converted on the way
    groups: tuple[Group, ...] = ()  # in the order they are processed; none under recompute, or row by row


def check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not one of {STRATEGIES}.")


def rows_of_logits(
    v: int, d: int, *, element: int, converts: bool, workspace_bytes: int, beside: int = 0
) -> tuple[int, int]:
    """(rows of logits that a budget holds beside `beside` bytes, columns per product: all, unless operands are converted
    on the way, which takes an eighth of it)."""
    weight_cols, budget = v, workspace_bytes - beside
    if converts:
        weight_cols = min(v, max(MIN_TILE_SIDE, workspace_bytes // 8 // (element * max(d, 1))))
        budget -= weight_cols * element * d
    row_bytes = element * max(v + 2 * d, 1)  # logits; hidden states as they are multiplied; one product
    return max(budget, 0) // row_bytes, max(weight_cols, 1)


def plan_sequences(
    lengths: Sequence[int],
    v: int,
    d: int,
    *,
    coupled: int,
    element: int,
    trained: bool,
    workspace_bytes: int,
    strategy: str = "auto",
    wanted: bool = True,
    can_defer: bool = False,
    anchored: bool = False,
    row_by_row: bool = False,
    converts: bool = False,
    device_type: str = "cpu",
) -> SequencePlan:
    """Choose a strategy, and pack groups of `coupled` consecutive sequences into tiles of whole rows.

    resident: a group's logits are all in one tile, so its upstream gradients are known while the logits are still there.
    deferred: a long pair takes several tiles, and its one unknown scalar is multiplied in at its end. Where the sum of dW
    already holds another long pair's part, or chosen rows also carry a known weight, this takes one more sum [V, D].
    Where there is no sum of dW at all, each row has its unknown scalar, and its logits may be in several tiles too.
    recompute: the logits are computed twice, in tiles of any shape.

    Args:
        lengths: rows of each sequence.
        coupled: how many consecutive ones a term of the loss reads together: 2 for pairs, 0 if it reads a token alone. Then
            there are no groups, and any tile of at most `choice.tile_rows` rows will do.
        element: bytes of the arithmetic.
        wanted: whether any gradient is.
        trained: whether the weight's is.
        strategy: one of STRATEGIES. One asked for by name is obeyed, whatever the budget.
        can_defer: whether the loss sees a group through one number.
        anchored: a known weight on chosen rows beside it.
        row_by_row: whether gradients of log-probs by hidden states are all that is wanted: deferred then has no groups.
        converts: whether operands of a product pass through a buffer, which then takes an eighth of the budget.
    Raises:
        ValueError: an unknown strategy, or "deferred" for a loss that cannot be.
    """
    check_strategy(strategy)
    if strategy == "deferred" and wanted and not (can_defer or row_by_row):
        raise ValueError(
            "strategy='deferred' is for losses that see a pair through its margin alone, and for log-probs under a frozen head; "
            "use 'auto'."
        )
    bounds = [(i, min(i + coupled, len(lengths))) for i in range(0, len(lengths), coupled)] if coupled else []
    sizes = [sum(lengths[i:j]) for i, j in bounds]
    longest = max(sizes, default=0) if coupled else 1
    held = partial(rows_of_logits, v, d, element=element, converts=converts, workspace_bytes=workspace_bytes)
    rows, weight_cols = held()
    num_long = len(sizes) if strategy == "deferred" else sum(size > rows for size in sizes)
    extra = v * d * element if trained and strategy != "resident" and num_long > (0 if anchored else 1) else 0
    rows, _ = held(beside=extra)
    enough = min(MIN_TILE_ROWS[kind_of(device_type)], max(sum(lengths), 1))
    name, why = strategy, _BY_NAME
    if not wanted:
        name, why = "recompute", _NO_GRADIENT
    elif strategy == "resident":
        rows = max(rows, longest)
    elif strategy == "deferred":
        rows = max(rows, min(enough, MIN_TILE_SIDE))
    elif strategy == "auto":
        if row_by_row:
            name, why = "deferred", _ROW_BY_ROW
        elif num_long and not can_defer:
            name, why = "recompute", _NOT_ONE_NUMBER
        elif rows < enough:
            name, why = "recompute", _FEW_ROWS
        elif num_long:
            name, why = "deferred", _LONG
        else:
            name, why = "resident", _FITS
    choice = Choice(STRATEGIES.index(name), why, longest, rows, workspace_bytes, extra)
    if name == "recompute" or (name == "deferred" and row_by_row):
        return SequencePlan(choice)
    defer = [strategy == "deferred" or size > rows for size in sizes]
    groups = [Group(*bound, True) for bound, deferred in zip(bounds, defer, strict=True) if deferred]
    return SequencePlan(choice, weight_cols, (*groups, *_packed(bounds, sizes, defer, rows)))


def _packed(bounds: list[tuple[int, int]], sizes: list[int], skip: list[bool], rows: int) -> Iterator[Group]:
    """The groups that are not skipped, neighbours together in tiles of about equal size, none above `rows`."""
    total = sum(size for size, skipped in zip(sizes, skip, strict=True) if not skipped)
    even = math.ceil(total / math.ceil(total / rows)) if total else rows
    start = stop = filled = 0
    for (first, last), size, skipped in zip(bounds, sizes, skip, strict=True):
        if skipped or first != stop or filled >= even or filled + size > rows:
            if stop > start:
                yield Group(start, stop)
            start, filled = first, 0
        stop = start if skipped else last
        filled += size
    if stop > start:
        yield Group(start, stop)

"""From a byte budget to tile shapes. Integers only; no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

DEFAULT_CPU_WORKSPACE = (
    32 << 20
)  # from 8 to 48 MiB the time is the same; beyond, pages cost more than larger tiles save
MIN_TILE_SIDE = 16  # a narrower tile is a matrix-vector product: the budget is refused instead


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """start .. stop in pieces of at most `size`."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


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

    @property
    def one_col_tile(self) -> bool:
        return self.cols >= self.v


def tile_bytes(rows: int, cols: int, d: int, *, element: int, operand_copies: bool) -> int:
    """Bytes of the buffers that one call reuses from tile to tile: the tile [rows, cols], the sum of dW's columns, one
    product that is added into dW or dH, and, with half-precision operands on a CPU, fp32 copies of hidden and weight rows.
    """
    copies = (rows + cols) * d if operand_copies else 0
    return element * (rows * cols + cols * d + max(rows, cols) * d + copies)


def plan_tiles(n: int, v: int, d: int, *, element: int, operand_copies: bool, workspace_bytes: int) -> TilePlan:
    """The largest balanced tile within the budget.

    Beside its matrix products a tile costs one pass over its dW columns and one over its dH rows, in all
    n * v * (1/rows + 1/cols) times d: least, for a given area, when the tile is square. A side that reaches the whole
    problem gives its room to the other.

    Raises:
        ValueError: the budget cannot hold even a 16 x 16 tile with its operand copies.
    """

    def fits(rows: int, cols: int) -> bool:
        return tile_bytes(rows, cols, d, element=element, operand_copies=operand_copies) <= workspace_bytes

    n, v = max(n, 1), max(v, 1)
    smallest = min(n, MIN_TILE_SIDE), min(v, MIN_TILE_SIDE)
    if not fits(*smallest):
        need = tile_bytes(*smallest, d, element=element, operand_copies=operand_copies)
        raise ValueError(f"workspace_bytes={workspace_bytes} holds no tile; give at least {need} for hidden size {d}.")
    if fits(n, v):
        rows, cols = n, v
    else:
        side = _largest(lambda k: fits(min(k, n), min(k, v)), max(n, v))
        rows, cols = min(side, n), min(side, v)
        if rows == n:
            cols = _largest(lambda k: fits(rows, k), v)
        elif cols == v:
            rows = _largest(lambda k: fits(k, cols), n)
        # equal tiles instead of full ones and a sliver; columns in whole blocks of 64 so that rows stay aligned
        rows = math.ceil(n / math.ceil(n / rows))
        cols = min(cols, 64 * math.ceil(math.ceil(v / math.ceil(v / cols)) / 64))
    return TilePlan(n, v, rows, cols, tile_bytes(rows, cols, d, element=element, operand_copies=operand_copies))


def _largest(fits, upper: int) -> int:
    """The largest k in [1, upper] with fits(k), for a property that only ever turns from true to false."""
    low, high = 1, upper
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low

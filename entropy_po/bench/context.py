"""How long a context fits into a given memory. Arithmetic, not measurement.

Counted is what the loss of one pair adds to hidden states and weight, forward and backward. A peer is counted by the
largest tensors that its code holds at once, so its length is an upper bound.
"""

from __future__ import annotations

from typing import NamedTuple

from entropy_po.plan import MIN_TILE_ROWS, kind_of

GIB = 1 << 30


class Need(NamedTuple):
    """Bytes whatever the length, bytes per token, and what they are."""

    fixed: int
    per_token: int
    what: str


def needs(d: int, v: int, element: int = 2, trained: bool = True, device: str = "cuda") -> dict[str, Need]:
    """What each implementation needs for hidden size `d`, `v` words and inputs of `element` bytes."""
    sums = 4 if element < 4 else 0  # half-precision gradients are summed in fp32 first
    weight = (sums + element) * v * d if trained else 0
    tile = 4 * MIN_TILE_ROWS[kind_of(device)] * (v + 2 * d)  # the smallest that `auto` takes
    dweight = "; dW" if trained else ""
    return {
        "entropy_po, 3 products" if trained else "entropy_po, 2 products": Need(
            weight + tile, element * d, "dH; one tile of logits" + dweight
        ),
        "TRL 1.16 fused head, 4 products" if trained else "TRL 1.16 fused head, 3 products": Need(
            weight + 4096 * 32768 * (element + 4), (sums + element) * d, "dH and its sum; a tile 4096 x 32768" + dweight
        ),
        "Liger-Kernel DPO, 3 products": Need(
            weight,
            (2 * element + 4) * v + element * d,
            "one pair's logits, their gradient, log-softmax in fp32" + dweight,
        ),
        "eager torch": Need(
            element * v * d if trained else 0,
            12 * v + element * d,
            "logits in fp32, log-softmax, and a gradient, or logits as computed and their gradient" + dweight,
        ),
    }


def longest(memory: float, need: Need) -> int:
    """Tokens (both answers together) whose loss fits `memory` bytes; 0 where not even the fixed part does."""
    return max(0, int((memory - need.fixed) // need.per_token))

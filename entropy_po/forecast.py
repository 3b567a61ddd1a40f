"""`entropy-po plan`: memory, bytes on the wire and time of a preference step's head on machines that are not here.

Counts, from the same plan that the operator makes, and rates that are arguments. Nothing is measured and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields

from entropy_po.arguments import whole
from entropy_po.plan import plan_sequences, plan_tiles

GIB, MIB = 1 << 30, 1 << 20
STATE_BYTES = 20  # m, s, t and the label's two terms of one row, in fp32 (entropy_po.types)


@dataclass(frozen=True)
class Rates:
    """What one GPU does, and what it is connected to. Defaults: an H200 in nodes of eight.

    728 TFLOP/s is what TRL's authors report for an H100's lm_head products, which has the same multiprocessors. Links are
    half of what their makers state for both directions together.
    """

    tflops: float = 728.0  # of a large bf16 product with fp32 sums, 1e12/s
    memory: float = 4.8e3  # GB/s
    node: float = 450.0  # GB/s, one way, within a node
    network: float = 50.0  # GB/s, one way, per GPU, between nodes
    latency: float = 30.0  # microseconds of a collective, however short
    node_gpus: int = 8


@dataclass(frozen=True)
class Forecast:
    """One rank of a `linear_preference_loss` over one long pair: forward, with all gradients."""

    vocab: int
    hidden: int
    tokens: int  # rows with a label, of the whole pair
    gpus: int
    vocab_ranks: int
    sequence_ranks: int
    strategy: str
    tile_rows: int
    rows: int  # of this rank
    weight_bytes: int  # the shard, in bf16
    grad_weight_bytes: int  # its gradient in bf16, and the fp32 sum of it
    hidden_bytes: int  # hidden states and their gradient in bf16, and the fp32 sum of that
    workspace_bytes: int
    logits_bytes: int  # of the same rows and the whole vocabulary, in bf16 and fp32, as eager torch holds them
    state_wire_bytes: int  # received
    hidden_wire_bytes: int  # received, of dH's reduction
    sequence_wire_bytes: int
    products_ms: float
    memory_ms: float  # reads and writes of tiles and of dW's sum, which no product hides
    wire_ms: float

    @property
    def data_ranks(self) -> int:
        return self.gpus // (self.vocab_ranks * self.sequence_ranks)

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.grad_weight_bytes + self.hidden_bytes + self.workspace_bytes

    @property
    def total_ms(self) -> float:
        return self.products_ms + self.memory_ms + self.wire_ms


def forecast(
    vocab: int,
    hidden: int,
    tokens: int,
    gpus: int,
    *,
    vocab_ranks: int | None = None,
    sequence_ranks: int | None = None,
    trained: bool = True,
    workspace_bytes: int = 4 * GIB,
    rates: Rates = Rates(),  # frozen
) -> Forecast:
    """The forecast of one pair of `tokens` rows over `vocab_ranks` x `sequence_ranks` of the GPUs; others have other pairs.

    Args:
        vocab_ranks: None for one node's GPUs.
        sequence_ranks: None for as many as leave each at least 8,192 rows.
        trained: whether the head is.
        workspace_bytes: as in the operator.
    Raises:
        ValueError: a number that is not whole or below 1, or groups that do not divide the GPUs.
    """
    numbers = {"vocab": vocab, "hidden": hidden, "tokens": tokens, "gpus": gpus, "workspace_bytes": workspace_bytes}
    numbers |= {
        name: ranks
        for name, ranks in (("vocab_ranks", vocab_ranks), ("sequence_ranks", sequence_ranks))
        if ranks is not None
    }
    for name, number in numbers.items():
        whole(name, number, 1, "it is counted")
    p = min(gpus, rates.node_gpus) if vocab_ranks is None else vocab_ranks
    q = math.gcd(gpus // p, 2 ** int(math.log2(max(tokens // 8192, 1)))) if sequence_ranks is None else sequence_ranks
    if gpus % (p * q):
        raise ValueError(f"{p} vocabulary x {q} sequence ranks must divide the {gpus} GPUs.")
    n, v, d = math.ceil(tokens / q), math.ceil(vocab / p), hidden
    plan = plan_sequences(
        [n - n // 2, n // 2], v, d, coupled=2, element=4, trained=trained, workspace_bytes=workspace_bytes, can_defer=True,
        row_by_row=not trained, device_type="cuda",
    ).choice  # fmt: skip
    tile_rows = min(plan.tile_rows, n)
    if not trained:
        tile_rows = plan_tiles(
            n, v, d, element=4, operand_copies=False, workspace_bytes=workspace_bytes, frozen=True, device_type="cuda"
        ).rows  # fmt: skip
    tiles = math.ceil(n / max(1, tile_rows))
    products = (3 if trained else 2) + (plan.name == "recompute")
    # an all-reduce is received in 2 (P - 1) parts of P; a gather in P - 1 pieces
    states = (p - 1) * STATE_BYTES * n
    hidden_wire = 2 * (p - 1) * 4 * n * d // p
    sums = (q - 1) * 8 * 2 * 5
    sum_traffic = 8 * v * d * tiles if trained else 0  # fp32, read and written once a tile

    def link(ranks: int) -> float:
        return 1e9 * (rates.node if ranks <= rates.node_gpus else rates.network)

    collectives = (tiles + 3 if p > 1 else 0) + (6 if q > 1 else 0)
    wire = (states + hidden_wire) / link(p) + sums / link(p * q) + collectives * rates.latency * 1e-6
    return Forecast(
        vocab, hidden, tokens, gpus, p, q, plan.name, tile_rows, n,
        weight_bytes=2 * v * d,
        grad_weight_bytes=6 * v * d if trained else 0,
        hidden_bytes=(2 + 2 + (4 if p > 1 else 0)) * n * d,
        workspace_bytes=workspace_bytes,
        logits_bytes=6 * n * vocab,
        state_wire_bytes=states,
        hidden_wire_bytes=hidden_wire,
        sequence_wire_bytes=sums,
        products_ms=1e3 * products * 2 * n * v * d / (rates.tflops * 1e12),
        memory_ms=1e3 * (10 * n * v + sum_traffic) / (rates.memory * 1e9),
        wire_ms=1e3 * wire,
    )  # fmt: skip


HEADS = {"Llama-class": (128256, 8192), "Qwen-class": (152064, 8192)}
TOKENS, GPUS = (32768, 131072, 1048576), (8, 64, 1024)


def table(forecasts: list[tuple[str, Forecast]]) -> str:
    """A markdown table."""
    lines = [
        "| head | tokens of a pair | GPUs: vocabulary x sequence x data | rows a GPU | strategy, tile rows | weight + dW | "
        "hidden + dH | workspace | eager logits | wire: states | wire: dH | products | + memory | + wire | ms |",
        "|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, f in forecasts:
        gib = [f.weight_bytes + f.grad_weight_bytes, f.hidden_bytes, f.workspace_bytes, f.logits_bytes]
        cells = [
            name, f"{f.tokens:,}", f"{f.gpus}: {f.vocab_ranks} x {f.sequence_ranks} x {f.data_ranks}", f"{f.rows:,}",
            f"{f.strategy}, {f.tile_rows:,}", *(f"{x / GIB:.2f} GiB" for x in gib), f"{f.state_wire_bytes / MIB:.1f} MiB",
            f"{f.hidden_wire_bytes / MIB:,.0f} MiB", f"{f.products_ms:.1f}", f"{f.memory_ms:.1f}", f"{f.wire_ms:.1f}",
            f"{f.total_ms:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grid(rates: Rates = Rates()) -> list[tuple[str, Forecast]]:  # frozen
    """Both heads at every length and size."""
    return [
        (name, forecast(*head, tokens, gpus, rates=rates))
        for name, head in HEADS.items()
        for tokens in TOKENS
        for gpus in GPUS
    ]


def main(argv: list[str] | None = None) -> int:
    """`entropy-po plan`: the grid, or with --tokens one case."""
    parser = argparse.ArgumentParser(prog="entropy-po plan", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="rows of one pair; without it a table of heads, lengths and sizes")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--vocab_ranks", type=int, help="default: a node's GPUs")
    parser.add_argument("--sequence_ranks", type=int, help="default: as many as leave each 8,192 rows")
    parser.add_argument("--frozen", action="store_true", help="the head is not trained")
    parser.add_argument("--workspace_bytes", type=int, default=4 * GIB)
    parser.add_argument("--json", action="store_true")
    for field in fields(Rates):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help="a rate (Rates)")
    a = parser.parse_args(argv)
    rates = Rates(**{field.name: getattr(a, field.name) for field in fields(Rates)})
    if a.tokens is None:
        cases = grid(rates)
    else:
        split = {"vocab_ranks": a.vocab_ranks, "sequence_ranks": a.sequence_ranks}
        options = {"trained": not a.frozen, "workspace_bytes": a.workspace_bytes, **split}
        cases = [("this head", forecast(a.vocab, a.hidden, a.tokens, a.gpus, rates=rates, **options))]
    print(json.dumps([{"head": name, **asdict(f)} for name, f in cases]) if a.json else table(cases), end="")
    return 0

"""Bytes and FLOPs of every path, and the least time they take: `python -m benchmarks.floors` writes docs/floors.md.

n rows, v words, d hidden size, b bytes per logit or operand (2: bf16). Peak rates are the vendor's; `make gpu-check`
measures beside these what a copy and bare products take on the machine it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entropy_po.forecast import Rates

SHAPES = [(8192, 4096, 151_936), (4096, 4096, 131_072), (16_384, 2048, 248_320), (131_072, 4096, 151_936)]


@dataclass(frozen=True)
class Device:
    name: str
    bandwidth: float  # bytes/s
    flops: float  # dense bf16 FLOP/s that a large product reaches


H200 = Rates()
DEVICES = [
    Device("H100 SXM", 3.35e12, H200.tflops * 1e12),
    Device("H200 SXM", H200.memory * 1e9, H200.tflops * 1e12),
]


def fold_bytes(n: int, v: int, b: int) -> int:
    """Logits once; label, row state, the label's sector; then the state once more, for two outputs."""
    return n * (v * b + 84)


def grad_bytes(n: int, v: int, b_in: int, b_out: int) -> int:
    """Logits once, their gradient once; label, two upstream gradients, three state values."""
    return n * (v * (b_in + b_out) + 28)


def product_flops(n: int, d: int, v: int, products: int) -> int:
    return 2 * n * v * d * products


def hidden_seconds(n: int, d: int, v: int, products: int, folds: int, bandwidth: float, flops: float) -> float:
    """Products on the matrix units, then fold and grad over fp32 tiles (bf16 gradients), one after the other."""
    moved = folds * fold_bytes(n, v, 4) + grad_bytes(n, v, 4, 2)
    return product_flops(n, d, v, products) / flops + moved / bandwidth


PATHS = {
    "`linear_token_stats`, trained head": 4,
    "`linear_token_stats`, frozen head": 3,
    "`linear_token_stats`, frozen head, log-probs alone": 2,
    "`linear_preference_loss`, trained head": 3,
    "`linear_preference_loss`, frozen head": 2,
}


def document() -> str:
    lines = [
        "# Floors: the bytes and FLOPs of every path",
        "",
        "`python -m benchmarks.floors`: counts, not measurements. `make gpu-check` compares what it measures with the same",
        "counts at the rates of the machine it runs on (a copy for bandwidth, bare products for FLOPs). Here: "
        + "; ".join(
            f"{x.name} {x.bandwidth / 1e12:g} TB/s, {x.flops / 1e12:g} TFLOP/s in large products" for x in DEVICES
        )
        + ".",
        "",
        "## Logits path",
        "",
        "One read forward; one read and one write backward. b bytes per logit:",
        "",
        "| | bytes | " + " | ".join(f"{x.name}, S0 in bf16" for x in DEVICES) + " |",
        "|---|---|" + "---:|" * len(DEVICES),
    ]
    n, _, v = SHAPES[0]
    for name, formula, moved in (
        ("forward", "n (v b + 84)", fold_bytes(n, v, 2)),
        ("backward", "n (2 v b + 28)", grad_bytes(n, v, 2, 2)),
    ):
        times = " | ".join(f"{1e3 * moved / device.bandwidth:.2f} ms" for device in DEVICES)
        lines.append(f"| {name} | {formula} = {moved / 1e9:.2f} GB | {times} |")
    lines += [
        "",
        "S0 is 8192 tokens, D 4096, V 151936.",
        "",
        "## Hidden path",
        "",
        "A product is 2 n v d FLOPs. Between products a tile of fp32 logits is read by fold (4 n v bytes) and turned by grad",
        "into bf16 (6 n v); neither overlaps a product. That is what the library adds to bare products, the last column: the",
        "more, the smaller D is. A sum of dW in fp32 is read and written once per row tile (8 v d bytes).",
        "",
        "| path | products | "
        + " | ".join(f"n {n}, d {d}, v {v}: {x.name}" for n, d, v in SHAPES[:3] for x in DEVICES[1:])
        + " | times the bare products |",
        "|---|---:|" + "---:|" * 4,
    ]
    for path, products in PATHS.items():
        cells, factors = [], []
        for n, d, v in SHAPES[:3]:
            device = DEVICES[1]
            # where logits are made twice, they are folded the first time only
            seconds = hidden_seconds(n, d, v, products, 1, device.bandwidth, device.flops)
            cells.append(f"{1e3 * seconds:.1f} ms")
            factors.append(seconds * device.flops / product_flops(n, d, v, products))
        lines.append(f"| {path} | {products} | " + " | ".join(cells) + f" | {min(factors):.2f} to {max(factors):.2f} |")
    lines += [
        "",
        "Memory beside inputs: dH (2 n d bytes in bf16), dW (6 v d while it is summed: fp32 and the bf16 result), the",
        "workspace. No term has n and v.",
        "",
        "Of fp16 operands the products with a gradient are TF32's, at half the rate: with a trained head at least 5/3 of three bare",
        "fp16 products. In fp16 itself a gradient of 1e-8 would be 0.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = document()
    (Path(__file__).parent.parent / "docs" / "floors.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

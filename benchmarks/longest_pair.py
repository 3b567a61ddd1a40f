"""The longest pair whose loss fits a given memory: `python -m benchmarks.longest_pair`. Arithmetic, not measurement.

Counted is what the loss adds to hidden states and weight, forward and backward, in bf16 with a trained head. Every peer is
counted by the largest tensors that its code holds at once, so a peer's length is an upper bound. Writes
docs/longest-pair.md and docs/longest-pair.png. What ours is made of is measured by `python -m benchmarks.preference`.
"""

from __future__ import annotations

from pathlib import Path

from entropy_po.plan import MIN_TILE_ROWS

D, V = 4096, 151936
GIB = 1 << 30
DOCS = Path(__file__).parent.parent / "docs"
WEIGHT = (4 + 2) * V * D  # dW: a sum in fp32, and the gradient in bf16
TILE = 4 * MIN_TILE_ROWS["cuda"] * (V + 2 * D)  # the smallest that `auto` takes on a GPU

# name -> (bytes whatever the length, bytes per token, where they are)
PEERS: dict[str, tuple[int, int, str]] = {
    "entropy_po, 3 products": (WEIGHT + TILE, 2 * D, "dH in bf16; one tile of logits; dW"),
    "TRL 1.16 fused head, 4 products": (
        WEIGHT + 4096 * 32768 * (2 + 4),
        (4 + 2) * D,
        "dH summed in fp32, then bf16; a tile 4096 x 32768; dW",
    ),
    "Liger-Kernel DPO, 3 products": (WEIGHT, (2 + 4) * V + 2 * D, "one pair's logits in bf16 and log-softmax in fp32"),
    "eager torch": (2 * V * D, (2 + 4 + 4 + 2) * V + 2 * D, "logits in bf16 and fp32, log-softmax, gradient"),
}


def longest(memory: float, peer: str) -> int:
    """Tokens of the longest pair (both answers together) whose loss fits; 0 where not even the fixed part does."""
    fixed, per_token, _ = PEERS[peer]
    return max(0, int((memory - fixed) // per_token))


def table(budgets: list[int]) -> str:
    lines = [
        "# The longest pair that fits",
        "",
        f"`python -m benchmarks.longest_pair`: arithmetic for D {D}, V {V}, bf16, a trained head. Memory is what the loss",
        "adds to hidden states and weight, forward and backward; the model behind them needs its own. Tokens are those of",
        "chosen and rejected answer together. A peer is counted by the largest tensors its code holds at once, so its",
        "length is an upper bound.",
        "",
        "| | " + " | ".join(f"{gib} GiB" for gib in budgets) + " | what grows, and what does not |",
        "|---|" + "---:|" * len(budgets) + "---|",
    ]
    for peer, (_, _, why) in PEERS.items():
        lengths = [longest(gib * GIB, peer) for gib in budgets]
        lines.append(f"| {peer} | " + " | ".join(f"{n:,}" if n else "-" for n in lengths) + f" | {why} |")
    lines += [
        "",
        "TRL's fused head holds no logits either: against it the gain is a product in four and, per token, a third of the",
        "bytes. Against losses that hold the pair's logits it is two orders of magnitude in length.",
        "",
        "![Longest pair](longest-pair.png)",
    ]
    return "\n".join(lines) + "\n"


def picture(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    memories = [4 * 1.05**i for i in range(65)]
    colors = ("#0072B2", "#D55E00", "#009E73", "#000000")
    for peer, color in zip(PEERS, colors, strict=True):
        points = [(gib, longest(gib * GIB, peer)) for gib in memories]
        points = [(gib, n) for gib, n in points if n >= 1000]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2)
        axes.annotate(peer, points[-1], xytext=(6, 0), textcoords="offset points", color=color, va="center")
    axes.set(xscale="log", yscale="log", xlabel="memory for the loss, GiB", ylabel="tokens in one pair")
    axes.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    axes.set_title(f"Longest pair whose loss fits (D {D}, V {V}, bf16, trained head)", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    text = table([8, 16, 24, 40, 80])
    (DOCS / "longest-pair.md").write_text(text)
    picture(DOCS / "longest-pair.png")
    print(text)


if __name__ == "__main__":
    main()

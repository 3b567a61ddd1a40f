"""The longest pair whose loss fits a given memory: `python -m benchmarks.longest_pair`. Arithmetic, not measurement.

Writes docs/longest-pair.md and docs/longest-pair.png from the counts of `entropy_po.bench.context`; what ours is made of is
measured by `make bench`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.charts import STYLE
from entropy_po.bench.context import GIB, longest, needs
from entropy_po.bench.implementations import OURS
from entropy_po.plan import MIN_TILE_ROWS

D, V = 4096, 151936
PEERS = needs(D, V)
DOCS = Path(__file__).parent.parent / "docs"


def table(budgets: list[int]) -> str:
    lines = [
        "# The longest pair that fits",
        "",
        f"`python -m benchmarks.longest_pair`: arithmetic for D {D}, V {V}, bf16, a trained head. Memory is what the loss",
        "adds to hidden states and weight, forward and backward; the model behind them needs its own. Ours is counted with a tile",
        f"of {MIN_TILE_ROWS['gpu']:,} rows, which `workspace_bytes` sets; the default takes a quarter of the free memory. Tokens are those of",
        "chosen and rejected answer together. A peer is counted by the largest tensors its code holds at once, so its",
        "length is an upper bound.",
        "",
        "| | " + " | ".join(f"{gib} GiB" for gib in budgets) + " | what grows, and what does not |",
        "|---|" + "---:|" * len(budgets) + "---|",
    ]
    for peer, need in PEERS.items():
        lengths = [longest(gib * GIB, need) for gib in budgets]
        lines.append(f"| {peer} | " + " | ".join(f"{n:,}" if n else "-" for n in lengths) + f" | {need.what} |")
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
    colors = (STYLE[name][0] for name in (OURS, "TRL", "Liger DPO", "eager"))
    for (peer, need), color in zip(PEERS.items(), colors, strict=True):
        points = [(gib, longest(gib * GIB, need)) for gib in memories]
        points = [(gib, n) for gib, n in points if n >= 1000]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2)
        place = "top" if peer == "eager torch" else "center"  # it ends close below another
        axes.annotate(peer, points[-1], xytext=(6, 0), textcoords="offset points", color=color, va=place)
    axes.set(xscale="log", yscale="log", xlabel="memory for the loss, GiB", ylabel="tokens in one pair")
    axes.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    axes.set_title(
        f"Longest pair whose loss fits: arithmetic, not measured\n(hidden size {D:,}, vocabulary {V:,}, bf16, trained head)",
        loc="left", fontsize=11,
    )  # fmt: skip
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

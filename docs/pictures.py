"""The pictures of docs/idea.md, drawn from numbers that this package computes: python docs/pictures.py [folder]

Sizes come from `plan_sequences`, gradients from autograd on whole logits, policies from `EntropyObjective` and `solve_dual`.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle

from entropy_po import EntropyObjective, solve_dual
from entropy_po.plan import plan_sequences

# colours of Okabe and Ito, told apart without colour vision
ORANGE, BLUE, GREEN, PINK, SKY, GREY, PALE = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#777777", "#EEEEEE"
GIB = 1 << 30


def tiles():
    """The product of a long pair, to scale, with the tile that exists and the logits that do not."""
    n, d, v, budget = 65_536, 4_096, 151_936, 2 * GIB
    rows = plan_sequences(
        [n // 2] * 2, v, d, coupled=2, element=4, trained=True, workspace_bytes=budget, can_defer=True
    ).choice.tile_rows
    gap, top = 9_000, 5 * rows
    figure, axis = plt.subplots(figsize=(10, 5.1))
    left = d + gap
    axis.add_patch(Rectangle((0, 0), d, n, facecolor=SKY, edgecolor="none"))
    axis.add_patch(Rectangle((left, n + gap), v, d, facecolor=GREEN, edgecolor="none"))
    axis.add_patch(Rectangle((left, 0), v, n, facecolor="none", edgecolor=GREY, linestyle=(0, (5, 4)), linewidth=1.2))
    axis.add_patch(Rectangle((left, n - top - rows), v, rows, facecolor=ORANGE, edgecolor="none"))
    axis.add_patch(Rectangle((0, n - top - rows), d, rows, facecolor=BLUE, edgecolor="none"))
    axis.add_patch(Rectangle((left, n - top), v, top, facecolor=PALE, edgecolor="none", zorder=0))
    right = left + v
    axis.add_patch(Rectangle((right + gap / 2, 0), 900, n, facecolor=PINK, edgecolor="none"))
    axis.text(-2_500, n / 2, f"hidden states\n[{n:,}, {d:,}]\nbf16, {2 * n * d / GIB:.2g} GiB", ha="right", va="center")
    axis.text(
        left + v / 2,
        n + 1.6 * gap + d / 2,
        f"weight of the head [{v:,}, {d:,}], bf16, {2 * v * d / GIB:.2f} GiB",
        ha="center",
    )
    axis.text(
        left + v / 2,
        n - top / 2,
        "rows that are done: their memory is the next tile's",
        ha="center",
        va="center",
        color=GREY,
    )
    axis.text(
        left + v / 2, (n - top - rows) * 0.86,
        f"the one tile that exists: {rows:,} rows in fp32, a workspace of {budget / GIB:.0f} GiB",
        ha="center", va="center", color=ORANGE, fontweight="bold",
    )  # fmt: skip
    axis.text(
        left + v / 2, n * 0.28,
        f"logits [{n:,}, {v:,}], which nobody holds:\n{2 * n * v / GIB:.1f} GiB in bf16, {4 * n * v / GIB:.1f} GiB in fp32",
        ha="center", va="center", color=GREY,
    )  # fmt: skip
    axis.text(
        right + gap,
        n / 2,
        f"row state\nmax, sums, label\n20 bytes a row,\n{20 * n / 2**20:.2g} MiB",
        va="center",
        color=PINK,
    )
    axis.set(xlim=(-38_000, right + 34_000), ylim=(-1_500, n + 3.2 * gap), aspect="equal")
    axis.axis("off")
    axis.set_title("One pair of 65,536 tokens, to scale", loc="left", fontsize=12)
    return figure


def steps():
    """What becomes of a tile: three products, two passes between them."""
    figure, axis = plt.subplots(figsize=(10, 2.5))
    boxes = (
        ("product 1", "logits = h Wᵀ", ORANGE), ("fold", "one read:\nlog-prob, entropy", PINK),
        ("grad, in place", "1[label] − p", PINK), ("product 2", "dH = grad · W", ORANGE),
        ("product 3", "dW += gradᵀ h", ORANGE),
    )  # fmt: skip
    for i, (name, what, colour) in enumerate(boxes):
        axis.add_patch(Rectangle((2.1 * i, 0), 1.7, 1.1, facecolor="white", edgecolor=colour, linewidth=2))
        axis.text(2.1 * i + 0.85, 0.86, name, ha="center", va="center", color=colour, fontweight="bold")
        axis.text(2.1 * i + 0.85, 0.4, what, ha="center", va="center", fontsize=9)
        if i:
            axis.annotate(
                "", (2.1 * i - 0.03, 0.55), (2.1 * i - 0.37, 0.55), arrowprops={"arrowstyle": "-|>", "color": "black"}
            )
    end = 2.1 * (len(boxes) - 1) + 0.85
    axis.add_patch(
        FancyArrowPatch(
            (end, 1.13), (0.85, 1.13), connectionstyle="arc3,rad=0.13", arrowstyle="-|>", mutation_scale=12, color=GREY
        )
    )
    axis.text(end / 2 + 0.4, 1.78, "next tile of the pair, in the same memory", ha="center", color=GREY)
    axis.text(
        end / 2 + 0.4, -0.42,
        "after the pair's last tile: z, hence c = a · dloss/dz, and dH and dW of the pair are multiplied by it (chosen +c, rejected −c)",
        ha="center", color=BLUE,
    )  # fmt: skip
    axis.set(xlim=(-0.1, 10.2), ylim=(-0.65, 2.0))
    axis.axis("off")
    return figure


def one_number():
    """d loss / d log p of each token of a pair, by autograd through whole logits; and the number they share, by margin."""
    torch.manual_seed(0)
    lengths, d, v = (14, 10), 32, 200
    hidden, weight, labels = torch.randn(sum(lengths), d), torch.randn(v, d) / 8, torch.randint(v, (sum(lengths),))
    logps = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(len(labels)), labels]
    ref = logps.split(lengths)[0].sum() + 2, logps.split(lengths)[1].sum() - 1
    members = {
        "H-DPO, alpha 0.8": (EntropyObjective.hdpo(0.1, 0.8), ORANGE, "o"),
        "DPO": (EntropyObjective.dpo(0.1), "black", "s"),
        "H-DPO, alpha 1.3": (EntropyObjective.hdpo(0.1, 1.3), BLUE, "^"),
    }
    figure, (tokens, slopes) = plt.subplots(
        1, 2, figsize=(10, 3.7), gridspec_kw={"width_ratios": (1.25, 1), "wspace": 0.28}
    )
    margins = torch.linspace(-6, 6, 200)
    for name, (objective, colour, marker) in members.items():
        leaf = logps.detach().requires_grad_()
        chosen, rejected = (part.sum()[None] for part in leaf.split(lengths))
        z = objective.margin(chosen, rejected, ref[0][None], ref[1][None])
        objective.pair_loss(z).sum().backward()
        tokens.plot(leaf.grad, marker, color=colour, markersize=4, label=name)
        slopes.plot(margins, objective.policy_coef * objective.pair_loss_and_slope(margins)[1], color=colour)
        slopes.plot(z.item(), objective.policy_coef * objective.pair_loss_and_slope(z)[1].item(), marker, color=colour)
    tokens.axvline(lengths[0] - 0.5, color=GREY, linewidth=0.8)
    tokens.axhline(0, color=GREY, linewidth=0.8)
    tokens.text(lengths[0] / 2 - 0.5, 0.004, "chosen", ha="center", color=GREY)
    tokens.text(lengths[0] + lengths[1] / 2 - 0.5, -0.004, "rejected", ha="center", va="top", color=GREY)
    tokens.set(xlabel="token of the pair", ylabel="d loss / d log p(token)")
    tokens.set_title("One number for all tokens of a pair", loc="left")
    tokens.legend(frameon=False, loc="lower right", fontsize=8)
    slopes.set(xlabel="margin z, known at the pair's last token", ylabel="c = a · dloss/dz")
    slopes.set_title("... which depends on the margin alone", loc="left")
    return figure


def outcomes():
    """12 answers: their rewards and a reference that prefers some of them."""
    reward = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    ref = torch.log_softmax(
        torch.tensor([3.0, 1.0, -1.0, 2.0, -0.5, 2.5, 1.5, 0.0, 2.0, 1.0, 1.5, 0.5], dtype=torch.float64), 0
    )
    return reward, ref


def family():
    """The plane of the two weights, and the policies that some of its points converge to."""
    reward, ref = outcomes()
    figure = plt.figure(figsize=(10, 5.2))
    plane = figure.add_axes((0.06, 0.1, 0.38, 0.78))
    a = torch.linspace(0, 0.45, 2)
    for alpha, colour in ((0.5, ORANGE), (0.8, ORANGE), (1.0, "black"), (1.25, BLUE), (2.0, BLUE)):
        b = a / alpha
        plane.plot(a, b, color=colour, linewidth=2 if alpha == 1 else 1.1)
        x, y = min(0.45, 0.36 * alpha), min(0.36, 0.45 / alpha)  # where the line leaves the plane
        label, side = "DPO" if alpha == 1 else f"alpha {alpha:g}", x == 0.45
        plane.text(
            x + 0.006 * side, y + 0.006 * (not side), label, color=colour, fontsize=9,
            ha="left" if side else "center", va="center" if side else "bottom",
        )  # fmt: skip
    plane.plot(a, 0 * a, color=GREEN, linewidth=4, solid_capstyle="butt", zorder=3)
    plane.text(0.3, 0.01, "QEMPO: no reference", color=GREEN, ha="center")
    mu = torch.linspace(0, 6, 100)
    for lam in (5.0, 20.0):
        points = [EntropyObjective.qempo_kl(lam, float(m)) for m in mu]
        plane.plot(
            [p.policy_coef for p in points], [p.ref_coef for p in points], color=PINK, linestyle="--", linewidth=1.2
        )
    plane.text(0.285, 0.05, "QEMPO-KL, lam 5,\nmu from 0", color=PINK, fontsize=9)
    plane.text(0.082, 0.015, "lam 20", color=PINK, fontsize=9)
    plane.set(xlim=(0, 0.45), ylim=(-0.004, 0.36), xlabel="a, weight of log π: entropy", ylabel="b, weight of log ref")
    plane.set_title("Every method is a point (a, b)", loc="left", pad=20)
    members = {
        "reference": (None, GREY),
        "H-DPO, alpha 0.5": (EntropyObjective.hdpo(0.3, 0.5), ORANGE),
        "DPO, beta 0.3": (EntropyObjective.dpo(0.3), "black"),
        "H-DPO, alpha 2": (EntropyObjective.hdpo(0.3, 2.0), BLUE),
        "QEMPO, lam 10/3": (EntropyObjective.qempo(10 / 3), GREEN),
    }
    for i, (name, (objective, colour)) in enumerate(members.items()):
        axis = figure.add_axes((0.57, 0.77 - 0.1675 * i, 0.42, 0.11))
        p = (ref if objective is None else objective.optimal_policy(reward, ref)).exp()
        axis.bar(range(len(p)), p, color=colour, width=0.8)
        entropy, mean = -(p * p.log()).sum(), p @ reward
        axis.set_title(
            f"{name}: entropy {entropy:.2f} nats, reward {mean:.2f}", loc="left", fontsize=9, color=colour, pad=2
        )
        axis.set(ylim=(0, 0.8), yticks=[])
        axis.spines["left"].set_visible(False)
        last = i == len(members) - 1
        axis.set_xticks(range(len(p)), [f"{r:g}" for r in reward] if last else [""] * len(p), fontsize=8)
        if last:
            axis.set_xlabel("reward of each of 12 answers")
    figure.text(0.57, 0.93, "... and each point has one optimum: ref^(b/a) · exp(r/a) / Z", fontsize=10)
    return figure


def frontier():
    """Entropy and KL at each mean reward: the most diverse policy, with budgets of KL and without."""
    reward, ref = outcomes()
    figure, (entropies, kls) = plt.subplots(1, 2, figsize=(10, 3.7), gridspec_kw={"wspace": 0.25})
    coefs = torch.logspace(-1.1, 1.0, 60)
    rlhf = []
    for beta in coefs.tolist():
        logp = EntropyObjective.dpo(beta).optimal_policy(reward, ref)
        p = logp.exp()
        rlhf.append((float(p @ reward), float(-(p @ logp)), float(p @ (logp - ref))))
    series = {"RLHF, DPO": (rlhf, "black")}
    for slack, colour in ((1.05, PINK), (1.5, ORANGE)):
        found = [solve_dual(reward, ref, r, kl * slack) for r, _, kl in rlhf]
        series[f"QEMPO-KL, {slack:g} × RLHF's KL"] = ([(s.reward, s.entropy, s.kl) for s in found], colour)
    found = [solve_dual(reward, ref, r) for r, _, _ in rlhf]
    series["QEMPO"] = ([(s.reward, s.entropy, s.kl) for s in found], GREEN)
    for name, (points, colour) in series.items():
        r, entropy, kl = zip(*points, strict=True)
        entropies.plot(r, entropy, color=colour, label=name)
        kls.plot(r, kl, color=colour)
    entropies.set(xlabel="mean reward", ylabel="entropy, nats")
    entropies.set_title("Entropy left at a reward", loc="left")
    entropies.legend(frameon=False, loc="lower left", fontsize=8)
    kls.set(xlabel="mean reward", ylabel="KL to the reference, nats")
    kls.set_title("... and what it costs", loc="left")
    return figure


PICTURES = {"tiles": tiles, "steps": steps, "one-number": one_number, "family": family, "frontier": frontier}


def main(folder: Path) -> None:
    # the same bytes again from the same matplotlib
    plt.rcParams.update(
        {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "entropy_po"}
    )
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")

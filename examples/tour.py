# %% [markdown]
# # entropy_po in two minutes, on a CPU
#
# What the vocabulary costs, what the operators return, and what alpha does to a policy's entropy, each measured here.
#
#     python examples/tour.py [--quick] [--output FOLDER]    # FOLDER gets the pictures, if matplotlib is installed
#
# `tour.ipynb` is this file, run.

# %%
import argparse
import statistics
import time
from pathlib import Path

import torch

from entropy_po import EntropyObjective, linear_preference_loss, linear_token_stats, token_stats
from entropy_po.memory import held_bytes, peak_bytes, reset_peak

try:
    import matplotlib.pyplot as plt
except ModuleNotFoundError:
    plt = None  # the numbers are printed all the same

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="small shapes and few steps: seconds")
parser.add_argument("--output", type=Path, default=Path("runs/tour"))
arguments, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
QUICK, OUTPUT = arguments.quick, arguments.output
OURS, EAGER, THEORY = "#D55E00", "#000000", "#0072B2"
ALPHAS = {0.5: "#0072B2", 1.0: "#000000", 2.0: "#D55E00"}
if plt:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130})
torch.manual_seed(0)
started = time.perf_counter()


# %% [markdown]
# ## 1. The memory wall
#
# DPO needs the log-probabilities of every token of a pair, and the usual way to them goes through logits: tokens x
# vocabulary numbers, several times over with the softmax and the gradients. The hidden states that they come from are
# hundreds of times smaller. `linear_preference_loss` takes those and the lm_head's weight, and works on one tile at a time.


# %%
def eager_loss(hidden, weight, labels, objective, ref_logps):
    logps = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels[:, None]).view(2, -1).sum(-1)
    return objective.pair_loss(objective.margin(*logps, *ref_logps[0]))


def our_loss(hidden, weight, labels, objective, ref_logps):
    offsets = torch.tensor([0, len(labels) // 2, len(labels)])  # chosen, rejected
    return linear_preference_loss(hidden, weight, labels, offsets, objective=objective, ref_logps=ref_logps).loss


def one_pair(tokens, dim, vocab, dtype=torch.float32):
    hidden, weight = torch.randn(tokens, dim, dtype=dtype), torch.randn(vocab, dim, dtype=dtype) / dim**0.5
    labels, ref_logps = torch.randint(vocab, (tokens,)), torch.zeros(1, 2, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, EntropyObjective.hdpo(0.1, 0.9), ref_logps


def peak_mib(loss, pair):
    """Memory of forward and backward beside what was there before; the gradients are allocated first."""
    hidden, weight, labels, *rest = pair
    loss(hidden[:64], weight, labels[:64], *rest).backward()
    reset_peak()
    before = held_bytes()
    loss(hidden, weight, labels, *rest).backward()
    return (peak_bytes() - before) / 2**20


VOCAB = 8192 if QUICK else 49152
TOKENS = [512, 1024] if QUICK else [512, 1024, 2048, 4096]
memory = {"logits alone": [], "eager": [], "entropy_po": []}
print(f"{'tokens':>8} {'logits alone':>14} {'eager':>10} {'entropy_po':>12}   MiB, vocabulary {VOCAB:,}, fp32")
for tokens in TOKENS:
    pair = one_pair(tokens, 64, VOCAB)
    memory["logits alone"].append(tokens * VOCAB * 4 / 2**20)
    memory["eager"].append(peak_mib(eager_loss, pair))
    memory["entropy_po"].append(peak_mib(our_loss, pair))
    print(
        f"{tokens:8,} {memory['logits alone'][-1]:14,.0f} {memory['eager'][-1]:10,.0f} {memory['entropy_po'][-1]:12,.0f}"
    )

# %%
if plt:
    figure, axis = plt.subplots(figsize=(6, 3.6))
    styles = {"logits alone": ("#999999", "--", ""), "eager": (EAGER, "-", "x"), "entropy_po": (OURS, "-", "o")}
    for name, (color, line, marker) in styles.items():
        axis.plot(TOKENS, memory[name], color=color, linestyle=line, marker=marker, label=name)
    axis.set_xscale("log", base=2), axis.set_yscale("log", base=2)
    axis.set_xticks(TOKENS, [f"{t:,}" for t in TOKENS])
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("tokens of the pair")
    axis.set_ylabel("MiB beside inputs and gradients")
    axis.set_title(f"Peak memory of one H-DPO pair, vocabulary {VOCAB:,}", loc="left")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(OUTPUT / "memory.png", bbox_inches="tight")

# %% [markdown]
# ## 2. The operator: log-probability and entropy in one read
#
# Where logits exist already, `token_stats` reads them once and writes their gradient once. Below, its results and those of
# plain torch beside fp64, and the time of both.


# %%
def eager_stats(logits, labels):
    logps = logits.log_softmax(-1)
    return logps.gather(-1, labels[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def our_stats(logits, labels):
    stats = token_stats(logits, labels)
    return stats.logps, stats.entropy


def milliseconds(functions, logits, labels, backward):
    """Median time of each; the functions take turns, so that a busy moment of the machine falls on all."""
    times = {name: [] for name in functions}
    for _ in range(3 if QUICK else 7):
        for name, function in functions.items():
            logits.grad = None
            start = time.perf_counter()
            logps, entropy = function(logits, labels)
            if backward:
                (logps.sum() - 0.01 * entropy.sum()).backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


logits = (3 * torch.randn(64 if QUICK else 512, VOCAB)).requires_grad_()
labels = torch.randint(VOCAB, (len(logits),))
functions = {"eager": eager_stats, "entropy_po": our_stats}
with torch.no_grad():
    exact = torch.stack(eager_stats(logits.double(), labels))
    errors = {name: (torch.stack(f(logits, labels)).double() - exact).abs().amax(-1) for name, f in functions.items()}
forward, both = (milliseconds(functions, logits, labels, backward) for backward in (False, True))
for name in functions:
    print(
        f"{name:11} forward {forward[name]:6.1f} ms, with backward {both[name]:6.1f} ms;"
        f" error {errors[name][0]:.0e} nat in log-probs, {errors[name][1]:.0e} nat in entropy"
    )

# %%
if plt:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    rows = {"forward": forward, "with backward": both}
    for axis, values, unit in (
        (left, rows, "ms"),
        (
            right,
            {k: {n: errors[n][i].item() for n in functions} for i, k in enumerate(("log-probs", "entropy"))},
            "nat",
        ),
    ):
        for i, (name, color) in enumerate({"eager": EAGER, "entropy_po": OURS}.items()):
            bars = axis.barh(
                [j + 0.4 * i for j in range(2)], [v[name] for v in values.values()], 0.36, color=color, label=name
            )
            axis.bar_label(bars, fmt="%.0f" if unit == "ms" else "%.0e", padding=3)
        axis.set_yticks([j + 0.2 for j in range(2)], list(values))
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        axis.margins(x=0.2)
    left.set_title(f"Time, {len(logits)} x {VOCAB:,} logits", loc="left")
    right.set_title("Largest error against fp64", loc="left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(OUTPUT / "operator.png", bbox_inches="tight")

# %% [markdown]
# ## 3. The loss
#
# The same pair through the fused loss in fp32 and through the formula in fp64, values and gradients.

# %%
hidden, weight, labels, objective, ref_logps = one_pair(256, 64, VOCAB)
output = linear_preference_loss(
    hidden, weight, labels, torch.tensor([0, 128, 256]), objective=objective, ref_logps=ref_logps
)
output.loss.backward()
exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
exact_loss = eager_loss(exact_hidden, exact_weight, labels, objective, ref_logps.double())
exact_loss.backward()
print(f"loss {output.loss.item():.6f}, by the formula in fp64 {exact_loss.item():.6f}; strategy {output.strategy}")
print(
    f"margin {output.margins.item():.4f}, entropy per answer {[round(x, 1) for x in output.entropy.flatten().tolist()]}"
)
for name, got, true in (("hidden states", hidden, exact_hidden), ("weight", weight, exact_weight)):
    error = (got.grad - true.grad).norm() / true.grad.norm()
    print(f"gradient of the {name}: relative error {error:.0e}")


# %% [markdown]
# ## 4. What alpha does
#
# H-DPO's optimum is known in closed form: `pi*(y)` is proportional to `ref(y)^(1/alpha) * exp(r(y) / (alpha * beta))`. So it
# can be checked. Answers here are two words out of eight: 64 of them, few enough to sum over. A small autoregressive policy
# is trained on pairs whose winner is drawn by their rewards (Bradley-Terry), once for each alpha, from the same start.


# %%
WORDS, BETA, STEPS, PAIRS = 8, 1.0, 40 if QUICK else 300, 512 if QUICK else 2048
ANSWERS = torch.cartesian_prod(torch.arange(WORDS), torch.arange(WORDS))  # [64, 2]
rewards = torch.randn(len(ANSWERS))


class Policy(torch.nn.Module):
    """The first word from a start state, the second from a state that the first one chooses."""

    def __init__(self, dim=16):
        super().__init__()
        self.states = torch.nn.Parameter(torch.randn(1 + WORDS, dim))
        self.head = torch.nn.Parameter(torch.randn(WORDS, dim) / dim**0.5)

    def hidden(self, answers):  # [n, 2] -> [2 n, dim], the states that predict each word
        return self.states[torch.stack([torch.zeros_like(answers[:, 0]), 1 + answers[:, 0]], -1).flatten()]

    @torch.no_grad()
    def logps(self, answers=ANSWERS):  # [n], summed over the words
        return linear_token_stats(self.hidden(answers), self.head, answers.flatten()).logps.view(-1, 2).sum(-1)


def entropy(logps):
    return -(logps.exp() * logps).sum().item()


def train(alpha):
    """(policy's log-probs [64], entropy after every step); the policy starts as the reference."""
    torch.manual_seed(1)
    policy = Policy()
    ref = policy.logps()
    objective = EntropyObjective.hdpo(beta=BETA, alpha=alpha)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    offsets, curve = 2 * torch.arange(2 * PAIRS + 1), [entropy(ref)]
    for _ in range(STEPS):
        pairs = torch.randint(len(ANSWERS), (PAIRS, 2))
        first_wins = torch.rand(PAIRS) < torch.sigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])
        pairs = torch.where(first_wins[:, None], pairs, pairs.flip(1))  # [PAIRS, (chosen, rejected)]
        answers = ANSWERS[pairs.flatten()]
        loss = linear_preference_loss(
            policy.hidden(answers), policy.head, answers.flatten(), offsets, objective=objective, ref_logps=ref[pairs]
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(entropy(policy.logps()))
    return policy.logps(), ref, objective.optimal_policy(rewards, ref), curve


results = {alpha: train(alpha) for alpha in ALPHAS}
for alpha, (logps, _, optimum, curve) in results.items():
    reward = (logps.exp() * rewards).sum()
    print(
        f"alpha {alpha}: entropy {curve[0]:.3f} -> {curve[-1]:.3f} nat, closed form {entropy(optimum):.3f};"
        f" mean reward {reward:.2f}, closed form {(optimum.exp() * rewards).sum():.2f}"
    )
print(f"{time.perf_counter() - started:.0f} seconds in all")

# %%
if plt:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[3, 2])
    for alpha, color in ALPHAS.items():
        logps, _, optimum, curve = results[alpha]
        left.plot(curve, color=color)
        left.text(1.02 * STEPS, curve[-1], f"alpha {alpha}", color=color, va="center")
        left.hlines(entropy(optimum), 0, STEPS, color=color, linestyle=":", linewidth=1)
        right.scatter(optimum.exp(), logps.exp(), color=color, s=12)
    left.set_xlabel("step")
    left.set_ylabel("entropy of the policy, nats")
    left.set_title("Entropy while training; dotted: the closed form", loc="left")
    limits = [min(r[2].min().exp().item() for r in results.values()) / 2, 1]
    right.plot(limits, limits, color="#999999", linewidth=1, zorder=0)
    right.set_xscale("log"), right.set_yscale("log")
    right.set_xlabel("probability in the closed form")
    right.set_ylabel("learnt probability")
    right.set_title("The 64 answers, after training", loc="left")
    figure.tight_layout()
    figure.savefig(OUTPUT / "alpha.png", bbox_inches="tight")

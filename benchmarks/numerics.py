"""Errors against fp64, of this library, of plain torch and of TRL, where each is put to the test: `python -m benchmarks.numerics`.

Worst errors in nats over the rows of a case, and relative norms of gradients. Every case draws its own logits; the seed is 0.
Writes benchmarks/results/numerics.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import RESULTS
from entropy_po import EntropyObjective, linear_preference_loss, linear_token_stats, sequence_loss, token_stats

ROWS = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Stats = tuple[Tensor, Tensor]  # log-probs and entropies, nats


def ours(logits: Tensor, labels: Tensor) -> Stats:
    return token_stats(logits, labels)[:2]


def torch_fp32(logits: Tensor, labels: Tensor) -> Stats:
    """What people write: the logits raised to fp32, then log_softmax."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def trl(logits: Tensor, labels: Tensor) -> Stats:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, labels)


WHO: dict[str, Callable[[Tensor, Tensor], Stats]] = {"entropy_po": ours, "torch": torch_fp32, "TRL": trl}


def exact(logits: Tensor, labels: Tensor) -> Stats:
    log_p = logits.double().log_softmax(-1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p)
    return log_p.gather(-1, labels[:, None])[:, 0], -terms.sum(-1)


def logits_of(kind: str, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[ROWS, v] logits of a kind, and labels; half of them the likeliest word."""
    x = torch.randn(ROWS, v, dtype=torch.float64)
    top = torch.randint(v, (ROWS,))
    if kind == "nearly uniform":
        x *= 0.02
    elif kind == "uniform":
        x[:] = 1.5
    elif kind == "p -> 1":
        x[torch.arange(ROWS), top] += torch.linspace(8, 60, ROWS, dtype=torch.float64)
    elif kind == "one-hot":
        x[:] = -torch.inf
        x[torch.arange(ROWS), top] = 3.0
    elif kind == "p -> 0":
        x[torch.arange(ROWS), top] -= 80
    elif kind.startswith("offset "):
        x = (x * 64).round() / 64 + float(kind.removeprefix("offset "))
    x = x.to(dtype)
    labels = top if kind == "p -> 0" else torch.where(torch.rand(ROWS) < 0.5, x.double().argmax(-1), top)
    return x, labels


KINDS = (
    "normal",
    "nearly uniform",
    "uniform",
    "p -> 1",
    "one-hot",
    "p -> 0",
    "offset 1e4",
    "offset -1e4",
    "offset 1e30",
)


def worst(values: Stats, truth: Stats) -> list[float]:
    """The largest error of each, nats; inf where a value is NaN that should not be one. Equal infinities are no error."""
    found = []
    for value, target in zip(values, truth, strict=True):
        error = torch.where(value.double() == target, 0.0, (value.double() - target).abs())
        found.append(float(torch.nan_to_num(error, nan=torch.inf).max()))
    return found


def logits_row(kind: str, v: int, dtype: torch.dtype) -> list[str]:
    x, labels = logits_of(kind, v, dtype)
    truth_input = x.double().requires_grad_()
    truth = exact(truth_input, labels)
    upstream = torch.randn(2, ROWS)
    differentiable = bool(torch.isfinite(x).all())
    if differentiable:
        (truth_grad,) = torch.autograd.grad(truth, truth_input, [g.double() for g in upstream])
    cells = [kind, f"{v:,}", str(dtype).removeprefix("torch.")]
    for function in WHO.values():
        mine = x.clone().requires_grad_()
        try:
            values = function(mine, labels)
        except Exception as error:  # a peer may refuse a case; then its own word is the result
            cells += [type(error).__name__, "", ""]
            continue
        cells += [f"{error:.1e}" for error in worst(values, truth)]
        if not differentiable:
            cells.append("")
            continue
        values = [value for value in values if value.requires_grad]
        (grad,) = torch.autograd.grad(
            values, mine, [g.to(value.dtype) for g, value in zip(upstream, values, strict=False)]
        )
        complete = len(values) == 2
        cells.append(f"{relative(grad, truth_grad):.1e}" if complete else "no entropy gradient")
    return cells


def relative(value: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth; 0 where both are 0."""
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def long_sums() -> list[str]:
    """A million rows, and dW as a sum over a thousand tiles, beside one product of the exact gradient of the logits, rounded
    to the operands' dtype, with the hidden states."""
    lines = ["", "## Long sums", "", "Relative norms. Last column: dW by one matrix product from the exact gradient of the logits, "
             "rounded to the dtype. With random labels most of dW cancels, so that it too has an error.", "",
             "| what | dtype | dW | dH | dW of one product |", "|---|---|---:|---:|---:|"]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for n, v, d, budget, what in (
            (1_000_000, 64, 8, None, "linear_token_stats, 1,000,000 rows, V 64, D 8"),
            (16_384, 256, 32, 16 * 256 * 4 + 24576, "linear_token_stats, 16,384 rows in about 1,024 tiles"),
            (16_384, 256, 32, 64 * 256 * 4 + 65536, "linear_preference_loss, one pair of 16,384 rows, many tiles"),
        ):
            hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
            labels = torch.randint(v, (n,))
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            exact_inputs = [x.double().requires_grad_() for x in (hidden, weight)]
            logits = exact_inputs[0] @ exact_inputs[1].t()
            truth = exact(logits, labels)
            if "preference" in what:
                objective, half = EntropyObjective.qempo(lam=100.0), n // 2
                offsets = torch.tensor([0, half, n])
                loss = linear_preference_loss(
                    *inputs, labels, offsets, objective=objective, workspace_bytes=budget, strategy="deferred"
                ).loss
                z = objective.margin(truth[0][:half].sum()[None], truth[0][half:].sum()[None])
                exact_loss = objective.pair_loss(z).mean()
            else:
                stats = linear_token_stats(*inputs, labels, workspace_bytes=budget)
                loss, exact_loss = ((logps - 0.1 * entropy).mean() for logps, entropy in (stats[:2], truth))
            grads = torch.autograd.grad(loss, inputs)
            *exact_grads, dlogits = torch.autograd.grad(exact_loss, [*exact_inputs, logits])
            product = (dlogits / dlogits.abs().max()).to(dtype).t() @ hidden
            errors = [relative(a, b) for a, b in zip(grads, exact_grads, strict=True)]
            errors = [*errors[::-1], relative(product.double() * dlogits.abs().max(), exact_grads[1])]
            lines.append(f"| {what} | {name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    return lines


def long_margins() -> list[str]:
    """log pi(w) - log pi(l) of one long pair: a small difference of two large sums, that decides the loss."""
    v, d, draws = 8_192, 64, 4
    objective = EntropyObjective.qempo(lam=1.0)
    lines = ["", "## Margins of long pairs", "", f"log pi(w) - log pi(l) in nats, of answers of n tokens each; fp32, V {v:,}, D {d}. The "
             f"worst error of {draws} pairs, and the median size of what it is an error of. torch: log_softmax and sums in fp32.", "",
             "| n | log pi(w) | margin | resident | deferred | recompute | sequence_loss | torch |", "|---:|" + "---:|" * 7]  # fmt: skip
    for n in (512, 2_048, 8_192):
        found: list[list[float]] = []
        for _ in range(draws):
            hidden, weight = torch.randn(2 * n, d), torch.randn(v, d) / d**0.5
            labels, offsets = torch.randint(v, (2 * n,)), torch.tensor([0, n, 2 * n])
            parts = list(zip(hidden.split(1024), labels.split(1024), strict=True))
            logps = torch.cat([exact(h.double() @ weight.double().t(), y)[0] for h, y in parts])
            plain = torch.cat([torch_fp32(h @ weight.t(), y)[0] for h, y in parts])
            difference = logps[:n].sum() - logps[n:].sum()
            found.append([logps[:n].sum().item(), difference.item()])
            hidden.requires_grad_(), weight.requires_grad_()
            for strategy in ("resident", "deferred", "recompute"):
                output = linear_preference_loss(
                    hidden, weight, labels, offsets, objective=objective, strategy=strategy, workspace_bytes=64 << 20
                )
                found[-1].append(output.margins.item() - difference.item())
            loss = sequence_loss(
                hidden, weight, labels, offsets, lambda batch: batch.logps[0] - batch.logps[1], coupled=2
            ).loss
            found[-1] += [
                loss.item() - difference.item(),
                (plain[:n].sum() - plain[n:].sum()).item() - difference.item(),
            ]
        sizes = torch.tensor(found).abs()
        cells = [f"{x:,.0f}" for x in sizes[:, :2].median(0).values] + [f"{x:.1e}" for x in sizes[:, 2:].amax(0)]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    cases = [(kind, 32_768, dtype) for kind in KINDS for dtype in DTYPES if dtype != torch.float16 or "e30" not in kind]
    cases += [
        ("normal", v, dtype) for v in (1, 2, 1_000, 151_936, 1_000_000) for dtype in (torch.float32, torch.bfloat16)
    ]
    titles = [f"{who}: {what}" for who in WHO for what in ("log-prob", "entropy", "gradient")]
    lines = [
        "# Errors against fp64",
        "",
        f"`python -m benchmarks.numerics`: {ROWS} rows a case, log-probs and entropies in nats (worst row), the gradient of both "
        "with random upstream gradients as a relative norm. The truth is computed from the logits as they are stored, so the "
        "rounding of the logits themselves is nobody's error; a gradient is stored in the logits' dtype. torch: the logits "
        "raised to fp32, then log_softmax.",
        "",
        "| logits | V | dtype | " + " | ".join(titles) + " |",
        "|---|---:|---|" + "---:|" * len(titles),
    ]  # fmt: skip
    lines += ["| " + " | ".join(logits_row(*case)) + " |" for case in tqdm(cases, desc="cases", leave=False)]
    text = "\n".join(lines + long_sums() + long_margins()) + "\n"
    (RESULTS / "numerics.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

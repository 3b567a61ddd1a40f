"""What this library promises on a CPU, measured: `python -m benchmarks.bars`.

Each row is one bar: what was measured, against what, and whether it holds. Times are medians over interleaved rounds and
are reported as ratios within the run. Errors are against fp64. Memory is the growth of a fresh process's peak.
Writes benchmarks/results/cpu/bars.json and bars.md.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

from benchmarks.harness import (
    bar,
    in_fresh_process,
    peak_extra_bytes,
    ratio,
    spread,
    time_interleaved,
    write_report,
)
from benchmarks.peers import eager_stats, exact_stats, trl_logps_and_entropy
from entropy_po import linear_preference_loss, linear_token_stats, token_stats

MIB = 1 << 20


def logits_path(rounds: int) -> list[dict]:
    """token_stats forward against eager log_softmax-gather-entropy and torch.compile of it."""
    rows = []
    torch._dynamo.reset()
    compiled = torch.compile(eager_stats, dynamic=False)
    for vocab in (32768, 151936):
        for dtype in (torch.float32, torch.bfloat16):
            logits = (torch.randn(512, vocab) * 3).to(dtype)
            labels = torch.randint(vocab, (512,))
            seconds = time_interleaved(
                {
                    "entropy_po": lambda x=logits, y=labels: token_stats(x, y),
                    "eager": lambda x=logits, y=labels: eager_stats(x, y),
                    "compile": lambda x=logits, y=labels: compiled(x, y),
                },
                rounds,
            )
            ours, exact = token_stats(logits, labels), exact_stats(logits, labels)
            error = max((a.double() - b).abs().max().item() for a, b in zip(ours[:2], exact, strict=True))
            case = f"token_stats forward [512, {vocab}] {str(dtype)[6:]}"
            facts = {
                "ms": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
                "spread": spread(seconds["entropy_po"]),
            }
            rows += [
                bar(f"{case}: times faster than eager", ratio(seconds["eager"], seconds["entropy_po"]), 12, True, **facts),
                bar(f"{case}: times faster than torch.compile", ratio(seconds["compile"], seconds["entropy_po"]), 1.8, True, **facts),
                bar(f"{case}: worst error", error, 1e-5, unit=" nat"),
            ]  # fmt: skip
    return rows


def hidden_path(rounds: int) -> list[dict]:
    """linear_token_stats forward + backward, both gradients, against the four bare products and TRL's function."""
    rows = []
    n, d, vocab = 512, 1024, 32768
    for dtype, limit in ((torch.float32, 1.10), (torch.bfloat16, 1.45)):
        hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
        weight = (torch.randn(vocab, d) * 0.02).to(dtype).requires_grad_()
        labels = torch.randint(vocab, (n,))
        g_logps, g_entropy = torch.randn(n), torch.randn(n)
        h, w, tile = hidden.detach(), weight.detach(), torch.randn(n, vocab).to(dtype)

        logits = torch.empty_like(tile)  # scratch; dH and dW are fresh memory, as they are for every candidate

        def four_products(h=h, w=w, tile=tile, logits=logits):
            torch.mm(h, w.t(), out=logits), torch.mm(h, w.t(), out=logits)
            torch.mm(tile, w), torch.mm(tile.t(), h)

        def backward(logps, entropy, hidden=hidden, weight=weight, upstream=(g_logps, g_entropy)):
            return torch.autograd.grad((logps, entropy), (hidden, weight), upstream)

        def ours(hidden=hidden, weight=weight, labels=labels, backward=backward):
            return backward(*linear_token_stats(hidden, weight, labels)[:2])

        def eager(hidden=hidden, weight=weight, labels=labels, backward=backward):
            return backward(*eager_stats(hidden @ weight.t(), labels))

        candidates = {"entropy_po": ours, "four products": four_products, "eager": eager}
        if trl := trl_logps_and_entropy():
            candidates["TRL"] = lambda hidden=hidden, weight=weight, labels=labels, backward=backward, trl=trl: (
                backward(*trl(hidden, weight, labels))
            )
        seconds = time_interleaved(candidates, rounds)
        exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        exact = torch.autograd.grad(
            exact_stats(exact_inputs[0] @ exact_inputs[1].t(), labels),
            exact_inputs,
            (g_logps.double(), g_entropy.double()),
        )
        errors = {
            name: max(((g.double() - e).norm() / e.norm()).item() for g, e in zip(run(), exact, strict=True))
            for name, run in candidates.items()
            if name != "four products"
        }
        case = f"linear_token_stats fwd + bwd, N {n}, D {d}, V {vocab}, {str(dtype)[6:]}"
        facts = {
            "ms": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
            "times_four_products": {k: ratio(v, seconds["four products"]) for k, v in seconds.items()},
            "gradient_error": errors,
            "spread": spread(seconds["entropy_po"]),
        }
        rows += [
            bar(f"{case}: times the four bare products", facts["times_four_products"]["entropy_po"], limit, **facts),
            bar(f"{case}: relative gradient error", errors["entropy_po"], 1e-5 if dtype == torch.float32 else 5e-3),
        ]
    return rows


def memory() -> list[dict]:
    """Peak extra memory of linear_token_stats, forward + backward, beside dH and outputs, as N grows."""
    peaks = {n: in_fresh_process("benchmarks.bars", "--peak", str(n)) for n in (1024, 16384)}
    known = in_fresh_process("benchmarks.bars", "--peak", "0")
    grown = peaks[16384]["beside"] / peaks[1024]["beside"]
    return [
        bar("peak measure of a known 100 MiB allocation", known["extra"] / (100 * MIB), 1.05),
        bar("linear_token_stats peak beside dH and outputs: N 16384 over N 1024", grown, 1.10, peaks=peaks),
    ]


def peak_of(n: int) -> dict:
    if n == 0:
        return {"extra": peak_extra_bytes(lambda: torch.ones(100 * MIB, dtype=torch.uint8))}
    d, vocab = 64, 65536
    warm_hidden, warm_weight = torch.randn(8, d, requires_grad=True), torch.randn(8, d, requires_grad=True)
    linear_token_stats(warm_hidden, warm_weight, torch.zeros(8, dtype=torch.int64)).logps.sum().backward()
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(vocab, d) * 0.02).requires_grad_()
    labels = torch.randint(vocab, (n,))

    def run():
        stats = linear_token_stats(hidden, weight, labels)
        (stats.logps.sum() + stats.entropy.sum()).backward()

    extra = peak_extra_bytes(run)
    # dH and dW are the caller's; per row: 7 fp32 of state and outputs, and their gradients
    gradients = 4 * (hidden.numel() + weight.numel())
    return {"extra": extra, "gradients": gradients, "beside": extra - gradients - n * 4 * 9}


def training_step(rounds: int) -> list[dict]:
    """A full H-DPO step of SmolLM2-135M (8 sequences of 256 tokens, bf16) through the fused head and with eager logits."""
    from entropy_po import EntropyObjective
    from entropy_po.heads import backbone_hidden_states, head_of
    from entropy_po.models import load_model

    model = load_model("smollm2-135m", dtype="bfloat16").train()
    head = head_of(model)
    objective = EntropyObjective.hdpo(beta=0.1, alpha=0.9)
    ids = torch.randint(100, model.config.vocab_size, (8, 256))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :64] = -100  # the prompt
    shifted = labels[:, 1:]
    ref, cu_seqlens = torch.zeros(4, 2), torch.arange(9) * 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(loss: torch.Tensor):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def fused():
        hidden = backbone_hidden_states(model, ids, mask)[0][:, :-1]
        step(
            linear_preference_loss(
                hidden.reshape(-1, hidden.shape[-1]), head.weight, shifted.reshape(-1), cu_seqlens, objective=objective,
                ref_logps=ref, **head.options,
            ).loss
        )  # fmt: skip

    def eager():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        live = shifted != -100
        logps, _ = eager_stats(logits.reshape(-1, logits.shape[-1]), shifted.clamp_min(0).reshape(-1))
        sums = (logps * live.reshape(-1)).view(8, -1).sum(-1)
        step(objective.pair_loss(objective.margin(sums[0::2], sums[1::2], *ref.unbind(1))).mean())

    seconds = time_interleaved({"entropy_po": fused, "eager": eager}, rounds)
    value = ratio(seconds["eager"], seconds["entropy_po"])
    facts = {"ms": {k: 1e3 * statistics.median(v) for k, v in seconds.items()}, "spread": spread(seconds["entropy_po"])}
    name = "SmolLM2-135M H-DPO step, 8 x 256 tokens (192 answer tokens each), bf16: times faster than eager logits"
    return [bar(name, value, 1.4, True, **facts)]


SUITES = {
    "logits": logits_path, "hidden": hidden_path, "memory": lambda rounds: memory(), "step": training_step
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__)
    parser.add_argument("--only", choices=SUITES, nargs="+", default=list(SUITES), help="which suites to run")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # one memory reading, in a process of its own
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.peak is not None:
        print(json.dumps(peak_of(arguments.peak)))
        return
    rows = [row for name in arguments.only for row in SUITES[name](arguments.rounds)]
    command = "python -m benchmarks.bars" + (
        "" if len(arguments.only) == len(SUITES) else f" --only {' '.join(arguments.only)}"
    )
    print(write_report("bars", "CPU bars", command, arguments.rounds, rows))


if __name__ == "__main__":
    main()

"""`linear_preference_loss` against its floor and its peers: `python -m benchmarks.preference`.

The floor is three bare matrix products of the same shapes (two where the head is frozen), in the operands' dtype, with
memory for their results at hand. Ratios are medians over interleaved rounds; long pairs are run less often.
Writes benchmarks/results/cpu/preference.json and preference.md.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from torch import Tensor

from benchmarks.harness import (
    bar,
    in_fresh_process,
    peak_extra_bytes,
    ratio,
    spread,
    time_interleaved,
    write_report,
)
from benchmarks.peers import eager_stats, trl_logps_and_entropy
from entropy_po import EntropyObjective, linear_preference_loss
from entropy_po.plan import MIN_TILE_ROWS

OBJECTIVE = EntropyObjective.hdpo(beta=0.1, alpha=1.1)
MIB = 1 << 20
BUDGET = 256 * MIB  # the CPU's default
FLOOR_BYTES = 4 << 30  # of logits that the bare products may hold at a time


class Case:
    """One pair of 2 x `tokens`, and everything that can be timed on it."""

    def __init__(self, tokens: int, d: int, vocab: int, dtype: torch.dtype, trained: bool):
        self.n, self.trained = 2 * tokens, trained
        self.hidden = torch.randn(self.n, d).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocab, d) * 0.02).to(dtype).requires_grad_(trained)
        self.labels = torch.randint(vocab, (self.n,))
        self.cu_seqlens = torch.tensor([0, tokens, self.n])
        self.ref_logps = torch.full((1, 2), -tokens * 10.0)
        self.name = (
            f"2 x {tokens} tokens, D {d}, V {vocab}, {str(dtype)[6:]}, {'trained' if trained else 'frozen'} head"
        )
        rows = min(self.n, FLOOR_BYTES // (vocab * dtype.itemsize))
        self.logits = torch.empty(rows, vocab, dtype=dtype)
        self.gradient = torch.randn(rows, vocab).to(dtype)
        self.dweight = torch.zeros(vocab, d, dtype=dtype) if trained else None
        self.dhidden = torch.empty(self.n, d, dtype=dtype)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if self.trained else (self.hidden,)

    def ours(self, strategy: str = "auto", workspace_bytes: int = BUDGET) -> str:
        output = linear_preference_loss(
            self.hidden, self.weight, self.labels, self.cu_seqlens, objective=OBJECTIVE, ref_logps=self.ref_logps,
            strategy=strategy, workspace_bytes=workspace_bytes,
        )  # fmt: skip
        torch.autograd.grad(output.loss, self.inputs)
        return output.strategy

    @torch.no_grad()
    def bare_products(self) -> None:
        hidden, weight, rows = self.hidden.detach(), self.weight.detach(), len(self.logits)
        for i in range(0, self.n, rows):
            part = hidden[i : i + rows]
            torch.mm(part, weight.t(), out=self.logits[: len(part)])
            torch.mm(self.gradient[: len(part)], weight, out=self.dhidden[i : i + rows])
            if self.dweight is not None:
                self.dweight.addmm_(self.gradient[: len(part)].t(), part, beta=float(i > 0))

    def by_log_probs(self, log_probs) -> None:
        """The same loss from a function (hidden, weight, labels) -> (log-probs, entropy) [N]."""
        logps, entropy = log_probs(self.hidden, self.weight, self.labels)
        entropy.detach().sum()
        sums = logps.view(2, -1).sum(1)
        margin = OBJECTIVE.margin(sums[:1], sums[1:], self.ref_logps[:, 0], self.ref_logps[:, 1])
        torch.autograd.grad(OBJECTIVE.pair_loss(margin).mean(), self.inputs)


def eager_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return eager_stats(hidden @ weight.t(), labels)


def measure(case: Case, rounds: int, limit: float, peers: bool) -> list[dict]:
    products = "three bare products" if case.trained else "two bare products"
    candidates = {
        "entropy_po": case.ours,
        products: case.bare_products,
        "entropy_po recompute": lambda: case.ours("recompute"),
    }
    if peers:
        torch._dynamo.reset()
        compiled = torch.compile(eager_log_probs, dynamic=False)
        candidates["eager"] = lambda: case.by_log_probs(eager_log_probs)
        candidates["torch.compile"] = lambda: case.by_log_probs(compiled)
        if trl := trl_logps_and_entropy():
            candidates["TRL"] = lambda: case.by_log_probs(trl)
    seconds = time_interleaved(candidates, rounds)
    strategy = case.ours()
    facts = {
        "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "times_products": {name: ratio(values, seconds[products]) for name, values in seconds.items()},
        "strategy": strategy,
        "spread": spread(seconds["entropy_po"]) if rounds > 1 else 0.0,
    }
    rows = [bar(f"{case.name}: times the {products}", facts["times_products"]["entropy_po"], limit, **facts)]
    if case.trained:
        faster = ratio(seconds["entropy_po recompute"], seconds["entropy_po"])
        rows.append(bar(f"{case.name}: times faster than recompute", faster, 1.25, True))
    return rows


def times(rounds: int, long: bool) -> list[dict]:
    shapes = [(512, d, v) for d in (576, 1024) for v in (49152, 151936)]
    shapes += [(2048, 576, 49152), (8192, 576, 49152), (2048, 1024, 151936)]
    if long:
        shapes.append((8192, 1024, 151936))
    rows = []
    for tokens, d, vocab in shapes:
        for dtype, limit in ((torch.float32, 1.08), (torch.bfloat16, 1.35)):
            for trained in (True, False):
                work = tokens * d * vocab / (512 * 576 * 49152)
                many = max(1, min(rounds, round(30 / work)))
                if work > 10 and not trained:
                    continue  # the shorter pairs say it
                peers = trained and tokens == 512 and d == 576
                rows += measure(Case(tokens, d, vocab, dtype, trained), many, limit if trained else 1.10, peers)
    return rows


def tile_rows() -> list[dict]:
    """How many rows of logits a deferred tile needs to beat computing the logits twice: MIN_TILE_ROWS of entropy_po.plan."""
    d, vocab, enough, rows = 576, 49152, MIN_TILE_ROWS["cpu"], []
    for trained in (True, False):
        case = Case(512, d, vocab, torch.float32, trained)
        candidates = {"recompute": lambda case=case: case.ours("recompute")}
        for n in (enough // 2, enough, 2 * enough):
            budget = n * 4 * (vocab + 2 * d)
            candidates[f"{n} rows"] = lambda case=case, budget=budget: case.ours("deferred", budget)
        seconds = time_interleaved(candidates, 5)
        facts = {"ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()}}
        value = ratio(seconds["recompute"], seconds[f"{enough} rows"])
        name = f"{case.name}: deferred in tiles of {enough} rows: times faster than recompute"
        rows.append(bar(name, value, 1.0, True, spread=spread(seconds[f"{enough} rows"]), **facts))
    return rows


def memory() -> list[dict]:
    """Peak extra memory of one pair beside inputs and gradients, as its length grows, in MiB."""
    rows = []
    for n in (1024, 16384, 131072):
        beside = in_fresh_process("benchmarks.preference", "--peak", str(n))["beside"] / MIB
        rows.append(bar(f"peak beside inputs and gradients, {n} tokens in one pair, budget {BUDGET // MIB} MiB", beside,
                        BUDGET / MIB + 32, unit=" MiB"))  # fmt: skip
    return rows


def peak_of(n: int) -> dict:
    d, vocab = 64, 65536
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(vocab, d) * 0.02).requires_grad_()
    labels = torch.randint(vocab, (n,))

    def run(rows: int = n) -> None:
        cu_seqlens = torch.tensor([0, rows // 2, rows])
        linear_preference_loss(
            hidden[:rows],
            weight,
            labels[:rows],
            cu_seqlens,
            objective=EntropyObjective.qempo(10.0),
            workspace_bytes=BUDGET,
        ).loss.backward()

    run(2)  # libraries loaded, threads started
    hidden.grad = weight.grad = None
    extra = peak_extra_bytes(run)
    return {"extra": extra, "beside": extra - hidden.grad.nbytes - weight.grad.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="also 2 x 8192 tokens at D 1024, V 151936: half an hour")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # one memory reading, in a process of its own
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.peak is not None:
        print(json.dumps(peak_of(arguments.peak)))
        return
    rows = memory() + tile_rows() + times(arguments.rounds, arguments.long)
    command = "python -m benchmarks.preference" + (" --long" if arguments.long else "")
    print(write_report("preference", "The preference loss on a CPU", command, arguments.rounds, rows))


if __name__ == "__main__":
    main()

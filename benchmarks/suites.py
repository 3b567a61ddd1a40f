"""What is measured on which device. Every case is one row of parameters; implementations come from entropy_po.bench."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.step import StepCase
from entropy_po.bench.implementations import DEFERRED, OURS, RECOMPUTE, RESIDENT, TORCH, implementations
from entropy_po.bench.problem import Case

FP32, BF16, FP16 = "float32", "bfloat16", "float16"


@dataclass(frozen=True)
class Row:
    """A case, and who takes part: None for all `implementations`, with `also` beside them."""

    case: Case | StepCase
    who: tuple[str, ...] | None = None
    rounds: int | None = None  # where the suite's own number would take too long
    visits: int = 0  # its rounds are spread over the whole run: so many in each process, of VISITS that there are
    split: bool = False  # its rounds follow one another, half of them in each process
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.who or (*implementations(self.case), *self.also)


SLOW = 3  # rounds where a reading takes seconds
# Where a reading takes milliseconds, it depends on where in memory and caches a process lies, for as long as that lives, and on where
# the machine's host happens to run its cores, for seconds or minutes: rounds that follow one another tell the same again.
PROCESSES, VISITS = 2, 4
NO_PEERS = (OURS, RECOMPUTE)
PAIR_PEERS = ("eager", "torch.compile", "TRL", "Liger DPO", "cut-cross-entropy")


def cpu() -> dict[str, list[Row]]:
    # larger than any cache, of which a shared machine's others leave now more and now less
    logits = [
        Row(
            Case("logits", n, v, dtype=dtype, backward=backward),
            also=(TORCH,) if n == 512 and not backward else (),
            visits=VISITS,
        )
        for n, v in ((2048, 32768), (512, 151936)) for dtype in (FP32, BF16) for backward in (False, True)
    ]  # fmt: skip
    logits += [
        Row(Case("logits", 2048, 32768, dtype=dtype, entropy=False, peaked=True), visits=VISITS)
        for dtype in (FP32, BF16)
    ]
    hidden = [Row(Case("hidden", 512, 32768, 1024, dtype), also=(TORCH,), split=True) for dtype in (FP32, BF16)]
    narrow = Case("hidden", 512, 32768, 1024, BF16)
    hidden += [
        Row(case, split=True)
        for case in (
            narrow.but(trained=False),
            *(narrow.but(dtype=dtype, trained=False, entropy=False) for dtype in (FP32, BF16)),
            narrow.but(entropy=False, peaked=True),
            Case("hidden", 1024, 49152, 576, BF16, backward=False),
        )
    ]
    nll = [Row(Case("nll", 1024, 32768, 576, dtype), split=True) for dtype in (FP32, BF16)]
    # each case with the strategy that is not chosen there
    pair = [Row(Case("pair", 1024, 49152, 576, dtype), (*NO_PEERS, DEFERRED, *PAIR_PEERS)) for dtype in (FP32, BF16)]
    pair += [Row(Case("pair", 1024, 49152, 576, dtype, trained=False), (OURS,)) for dtype in (FP32, BF16)]
    pair += [Row(Case("pair", 1024, 151936, 576, FP32), NO_PEERS, SLOW)]
    pair += [Row(Case("pair", 1024, 151936, 576, BF16), (*NO_PEERS, RESIDENT))]
    pair += [Row(Case("pair", 1024, 151936, 576, dtype, trained=False), (OURS,), SLOW) for dtype in (FP32, BF16)]
    step = [Row(StepCase(), (OURS, "eager"), SLOW)]
    scaling = [Row(case, GROWING, visits=VISITS // 2) for case in SCALED]
    return {"logits": logits, "hidden": hidden, "nll": nll, "pair": pair, "step": step, "scaling": scaling}


def long() -> dict[str, list[Row]]:
    """Pairs that take up to minutes a reading on a CPU; peers where what they hold is small beside its memory."""
    return {"pair": [
        _long_row(Case("pair", n, v, d, dtype, trained))
        for n, v, d in ((1024, 49152, 1024), (1024, 151936, 1024), (4096, 49152, 576), (16384, 49152, 576),
                        (16384, 49152, 1024), (16384, 151936, 576), (16384, 151936, 1024))
        for dtype in (FP32, BF16) for trained in (True, False)
    ]}  # fmt: skip


def _long_row(case: Case) -> Row:
    peers = PAIR_PEERS if case.n * case.v < 3e8 else ("TRL",) if case.flops < 3e12 else ()
    narrow = case.dtype == BF16 and case.trained  # whose ratios to recompute are closest to what is promised
    rounds = None if case.flops < 5e11 else SLOW if case.flops < (1e13 if narrow else 3e12) else 1
    return Row(case, (*NO_PEERS, *peers) if case.trained else (OURS,), rounds)


def fresh() -> dict[str, list[Row]]:
    """What the memory of each call weighs most in: plain torch as it comes, on a CPU."""
    suites = cpu()
    return {"logits": [row for row in suites["logits"] if not row.case.backward], "step": suites["step"]}


def cuda(quick: bool) -> dict[str, list[Row]]:
    device = "cuda"
    shapes = [(8192, 151936), (4096, 131072)] + ([] if quick else [(16384, 248320)])
    logits = [
        Row(Case("logits", n, v, dtype=BF16, backward=b, device=device)) for n, v in shapes for b in (False, True)
    ]
    logits += [Row(Case("logits", 8192, 151936, dtype=BF16, peaked=True, device=device))]
    logits += [Row(Case("logits", 4096, 151936, dtype=FP32, device=device))]
    shapes = [(8192, 151936, 4096), (4096, 131072, 4096)] + ([] if quick else [(16384, 248320, 2048)])
    hidden, nll, pair = (
        [Row(Case(path, *shape, BF16, trained, device=device)) for shape in shapes for trained in (True, False)]
        for path in ("hidden", "nll", "pair")
    )
    hidden += [Row(Case("hidden", *shape, BF16, trained=False, entropy=False, device=device)) for shape in shapes]
    pair += [Row(Case("pair", *shapes[0], FP16, device=device), (OURS,))]
    if not quick:
        pair += [Row(Case("pair", n, 151936, 4096, BF16, device=device), (OURS,), 3) for n in (32768, 131072)]
    return {"logits": logits, "hidden": hidden, "nll": nll, "pair": pair}


# one size changed at a time
AXES = {
    "tokens": [Case("pair", n, 32768, 256, BF16) for n in (256, 512, 1024, 2048)],
    "vocabulary": [Case("pair", 512, v, 256, BF16) for v in (8192, 16384, 32768, 65536)],
    "hidden size": [Case("pair", 512, 16384, d, BF16) for d in (128, 256, 512, 1024)],
    "threads": [Case("pair", 512, 32768, 512, BF16, threads=t) for t in (1, 2)],
}


SCALED = list(dict.fromkeys(case for cases in AXES.values() for case in cases))
GROWING = (OURS, "eager", "TRL")


def memory(device: str, long: bool) -> list[tuple[Case, str]]:
    """(case, implementation): the pair's loss and the hidden path as the context grows. What holds logits stops early."""
    if device == "cuda":
        case, lengths, most = Case("pair", 2, 151936, 4096, BF16, device=device), [4096, 16384, 65536], 16384
    else:
        case, lengths, most = Case("pair", 2, 32768, 64), [1024, 8192, 32768], 8192
    peers = ("eager", "Liger DPO", "TRL", "Liger FLSCE")
    longest = [(case.but(n=131072), OURS)] if long else []
    if long and device == "cpu":
        return longest
    rows = [(case.but(n=n), who) for n in lengths for who in (OURS, *peers[0 if n <= most else 2 :])]
    return rows + longest + [(case.but(path="hidden", n=n), OURS) for n in (1024, 16384)]

"""One thing to compute, at one shape: its inputs, its fp64 truth, and the least work it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from entropy_po.objective import EntropyObjective
from entropy_po.plan import slices

# DPO without a reference, so that peers without alpha, or with one reference call of their own, compute the same number.
OBJECTIVE = EntropyObjective.dpo(beta=0.1)
COPY = "copy"  # the floor's name on the logits path
FLOOR_BYTES = 4 << 30  # of logits that the bare products may hold at a time
TRUTH_ROWS = 128  # of logits in fp64 at a time
TRUTH_FLOPS = 3e12  # above it, gradients are checked on SAMPLED rows of the hidden states only
SAMPLED = 64
TRUTH_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    """What is computed, of what, and how much is asked for.

    path: "logits": log-probs (and entropy) of given logits. "hidden": the same from hidden states and the head's weight.
    "nll": their mean negative log-prob. "pair": DPO's loss of one pair of n/2 tokens each.
    """

    path: str
    n: int  # tokens
    v: int  # words
    d: int = 0  # hidden size; 0 on the logits path
    dtype: str = "float32"
    trained: bool = True  # whether the weight's gradient is asked for
    entropy: bool = True  # of the logits and hidden paths
    backward: bool = True
    peaked: bool = False  # p -> 1 in most rows, as of a trained model, instead of a nearly uniform one
    threads: int = 0  # 0: torch's choice
    device: str = "cpu"

    @property
    def name(self) -> str:
        parts = [f"{self.n} x {self.v}" if self.path == "logits" else f"N {self.n}, D {self.d}, V {self.v}", self.dtype]
        if self.path == "pair":
            parts[0] = f"2 x {self.n // 2} tokens, D {self.d}, V {self.v}"
        if self.path != "logits":
            parts.append("trained head" if self.trained else "frozen head")
        if self.path in ("logits", "hidden"):
            parts.append("with entropy" if self.entropy else "without entropy")
            parts.append("forward + backward" if self.backward else "forward")
        if self.peaked:
            parts.append("peaked")
        if self.threads:
            parts.append(f"{self.threads} threads" if self.threads > 1 else "1 thread")
        return ", ".join(parts)

    @property
    def gives_entropy(self) -> bool:
        """Whether entropies are among the outputs; a loss of one number has none."""
        return self.entropy and self.path in ("logits", "hidden")

    @property
    def products(self) -> int:
        """Vocabulary-sized matrix products that a method needs which does not hold the logits.

        Log-probs of single tokens get their upstream gradients after the forward: the logits are made twice, unless only
        the hidden states have a gradient, which is then known but for a factor. A loss that is one number can have its
        gradients made on the way."""
        if self.path == "logits":
            return 0
        again = self.path == "hidden" and (self.trained or self.entropy)
        return 1 + self.backward * (1 + self.trained + again)

    @property
    def copied_bytes(self) -> int:
        """That a copy of the logits moves."""
        return 2 * self.n * self.v * getattr(torch, self.dtype).itemsize

    @property
    def flops(self) -> float:
        return 2.0 * self.n * self.d * self.v * self.products

    def but(self, **changes) -> Case:
        return replace(self, **changes)


class Problem:
    """A case's tensors. `run` gives what an implementation computes, `errors` how far from fp64 that is."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        dtype, device = getattr(torch, case.dtype), torch.device(case.device)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        self.labels = torch.randint(case.v, (case.n,), generator=generator, device=device)
        spread = 6.0 if case.peaked else 0.5  # standard deviation of the logits, in nats
        if case.path == "logits":
            self.tensors: tuple[Tensor, ...] = (normal(case.n, case.v, scale=spread),)
            self.inputs: tuple[Tensor, ...] = self.tensors if case.backward else ()
        else:
            self.tensors = normal(case.n, case.d), normal(case.v, case.d, scale=spread / case.d**0.5)
            self.inputs = self.tensors[: 1 + case.trained] if case.backward else ()
        for x in self.inputs:
            x.requires_grad_()
        self.cu_seqlens = torch.tensor([0, case.n // 2, case.n])
        shape = (2 if case.entropy else 1, case.n)
        self.upstream = torch.randn(shape, generator=generator, device=device).div_(case.n)

    # ---- what is computed

    def implementation(self, name: str) -> Callable[[Problem], tuple[Tensor, ...]]:
        from entropy_po.bench.implementations import implementations, variants

        return (implementations(self.case) | variants(self.case))[name]

    def combine(self, logps: Tensor, entropy: Tensor | None = None) -> tuple[Tensor, ...]:
        """The case's outputs from per-token log-probs and entropies [N]."""
        if self.case.path == "nll":
            return (-logps.mean(),)
        if self.case.path == "pair":
            sums = logps.view(2, -1).sum(1)
            zero = sums.new_zeros(1)
            return (OBJECTIVE.pair_loss(OBJECTIVE.margin(sums[:1], sums[1:], zero, zero)).mean(),)
        return (logps,) if entropy is None or not self.case.entropy else (logps, entropy)

    def run(self, function: Callable[[Problem], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, gradients of the inputs) by one implementation."""
        with torch.set_grad_enabled(self.case.backward):
            outputs = function(self)
        return outputs, self.backward(outputs)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self.inputs, self._upstream(outputs)) if self.case.backward else ()

    def _upstream(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        if outputs[0].ndim == 0:
            return [torch.ones_like(outputs[0])]
        return [g.to(output.dtype) for g, output in zip(self.upstream, outputs, strict=True)]

    # ---- how exact

    @cached_property
    def truth(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """(outputs, gradients) in fp64, some rows of logits at a time. Where the weight's gradient would take too long, or
        that of logits too much memory, the former is None, and only the first SAMPLED rows have the other."""
        case, parts = self.case, list(slices(0, self.case.n, TRUTH_ROWS))
        inputs = [x.detach() for x in self.tensors]
        exact = inputs if case.path == "logits" else [x.double() for x in inputs]

        small = case.n * case.v * 8 <= TRUTH_BYTES
        kept: dict[int, Tensor] = {}  # from the outputs to the gradients, where that is no more than TRUTH_BYTES

        def log_p(rows: slice) -> Tensor:
            if rows.start in kept:
                return kept.pop(rows.start)
            logits = exact[0][rows].double() if case.path == "logits" else exact[0][rows] @ exact[1].t()
            return logits.log_softmax(-1)

        def stats(rows: slice) -> tuple[Tensor, Tensor]:
            x = log_p(rows)
            if case.backward and small:
                kept[rows.start] = x
            return x.gather(1, self.labels[rows, None])[:, 0], -(x.exp() * x).sum(-1)

        logps, entropy = (torch.cat(x).requires_grad_() for x in zip(*(stats(rows) for rows in parts), strict=True))
        outputs = self.combine(logps, entropy)
        if not case.backward:
            return tuple(x.detach() for x in outputs), ()
        g_logps, g_entropy = torch.autograd.grad(
            outputs, (logps, entropy), self._upstream(outputs), allow_unused=True, materialize_grads=True
        )
        whole = small if case.path == "logits" else case.flops < TRUTH_FLOPS
        shapes = [x.shape for x in exact] if whole else [(min(TRUTH_ROWS, case.n), *exact[0].shape[1:])]
        grads = [exact[0].new_zeros(shape, dtype=torch.float64) for shape in shapes]
        for rows in parts if whole else parts[:1]:
            x = log_p(rows)
            gradient = x.exp()  # of logits: g_logp (onehot - p) - g_ent p (log p + H)
            gradient *= -(g_logps[rows, None] + g_entropy[rows, None] * (x + entropy.detach()[rows, None]))
            gradient[torch.arange(len(x)), self.labels[rows]] += g_logps[rows]
            if case.path == "logits":
                grads[0][rows] = gradient
                continue
            grads[0][rows] = gradient @ exact[1]
            if whole and case.trained:
                grads[1].addmm_(gradient.t(), exact[0][rows])
        found = grads if whole else [grads[0][:SAMPLED], None]
        return tuple(x.detach() for x in outputs), tuple(found[: len(self.inputs)])

    def errors(self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> dict[str, float]:
        """`value`: the largest absolute error of an output, in nats. `relative`: that of a loss above 1 over the loss. `gradient`: the
        largest relative norm error of one."""
        exact_outputs, exact_gradients = self.truth
        apart = [(a.double() - b).abs().max() for a, b in zip(outputs, exact_outputs, strict=True)]
        found = {"value": torch.stack(apart).max().item()}  # Python's max passes over a NaN
        if exact_outputs[0].ndim == 0:
            found["relative"] = found["value"] / max(1.0, exact_outputs[0].abs().item())
        pairs = [(a[: len(b)].double(), b) for a, b in zip(gradients, exact_gradients, strict=True) if b is not None]
        if pairs:
            found["gradient"] = torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()
        return found

    # ---- how fast at best

    @cached_property
    def floor(self) -> tuple[str, Callable[[], Any], float]:
        """(name, a run of bare work on this problem's own shapes, the factor from its time to the case's floor).

        A copy of the logits moves each byte twice; the case must read them, and with a gradient read them again and write
        it. Bare products: those that `Case.products` counts, with memory for the logits at hand."""
        return self._copy() if self.case.path == "logits" else self._products()

    def _copy(self):
        source = self.tensors[0].detach()
        target = torch.empty_like(source)
        return COPY, lambda: target.copy_(source), 1.5 if self.case.backward else 0.5

    def _products(self):
        case = self.case
        hidden, weight = (x.detach() for x in self.tensors)
        rows = min(case.n, FLOOR_BYTES // (case.v * hidden.element_size()))
        logits = hidden.new_empty(rows, case.v).fill_(0)  # its pages are there before the first run
        gradient = torch.randn(rows, case.v, dtype=hidden.dtype, device=hidden.device)

        def run() -> None:
            dhidden = torch.empty_like(hidden)
            dweight = torch.empty_like(weight) if case.trained else None
            for part in slices(0, case.n, rows):
                tile = slice(0, part.stop - part.start)
                for _ in range(case.products - case.backward * (1 + case.trained)):  # of the logits
                    torch.mm(hidden[part], weight.t(), out=logits[tile])
                if not case.backward:
                    continue
                torch.mm(gradient[tile], weight, out=dhidden[part])
                if dweight is not None:
                    dweight.addmm_(gradient[tile].t(), hidden[part], beta=float(part.start > 0))

        return f"{case.products} bare products", run, 1.0

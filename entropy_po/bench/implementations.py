"""This library and what else there is, each called as its own documentation says.

Every function takes a `Problem` and returns the outputs of its case, differentiable. What cannot run raises; callers show
that error instead of a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_po.bench.problem import OBJECTIVE, Case, Problem
from entropy_po.ops.linear_preference_loss import linear_preference_loss
from entropy_po.ops.linear_token_stats import linear_token_stats
from entropy_po.ops.sequence_loss import SequenceBatch, sequence_loss
from entropy_po.ops.token_stats import token_stats
from entropy_po.tiles import BackendName, available_backends, chosen_by_tile
from entropy_po.types import TokenStats

Outputs = tuple[Tensor, ...]
Implementation = Callable[[Problem], Outputs]
OURS = "entropy_po"
COMPILED = ("torch.compile", "cut-cross-entropy")  # at a shape's first call
RECOMPUTE, RESIDENT, DEFERRED, TORCH = (f"{OURS} {name}" for name in ("recompute", "resident", "deferred", "torch"))


def implementations(case: Case) -> dict[str, Implementation]:
    """Everything that a user would choose among for a case, by the name it has in tables; ours first."""
    device = torch.device(case.device).type
    backends: Any = [name for name in available_backends()[device] if name != "torch"]
    if not chosen_by_tile(device):
        backends = backends[1:]  # the first is ours
    found: dict[str, Implementation] = {OURS: _ours}
    found |= {f"{OURS} {name}": _with_backend(name) for name in backends}
    if case.path == "pair":
        found[RECOMPUTE] = partial(pair_loss, strategy="recompute")
    if case.path == "nll":
        found |= {f"{OURS} linear_token_stats": lambda problem: problem.combine(*_stats(problem))}
    found |= {"eager": _eager, "torch.compile": _compiled, "TRL": _trl}
    if case.path != "logits":
        found |= {"Liger FLSCE": _liger_scaled}
    if case.path == "nll":
        found |= {
            "F.linear_cross_entropy": _torch_fused,
            "Liger FLCE": _liger_mean,
            "cut-cross-entropy": _cut_cross_entropy,
            "QuACK": _quack,
        }
    elif not case.gives_entropy and case.path != "logits":
        found |= {"cut-cross-entropy": _cut_cross_entropy}
    if case.path == "pair":
        found |= {"Liger DPO": _liger_dpo}
    return found


def variants(case: Case) -> dict[str, Implementation]:
    """What else this library has, to be asked for by name: the backend that is the others' reference, and strategies of a pair's
    loss, one of which it chooses by itself."""
    found: dict[str, Implementation] = {TORCH: _with_backend("torch")}
    if case.path == "pair":
        found |= {RESIDENT: partial(pair_loss, strategy="resident"), DEFERRED: partial(pair_loss, strategy="deferred")}
    return found


# ---- this library


def _ours(problem: Problem, backend: BackendName | None = None) -> Outputs:
    if problem.case.path == "pair":
        return pair_loss(problem, backend=backend)
    if problem.case.path == "nll":
        n, (hidden, weight) = problem.case.n, problem.tensors

        def mean_nll(batch: SequenceBatch) -> Tensor:
            return -batch.token_logps.sum() / n

        every = torch.tensor([0, n])
        return (sequence_loss(hidden, weight, problem.labels, every, mean_nll, coupled=0, backend=backend).loss,)
    return problem.combine(*_stats(problem, backend))


def _with_backend(name: BackendName) -> Implementation:
    return lambda problem: _ours(problem, name)


def _stats(problem: Problem, backend: BackendName | None = None) -> tuple[Tensor, Tensor | None]:
    outputs: Any = ("logps", "entropy") if problem.case.gives_entropy else ("logps",)
    operator: Callable[..., TokenStats] = token_stats if problem.case.path == "logits" else linear_token_stats
    stats = operator(*problem.tensors, problem.labels, outputs=outputs, backend=backend)
    return stats.logps, stats.entropy


def pair_loss(problem: Problem, **options) -> Outputs:
    hidden, weight = problem.tensors
    zeros = torch.zeros(1, 2, device=hidden.device)
    return (
        linear_preference_loss(
            hidden, weight, problem.labels, problem.cu_seqlens, objective=OBJECTIVE, ref_logps=zeros, **options
        ).loss,
    )  # fmt: skip


# ---- plain torch


def eager_stats(logits: Tensor, labels: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """What trainers wrote before there was anything fused."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    logps = log_p.gather(1, labels[:, None])[:, 0]
    return logps, -(log_p.exp() * log_p).sum(-1) if entropy else None


def _eager(problem: Problem, stats: Callable = eager_stats) -> Outputs:
    first, *weight = problem.tensors
    logits = first @ weight[0].t() if weight else first
    return problem.combine(*stats(logits, problem.labels, problem.case.gives_entropy))


def _compiled(problem: Problem) -> Outputs:
    return _eager(problem, _compiled_stats())


@cache
def _compiled_stats() -> Callable:
    """Compiled once per shape; a caller that goes through many must `torch.compiler.reset()` between them."""
    return torch.compile(eager_stats, dynamic=False)


def _torch_fused(problem: Problem) -> Outputs:
    """In chunks as its options' defaults choose; on a CPU, where these are of 16 or 32 rows and slower, of 256."""
    hidden, weight = problem.tensors
    chunks: dict[str, Any] = {} if hidden.is_cuda else {"chunking_method": None, "batch_chunk_size": 256}
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return (F.linear_cross_entropy(hidden, weight, problem.labels, options=options),)


# ---- peers


def _trl(problem: Problem) -> Outputs:
    """The logits helper of its trainers, and its fused head as they call it (32,768 columns a tile)."""
    case = problem.case
    if case.path == "logits":
        if case.entropy:
            from trl.trainer.utils import selective_log_softmax_and_entropy

            return problem.combine(*selective_log_softmax_and_entropy(problem.tensors[0], problem.labels))
        from trl.trainer.utils import selective_log_softmax

        return problem.combine(selective_log_softmax(problem.tensors[0], problem.labels))
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("entropy",) if case.gives_entropy else ()
    hidden, weight = problem.tensors
    logps, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, problem.labels, 1.0, 32768, None, 1.0, outputs
    )
    return problem.combine(logps, entropy)


def _liger_scaled(problem: Problem) -> Outputs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    entropy = problem.case.gives_entropy
    result = LigerFusedLinearScaledCrossEntropyFunction.apply(
        *problem.tensors, problem.labels, 1.0, -100, 1, entropy
    )  # fmt: skip
    nll, entropies = result if entropy else (result, None)
    return problem.combine(-nll, entropies)


def _liger_mean(problem: Problem) -> Outputs:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden, weight = problem.tensors
    return (LigerFusedLinearCrossEntropyLoss()(weight, hidden, problem.labels),)


def _liger_dpo(problem: Problem) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight = problem.tensors
    loss = LigerFusedLinearDPOLoss(beta=OBJECTIVE.policy_coef, use_ref_model=False)
    return (loss(weight, hidden.view(2, -1, hidden.shape[1]), problem.labels.view(2, -1))[0],)


def _cut_cross_entropy(problem: Problem) -> Outputs:
    """Its kernels on a GPU; the compiled torch code that it ships for other devices elsewhere. Per token where the case is no mean, as
    its documentation has it for DPO."""
    from cut_cross_entropy import linear_cross_entropy

    options = {} if problem.labels.device.type == "cuda" else {"impl": "torch_compile"}
    if problem.case.path == "nll":
        return (linear_cross_entropy(*problem.tensors, problem.labels, **options),)
    return problem.combine(-linear_cross_entropy(*problem.tensors, problem.labels, reduction="none", **options))


def _quack(problem: Problem) -> Outputs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return (chunked_linear_cross_entropy(*problem.tensors, problem.labels, reduction="mean"),)

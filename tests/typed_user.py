"""A user's file: the public names as a program would use them. `make lint` checks it with `mypy --strict`, nothing runs it.

Where a line must be refused, `type: ignore` says with which code; mypy reports an ignore that nothing needs.
"""

from typing import assert_type  # mypy knows it for every Python

import torch
from torch import Tensor

from entropy_po import (
    EntropyObjective,
    PreferenceOutput,
    SequenceBatch,
    SequenceLossOutput,
    TokenStats,
    available_backends,
    describe,
    linear_preference_loss,
    linear_token_stats,
    sequence_loss,
    sequence_shard,
    solve_dual,
    token_stats,
)
from entropy_po.trainer import EntropyPOConfig, OnlineConfig, OnlineTrainer, PreferenceTrainer


def supervised(hidden: Tensor, head: torch.nn.Linear, labels: Tensor) -> Tensor:
    stats = linear_token_stats(hidden, head.weight, labels, outputs=("logps", "entropy", "lse"), backend="cpp")
    assert_type(stats, TokenStats)
    token_stats(hidden, labels, outputs=("perplexity",))  # type: ignore[arg-type]
    token_stats(hidden, labels, backend="gpu")  # type: ignore[arg-type]
    return -(stats.logps + 0.01 * stats.entropy).sum()  # an output that was asked for needs no check for None


def preference(hidden: Tensor, head: torch.nn.Linear, labels: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
    part = sequence_shard(cu_seqlens, rank=0, size=2)
    assert_type(part, tuple[Tensor, Tensor])
    objective = EntropyObjective.hdpo(beta=0.1, alpha=0.9)
    output = linear_preference_loss(
        hidden,
        head.weight,
        labels,
        part[1],
        objective=objective,
        ref_logps=ref_logps,
        loss="robust",
        label_smoothing=0.1,
        reduction="sum",
        strategy="deferred",
    )
    assert_type(output, PreferenceOutput)
    assert_type(output.strategy, str)
    objective.pair_loss(output.margins, loss="simpo")  # type: ignore[arg-type]
    linear_preference_loss(hidden, head.weight, labels, cu_seqlens, objective=objective, reduction="none")  # type: ignore[arg-type]
    linear_preference_loss(hidden, head.weight, labels, cu_seqlens)  # type: ignore[call-arg]
    return output.loss


def simpo(batch: SequenceBatch, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    reward = beta * batch.logps / batch.lengths[batch.sequences]
    return -torch.nn.functional.logsigmoid(reward[0::2] - reward[1::2] - gamma).sum()


def own_loss(hidden: Tensor, head: torch.nn.Linear, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    output = sequence_loss(hidden, head.weight, labels, cu_seqlens, simpo, coupled=2, strategy="resident")
    assert_type(output, SequenceLossOutput)
    sequence_loss(hidden, head.weight, labels, cu_seqlens, simpo, strategy="fast")  # type: ignore[arg-type]
    return output.loss


def multipliers(rewards: Tensor) -> EntropyObjective | None:
    assert_type(available_backends(), dict[str, list[str]])
    print(describe())
    return solve_dual(rewards, None, min_reward=0.75).objective


def trained(rows: list[dict[str, str]]) -> None:
    PreferenceTrainer(
        "smollm2-135m", EntropyPOConfig(output_dir="out", method="hdpo", beta=0.1, alpha=0.9), rows
    ).train()
    OnlineTrainer("smollm2-135m", OnlineConfig(output_dir="out", method="qempo", lam=100.0), rows)

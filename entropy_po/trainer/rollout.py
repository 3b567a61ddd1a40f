"""Sampled answers and their loss: what stays constant while the policy takes one or several steps on them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropy_po.objective import EntropyObjective
from entropy_po.ops.sequence_loss import SequenceBatch
from entropy_po.ops.sequences import segment_sums
from entropy_po.policy_gradient import clipped_surrogate, sequence_advantages, token_advantages


@dataclass
class Rollout:
    """S answers in groups of G to a prompt, with n tokens; `first_loss`, and then `loss`, is what `sequence_loss` takes.

    The samples come from the policy as it is at the first step on them, so that step's own forward gives the log-probs
    and entropies that the advantages are made of: no pass of its own is needed to score the samples. Its loss reads whole
    groups (coupled = G). Later steps know their weights in advance, and read a token alone (coupled = 0).
    """

    objective: EntropyObjective
    rewards: Tensor  # [S]
    parts: Tensor  # [S, F] of each reward function, NaN where it abstained
    finished: Tensor  # [S] bool: ended by itself
    group: int
    ref_logps: Tensor | Any = None  # [n], under the reference, nats
    estimator: str = "sequence"
    level: str = "token"  # of the importance ratios
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    last: bool = False  # of the optimiser step's batches
    old_logps: Tensor | Any = field(default=None, init=False)  # [n], or [S] where level is "sequence"
    advantages: Tensor | Any = field(default=None, init=False)  # likewise
    num_clipped: Tensor | Any = field(default=None, init=False)  # of the latest step

    @property
    def is_fresh(self) -> bool:
        """Before the first step on it."""
        return self.old_logps is None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the loss reads; the first step measures the entropy in any case."""
        return ("logps", "entropy") if self.is_fresh or self.estimator != "sequence" else ("logps",)

    @property
    def coupled(self) -> int:
        return self.group if self.is_fresh else int(self.level == "sequence")

    def loss_fn(self, num_tokens: int):
        """The function for this step's `sequence_loss`, which is called with all sequences before the next step."""
        self.num_clipped = self.rewards.new_zeros(())
        if not self.is_fresh:
            return self._surrogate
        size = len(self.rewards) if self.level == "sequence" else num_tokens
        self.old_logps = self.rewards.new_empty(size, dtype=torch.float64)
        self.advantages = torch.empty_like(self.old_logps)
        return self._first_surrogate

    def _first_surrogate(self, batch: SequenceBatch) -> Tensor:
        sequences = self._sequence_advantages if self.estimator == "sequence" else self._token_advantages
        logps, index = self._units(batch)
        self.old_logps[index] = logps.detach().double()
        self.advantages[index] = sequences(batch).double()
        return self._surrogate(batch)

    def _surrogate(self, batch: SequenceBatch) -> Tensor:
        logps, index = self._units(batch)
        old, advantages = (x[index].to(logps.dtype) for x in (self.old_logps, self.advantages))
        gain, clipped = clipped_surrogate(logps, old, advantages, self.epsilon, self.epsilon_high)
        self.num_clipped += clipped.sum()
        loss = -gain.sum()
        if self.estimator != "sequence":
            loss = loss - self.objective.policy_coef * batch.token_entropy.sum()
        return loss

    def _units(self, batch: SequenceBatch) -> tuple[Tensor, slice | Tensor]:
        """What has one importance ratio: log-probs, and where their constants lie."""
        return (batch.logps, batch.sequences) if self.level == "sequence" else (batch.token_logps, batch.rows)

    def _sequence_advantages(self, batch: SequenceBatch) -> Tensor:
        grouped = (-1, self.group)
        rewards, logps = self.rewards[batch.sequences].view(grouped), batch.logps.detach().view(grouped)
        ref_logps = None
        if self.objective.needs_reference:
            ref_logps = segment_sums(self.ref_logps[batch.rows], batch.lengths[batch.sequences]).view(grouped)
        advantages = sequence_advantages(self.objective, rewards.double(), logps, ref_logps).flatten()
        return advantages if self.level == "sequence" else advantages[self._place(batch)]

    def _token_advantages(self, batch: SequenceBatch) -> Tensor:
        place, lengths = self._place(batch), batch.lengths[batch.sequences]
        position = torch.arange(len(place), device=place.device) - (lengths.cumsum(0) - lengths)[place]
        shape = len(lengths), int(lengths.max())

        def padded(values: Tensor) -> Tensor:
            return (
                values.double()
                .new_zeros(shape)
                .index_put((place, position), values.double())
                .view(-1, self.group, shape[1])
            )

        entropy = None if self.estimator == "bonus" else padded(batch.token_entropy.detach())
        ref_logps = padded(self.ref_logps[batch.rows]) if self.objective.needs_reference else None
        rewards = self.rewards[batch.sequences].double().view(-1, self.group)
        advantages = token_advantages(self.objective, rewards, entropy, ref_logps)
        return advantages.flatten(0, 1).expand(shape)[place, position]

    @staticmethod
    def _place(batch: SequenceBatch) -> Tensor:
        """[n], a token's sequence among the batch's."""
        return batch.sequence_ids - batch.sequences.start

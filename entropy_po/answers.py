"""The answers of a padded batch, packed for the operators: one forward of the model, and no logits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_po.heads import Head, backbone_hidden_states, head_of, output_layer, with_head
from entropy_po.ops.linear_token_stats import linear_token_stats
from entropy_po.ops.sequences import segment_sums
from entropy_po.types import TokenStats

IGNORE_INDEX = -100


class Answers(NamedTuple):
    """The n positions of S sequences that have a label, in order."""

    hidden_states: Tensor  # [n, D], differentiable, in the dtype of the head's weight
    labels: Tensor  # [n] int64
    cu_seqlens: Tensor  # [S + 1] int64, on the CPU
    model: nn.Module
    aux_loss: Tensor | None  # router loss of a mixture of experts

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Tensor], **inputs: Any) -> "Answers":
        """Run the model on input_ids [S, L] and attention_mask; labels [S, L] are IGNORE_INDEX but in the answers.

        Position t predicts label t + 1, so the first label of a sequence is never used. `inputs` go to the model too.
        """
        labels = batch["labels"][:, 1:]
        answered = labels != IGNORE_INDEX
        sequence, position = answered.nonzero(as_tuple=True)
        hidden, aux_loss = backbone_hidden_states(model, batch["input_ids"], batch["attention_mask"], **inputs)
        lengths = answered.sum(1).cpu()
        weight = getattr(output_layer(model), "weight", hidden)  # without one, `head_of` will say so
        return cls(
            hidden[sequence, position].to(weight.dtype),
            labels[sequence, position],
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            model,
            aux_loss,
        )

    @property
    def head(self) -> Head:
        """As `head_of` has it now."""
        return head_of(self.model)

    def loss(self, operator: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What an operator on (hidden states, weight, labels, cu_seqlens), such as `linear_preference_loss` or `sequence_loss`,
        makes of these answers, the head's own transform included; `args` and `options` are the operator's."""

        def call(head: Head, hidden_states: Tensor) -> Any:
            return operator(hidden_states, head.weight, self.labels, self.cu_seqlens, *args, **head.options, **options)

        return with_head(self.model, call, self.hidden_states)


def answer_token_logps(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(log-probs [n] in nats, of every token of a batch's answers in order; answers' lengths [S]). `batch` as `Answers.of`
    takes it; `options` of `linear_token_stats`: temperature, workspace_bytes."""
    answers = Answers.of(model, batch)

    def per_token(hidden_states: Tensor, weight: Tensor, labels: Tensor, _: Tensor, **given: Any) -> TokenStats:
        return linear_token_stats(hidden_states, weight, labels, outputs=("logps",), **given)

    logps = answers.loss(per_token, **options).logps
    return logps, answers.cu_seqlens.diff().to(logps.device)


def answer_logps(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Summed log-probs [S], nats, of the answers of a batch; arguments as of `answer_token_logps`."""
    return segment_sums(*answer_token_logps(model, batch, **options))

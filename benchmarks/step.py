"""A whole step of preference training on a small real model, through the fused head and with eager logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from entropy_po import EntropyObjective, linear_preference_loss
from entropy_po.bench.implementations import eager_stats
from entropy_po.heads import backbone_hidden_states, head_of
from entropy_po.models import load_model


@dataclass(frozen=True)
class StepCase:
    sequences: int = 8
    tokens: int = 256
    prompt: int = 64
    threads: int = 0
    device: str = "cpu"

    @property
    def name(self) -> str:
        answer = self.tokens - self.prompt
        return f"SmolLM2-135M, {self.sequences} x {self.tokens} tokens ({answer} of the answer), bfloat16"


class StepProblem:
    """As `entropy_po.bench.problem.Problem`: an implementation is a function of the model's hidden states or logits."""

    def __init__(self, case: StepCase):
        self.case = case
        torch.manual_seed(0)
        self.model = load_model("smollm2-135m", dtype="bfloat16").train().to(case.device)
        self.head = head_of(self.model)
        self.objective = EntropyObjective.hdpo(beta=0.1, alpha=0.9)
        self.ids = torch.randint(100, self.model.config.vocab_size, (case.sequences, case.tokens), device=case.device)
        self.labels = self.ids.clone()
        self.labels[:, : case.prompt] = -100
        self.labels = self.labels[:, 1:]
        self.cu_seqlens = torch.arange(case.sequences + 1) * (case.tokens - 1)
        with torch.no_grad():  # the policy is its own reference, as in a run's first step
            self.ref_logps = self._fused(torch.zeros(case.sequences // 2, 2)).logps.detach()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)  # the model stays as it is

    def implementation(self, name: str) -> Callable[[StepProblem], torch.Tensor]:
        return {"entropy_po": StepProblem.fused_loss, "eager": StepProblem.eager_loss}[name]

    def run(self, loss_of: Callable[[StepProblem], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, gradient of the tied embedding)."""
        loss, gradient = self._gradient(loss_of)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, gradient

    def _gradient(self, loss_of: Callable[[StepProblem], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_of(self)
        loss.backward()
        return loss.detach(), self.head.weight.grad

    def _hidden(self) -> torch.Tensor:
        hidden = backbone_hidden_states(self.model, self.ids, torch.ones_like(self.ids))[0][:, :-1]
        return hidden.reshape(-1, hidden.shape[-1])

    def _fused(self, ref_logps: torch.Tensor):
        return linear_preference_loss(
            self._hidden(), self.head.weight, self.labels.reshape(-1), self.cu_seqlens, objective=self.objective,
            ref_logps=ref_logps.to(self.labels.device), **self.head.options,
        )  # fmt: skip

    def fused_loss(self) -> torch.Tensor:
        return self._fused(self.ref_logps).loss

    def eager_loss(self) -> torch.Tensor:
        logits = self.model(input_ids=self.ids, attention_mask=torch.ones_like(self.ids)).logits[:, :-1]
        live = self.labels != -100
        logps, _ = eager_stats(logits.reshape(-1, logits.shape[-1]), self.labels.clamp_min(0).reshape(-1))
        sums = (logps * live.reshape(-1)).view(self.case.sequences, -1).sum(-1)
        margin = self.objective.margin(sums[0::2], sums[1::2], *self.ref_logps.unbind(1))
        return self.objective.pair_loss(margin).mean()

    @cached_property
    def exact_gradient(self) -> torch.Tensor:
        """By eager logits of the same model in fp32: fp64 would take the weights' own rounding no further."""
        dtype = self.model.dtype
        self.model.float()
        gradient = self._gradient(StepProblem.eager_loss)[1]
        self.model.zero_grad()
        self.model.to(dtype)
        return gradient

    def errors(self, loss: torch.Tensor, gradient: torch.Tensor) -> dict[str, float]:
        exact = self.exact_gradient
        return {"gradient": ((gradient - exact).norm() / exact.norm()).item()}

    @cached_property
    def floor(self) -> tuple[str, Callable[[], None], float]:
        answers = int((self.labels != -100).sum())
        weight = self.head.weight.detach()
        hidden = torch.randn(answers, weight.shape[1], dtype=weight.dtype, device=weight.device)
        logits = torch.empty(answers, weight.shape[0], dtype=weight.dtype, device=weight.device)

        def run() -> None:
            states = self._hidden()
            states.backward(torch.ones_like(states))
            torch.mm(hidden, weight.t(), out=logits), torch.mm(logits, weight), torch.mm(logits.t(), hidden)
            self.optimizer.step()
            self.optimizer.zero_grad()

        return "backbone, bare products, optimiser", run, 1.0

"""The same bits again: for the same call, and in torch's deterministic mode for a row of the hidden path in any company.

`token_stats` needs no mode for the second; tests/test_properties.py shows it.
"""

import random

import pytest
import torch

from entropy_po import EntropyObjective, linear_preference_loss, linear_token_stats, sequence_loss
from entropy_po.testing import make_head

ALL = ("logps", "entropy", "lse", "is_top1", "mean_logit", "log_sum_sq_probs")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def draw(seed):
    return random.Random(seed)


def same_bits(a, b):
    a, b = (x.detach().reshape(-1).contiguous() for x in (a, b))
    assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def shape(draw):
    """[n, v, d] about the edges of blocks and of vectors."""
    return draw.randint(1, 300), draw.choice([3, 50, 257, 777, 4099]), draw.choice([1, 33, 64, 577])


def preference(hidden, weight, labels, lengths, strategy="auto"):
    return linear_preference_loss(
        hidden,
        weight,
        labels,
        torch.tensor([0, *lengths]).cumsum(0),
        objective=EntropyObjective.qempo(100.0),
        strategy=strategy,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ["linear_token_stats", "resident", "deferred", "recompute", "sequence_loss"])
def test_the_same_call_gives_the_same_bits(operator, dtype, draw):
    """Values and all gradients, on the threads that there are; no mode is needed."""
    n, v, d = shape(draw)
    hidden, weight, labels = make_head("trained", 2 * n, v, d, dtype)
    upstream = torch.randn(2, 2 * n)

    def call():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if operator == "linear_token_stats":
            values = linear_token_stats(h, w, labels, outputs=ALL, workspace_bytes=1 << 20)
            (upstream[0] * values.logps + upstream[1] * values.entropy).sum().backward()
        elif operator == "sequence_loss":
            values = sequence_loss(h, w, labels, torch.tensor([0, n, 2 * n]), lambda batch: batch.logps.square().sum())
            values.loss.backward()
            values = values[:2]
        else:
            values = preference(h, w, labels, [n, n], operator)
            values.loss.backward()
            values = [x for x in values if x is not None]
        return *values, h.grad, w.grad

    for a, b in zip(call(), call(), strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_its_bits_in_any_batch(dtype, draw, deterministic):
    """Some of the rows, in another order, alone or among rows without a label."""
    n, v, d = shape(draw)
    hidden, weight, labels = make_head("trained", n, v, d, dtype)
    options = {"outputs": ALL, "workspace_bytes": draw.choice([None, 8 << 20]), "bias": torch.randn(v, dtype=dtype)}
    together = linear_token_stats(hidden, weight, labels, **options)
    for size in (1, draw.randint(1, n), n):
        rows = torch.tensor(draw.sample(range(n), size))
        some = linear_token_stats(hidden[rows], weight, labels[rows], **options)
        for a, b in zip(together, some, strict=True):
            same_bits(a[rows], b)
    kept = torch.rand(n) < 0.5
    ignored = linear_token_stats(hidden, weight, labels.masked_fill(~kept, -100), **options)
    for a, b in zip(together, ignored, strict=True):
        same_bits(a[kept], b[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["resident", "deferred", "recompute"])
def test_a_pair_has_its_bits_in_any_batch(strategy, dtype, draw, deterministic):
    """Under a strategy asked for by name; "auto" chooses by the batch."""
    _, v, d = shape(draw)
    lengths = [draw.randint(0, 70) for _ in range(6)]
    hidden, weight, labels = make_head("trained", sum(lengths), v, d, dtype)
    hidden.requires_grad_()
    together = preference(hidden, weight, labels, lengths, strategy)
    for pair in range(3):
        start, stop = sum(lengths[: 2 * pair]), sum(lengths[: 2 * pair + 2])
        alone = preference(hidden[start:stop], weight, labels[start:stop], lengths[2 * pair : 2 * pair + 2], strategy)
        for name in ("losses", "margins", "logps", "entropy"):
            same_bits(getattr(together, name)[pair : pair + 1], getattr(alone, name))


def test_deterministic_mode_is_as_exact(deterministic, draw):
    n, v, d = shape(draw)
    hidden, weight, labels = make_head("trained", n, v, d)
    hidden.requires_grad_(), weight.requires_grad_()
    stats = linear_token_stats(hidden, weight, labels)
    (stats.logps.sum() - stats.entropy.sum()).backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_p = (h @ w.t()).log_softmax(-1)
    exact = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (exact[0].sum() - exact[1].sum()).backward()
    for ours, truth in (*zip(stats[:2], exact, strict=True), (hidden.grad, h.grad), (weight.grad, w.grad)):
        assert (ours - truth).norm() <= 1e-5 * truth.norm() + 1e-5

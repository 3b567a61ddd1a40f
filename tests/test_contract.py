"""The operators as torch sees them: schemas, fakes, autograd, torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from entropy_po import linear_token_stats, token_stats

N, D, V = 13, 8, 101


def options(rows=False, softcap=None):
    temperature = torch.rand(N) + 0.5 if rows else None
    keep = (torch.rand(N, V) < 0.9) if rows else None
    return temperature, keep, 0.9, 1.1, softcap, -100, ["logps", "entropy"], ""


def inputs(trained=(True, True, True)):
    values = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    labels = torch.randint(V, (N,))
    labels[2] = -100
    return *(x.requires_grad_(t) for x, t in zip(values, trained, strict=True)), labels


@pytest.mark.parametrize("rows, softcap", [(False, None), (True, 3.0)])
def test_opcheck(rows, softcap):
    opts = options(rows, softcap)
    ops = torch.ops.entropy_po
    for trained in ((True, True, True), (True, False, False), (False, False, False)):
        torch.library.opcheck(ops.linear_token_stats, (*inputs(trained), *opts, 1 << 20))
    logits, labels = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    torch.library.opcheck(ops.token_stats, (logits, labels, *opts, False))
    plain = [x.detach() for x in inputs()]
    state = ops.linear_token_stats(*plain, *opts, 1 << 20)[-1]
    torch.library.opcheck(
        ops.linear_token_stats_backward, (torch.randn(N), None, *plain, state, *opts, 1 << 20, [True, True, False])
    )
    state = ops.token_stats(logits.detach(), labels, *opts, False)[-1]
    torch.library.opcheck(
        ops.token_stats_backward, (torch.randn(N), torch.randn(N), logits.detach(), labels, state, *opts)
    )
    torch.library.opcheck(ops.token_stats_backward_, (torch.randn(N), None, logits.detach(), labels, state, *opts))


def hidden_loss(hidden, weight, labels):
    stats = linear_token_stats(hidden, weight, labels, temperature=0.7)
    return (-stats.logps - 0.1 * stats.entropy).sum()


def logits_loss(hidden, weight, labels):
    stats = token_stats(hidden @ weight.t(), labels, softcap=5.0)
    return (-stats.logps - 0.1 * stats.entropy).sum()


def inplace_loss(hidden, weight, labels):
    return -token_stats(hidden @ weight.t(), labels, inplace_backward=True).logps.sum()


@pytest.mark.parametrize("loss", [hidden_loss, logits_loss, inplace_loss])
def test_compiles_whole_and_once_for_every_length(loss):
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (13, 17, 29):
        hidden, weight, _, _ = inputs()
        hidden, labels = torch.randn(n, D, requires_grad=True), torch.randint(V, (n,))
        expected = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        got = torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        counted(hidden, weight, labels)
    assert counter.frame_count == 1


def test_no_grad_and_checkpointing():
    hidden, weight, _, labels = inputs()
    with torch.no_grad():
        assert not linear_token_stats(hidden, weight, labels).logps.requires_grad
    expected = torch.autograd.grad(hidden_loss(hidden, weight, labels), hidden)[0]
    loss = torch.utils.checkpoint.checkpoint(hidden_loss, hidden, weight, labels, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected)

"""The operators as torch sees them: schemas, fakes, autograd, torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from entropy_po import TokenStats, linear_token_stats, token_stats

N, D, V = 13, 8, 101


def options(rows=False, softcap=None):
    temperature = torch.rand(N) + 0.5 if rows else None
    keep = (torch.rand(N, V) < 0.9) if rows else None
    return temperature, keep, 0.9, 1.1, softcap, -100, ["logps", "entropy"], "", ""


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
        torch.library.opcheck(ops.linear_token_stats, (*inputs(trained), *opts, 1 << 20, False))
    # not "test_aot_dispatch_dynamic", which compares outputs after a backward: it scales the gradient that was returned
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for outputs in (["logps"], ["logps", "entropy"]):
        ahead = [*opts[:6], outputs, *opts[7:], 1 << 20, True]
        torch.library.opcheck(ops.linear_token_stats, (*inputs((True, False, False)), *ahead), test_utils=checks)
    logits, labels = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    torch.library.opcheck(ops.token_stats, (logits, labels, *opts, False))
    plain = [x.detach() for x in inputs()]
    state = ops.linear_token_stats(*plain, *opts, 1 << 20, False)[-2]
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


def frozen_head_loss(hidden, weight, labels):
    logps = linear_token_stats(hidden, weight.detach(), labels, outputs=("logps",)).logps
    return 0 * weight.sum() - (logps * torch.arange(len(logps))).sum()


@pytest.mark.parametrize("loss", [hidden_loss, frozen_head_loss, logits_loss, inplace_loss])
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


def masked_loss(hidden, weight, labels, rows, keep):
    stats = linear_token_stats(hidden, weight, labels, temperature=rows, keep_mask=keep, outputs=("logps", "lse"))
    return stats.logps.sum() + stats.lse.detach().sum()


def test_compiles_with_masks_and_a_temperature_per_row():
    torch._dynamo.reset()
    compiled = torch.compile(masked_loss, fullgraph=True, backend="aot_eager")
    hidden, weight, _, labels = inputs()
    keep = torch.rand(N, V) < 0.9
    keep[torch.arange(N), labels.clamp_min(0)] = True
    arguments = hidden, weight, labels, torch.rand(N) + 0.5, keep
    assert torch.equal(compiled(*arguments), masked_loss(*arguments))
    for a, b in zip(
        torch.autograd.grad(compiled(*arguments), (hidden, weight)),
        torch.autograd.grad(masked_loss(*arguments), (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_marked_dynamic_rows_never_recompile():
    """The first length may be any, and neither 0 ignored rows nor all of them are special."""
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(hidden_loss, fullgraph=True, backend=counter)
    _, weight, _, _ = inputs()
    for n in (257, 3, 64):
        hidden, labels = torch.randn(n, D, requires_grad=True), torch.randint(V, (n,))
        labels[: n // 2] = -100 if n == 64 else 0
        torch._dynamo.mark_dynamic(hidden, 0), torch._dynamo.mark_dynamic(labels, 0)
        counted(hidden, weight, labels)
    assert counter.frame_count == 1


@pytest.mark.parametrize("trained", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_every_subset_of_inputs_that_need_a_gradient(trained):
    hidden, weight, bias, labels = inputs()
    values = [x.detach().requires_grad_(bool(t)) for x, t in zip((hidden, weight, bias), trained, strict=True)]
    stats = linear_token_stats(values[0], values[1], labels, bias=values[2])
    assert stats.logps.requires_grad == stats.entropy.requires_grad == any(trained)
    if not any(trained):
        return
    (stats.logps + stats.entropy).sum().backward(retain_graph=True)
    first = [None if x.grad is None else x.grad.clone() for x in values]
    (stats.logps + stats.entropy).sum().backward()  # a second backward through the same graph
    full = linear_token_stats(hidden, weight, labels, bias=bias)
    expected = torch.autograd.grad((full.logps + full.entropy).sum(), (hidden, weight, bias))
    for x, once, truth, wanted in zip(values, first, expected, trained, strict=True):
        assert (once is not None) == bool(wanted)
        if wanted:
            assert torch.equal(once, truth) and torch.equal(x.grad, 2 * once)


def test_outputs_without_a_gradient_say_so():
    hidden, weight, bias, labels = inputs()
    stats = linear_token_stats(hidden, weight, labels, bias=bias, outputs=TokenStats._fields)
    assert [name for name, value in stats._asdict().items() if value.requires_grad] == ["logps", "entropy"]
    with torch.inference_mode():
        assert torch.equal(linear_token_stats(hidden, weight, labels, bias=bias).logps, stats.logps)

"""The operators on a CUDA device, with every backend that serves it, against fp64 on the same inputs."""

import oracles
import pytest
import torch
from test_sequence_losses import OBJECTIVE, exact_leaves, exact_loss, leaves, simpo

from entropy_po import (
    TokenStats,
    available_backends,
    linear_preference_loss,
    linear_token_stats,
    sequence_loss,
    token_stats,
)

pytestmark = pytest.mark.gpu
BACKENDS = [name for name in available_backends()["cuda"] if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, D, V = 203, 64, 50_257
CU = torch.tensor([0, 40, 81, 130, 203])


def problem(dtype):
    hidden = torch.randn(N, D, device="cuda").to(dtype)
    weight = (torch.randn(V, D, device="cuda") * 0.3).to(dtype)
    labels = torch.randint(V, (N,), device="cuda")
    labels[::5] = -100
    return hidden, weight, torch.randn(V, device="cuda").to(dtype), labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_token_stats(backend, dtype, inplace):
    _, _, _, labels = problem(dtype)
    logits = (torch.randn(N, V, device="cuda") * 3).to(dtype)
    x, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    options = {"temperature": torch.rand(N, device="cuda") + 0.5, "softcap": 20.0}
    ours = token_stats(x * 1, labels, outputs=TokenStats._fields, inplace_backward=inplace, backend=backend, **options)
    exact = oracles.stats(truth, labels, **options)
    oracles.assert_stats(ours, [e.detach() for e in exact], 2e-5)
    g = torch.randn(2, N, device="cuda")
    (ours.logps @ g[0] + ours.entropy @ g[1]).backward()
    (exact[0] @ g[0].double() + exact[1] @ g[1].double()).backward()
    oracles.assert_gradient(x.grad, truth.grad, upstream=g.norm(), slack=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_stats_launches_fold_stats_and_grad_alone(backend):
    """Beside them there is what makes upstream gradients and adds the loss up."""
    x, labels = torch.randn(1200, 5003, device="cuda", requires_grad=True), torch.arange(1200, device="cuda")
    g = torch.randn(1200, device="cuda")
    token_stats(x, labels, backend=backend)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stats = token_stats(x, labels, backend=backend)
        torch.autograd.grad((stats.logps, stats.entropy), x, (g, g))
    on_device = torch.autograd.DeviceType.CUDA
    kernels = [event.name for event in profile.events() if event.device_type == on_device]
    if not kernels:
        pytest.skip("the profiler sees no kernels here")
    assert len(kernels) == 3, kernels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [None, 8 << 20])
def test_linear_token_stats(backend, dtype, workspace):
    data = problem(dtype)
    inputs, exact_inputs = leaves(*data[:3]), exact_leaves(*data[:3])
    ours = linear_token_stats(
        inputs[0], inputs[1], data[3], bias=inputs[2], workspace_bytes=workspace, backend=backend, softcap=30.0
    )
    exact = oracles.stats(exact_inputs[0] @ exact_inputs[1].t(), data[3], bias=exact_inputs[2], softcap=30.0)
    oracles.assert_stats(ours, [e.detach() for e in exact], 2e-5)
    g = torch.randn(2, N, device="cuda")
    (ours.logps @ g[0] + ours.entropy @ g[1]).backward()
    (exact[0] @ g[0].double() + exact[1] @ g[1].double()).backward()
    for x, truth in zip(inputs, exact_inputs, strict=True):
        oracles.assert_gradient(x.grad, truth.grad, upstream=g.norm(), slack=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [None, 2 << 20])
def test_frozen_head_with_entropy_as_a_metric(backend, dtype, workspace):
    hidden, weight, bias, labels = problem(dtype)
    bias = bias + torch.linspace(0, 50, V, device="cuda").to(dtype)  # the largest logit rises from tile to tile
    hidden.requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    ours = linear_token_stats(
        hidden, weight, labels, bias=bias, expect_entropy_grad=False, workspace_bytes=workspace, backend=backend
    )
    exact = oracles.stats(exact_hidden @ weight.double().t(), labels, bias=bias.double())
    oracles.assert_stats(ours, [e.detach() for e in exact], 2e-5)
    g = torch.randn(N, device="cuda")
    ours.logps.backward(g)
    exact[0].backward(g.double())
    oracles.assert_gradient(hidden.grad, exact_hidden.grad, upstream=g.norm(), slack=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["resident", "deferred", "recompute"])
@pytest.mark.parametrize("nll_coef", [0.0, 0.3])
def test_linear_preference_loss(backend, dtype, strategy, nll_coef):
    data = problem(dtype)
    inputs, exact_inputs = leaves(*data[:3]), exact_leaves(*data[:3])
    ref = torch.randn(2, 2, device="cuda") - 50
    output = linear_preference_loss(
        inputs[0], inputs[1], data[3], CU, bias=inputs[2], objective=OBJECTIVE, ref_logps=ref, nll_coef=nll_coef,
        strategy=strategy, workspace_bytes=16 << 20, backend=backend,
    )  # fmt: skip
    assert output.strategy == strategy
    exact = exact_loss(exact_inputs, data[3], ref, CU, nll_coef=nll_coef)
    assert output.loss.item() == pytest.approx(exact.item(), rel=1e-4)
    (3 * output.loss).backward()
    (3 * exact).backward()
    for x, truth in zip(inputs, exact_inputs, strict=True):
        oracles.assert_gradient(x.grad, truth.grad, upstream=1.0, slack=2)


@pytest.mark.parametrize("strategy", ["resident", "deferred", "recompute"])
def test_a_factor_is_not_rounded_to_the_dtype_of_a_gradient(strategy):
    """1/3 is 0.4 % less in bf16, in every element alike; rounding the elements themselves has no such bias."""
    hidden, weight, _, labels = problem(torch.bfloat16)
    inputs, exact_inputs = leaves(hidden, weight), exact_leaves(hidden, weight)
    ref = torch.randn(2, 2, device="cuda") - 50
    options = {"objective": OBJECTIVE, "ref_logps": ref, "strategy": strategy, "workspace_bytes": 16 << 20}
    (linear_preference_loss(*inputs, labels, CU, **options).loss / 3).backward()
    (exact_loss([*exact_inputs, None], labels, ref, CU) / 3).backward()
    for x, truth in zip(inputs, exact_inputs, strict=True):
        slope = (x.grad.double() * truth.grad).sum() / (truth.grad**2).sum()
        assert slope.item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_loss(backend):
    data = problem(torch.bfloat16)
    inputs = leaves(*data[:3])
    losses = []
    for strategy in ("resident", "recompute"):
        output = sequence_loss(
            inputs[0], inputs[1], data[3], CU, simpo, coupled=2, bias=inputs[2], strategy=strategy, backend=backend
        )
        losses.append((output.loss, torch.autograd.grad(output.loss, inputs)))
    assert losses[0][0].item() == pytest.approx(losses[1][0].item(), rel=1e-5)
    for a, b in zip(losses[0][1], losses[1][1], strict=True):
        assert oracles.relative_error(a, b) <= 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_logits_path_waits_for_nothing_and_can_be_captured(backend):
    logits = torch.randn(64, V, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(V, (64,), device="cuda")
    expected = token_stats(logits, labels, backend=backend)  # compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_stats(logits, labels, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_stats(logits, labels, backend=backend)
    graph.replay()
    assert torch.equal(captured.logps, expected.logps) and torch.equal(captured.entropy, expected.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [True, False])
def test_the_hidden_path_can_be_captured_and_replayed_with_other_labels(backend, trained):
    hidden, weight, _, labels = problem(torch.bfloat16)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(trained))

    def run():
        logps = linear_token_stats(*inputs, labels, outputs=("logps",), backend=backend).logps
        return logps.detach(), *torch.autograd.grad(logps.sum(), inputs[: 1 + trained])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ignored = labels == -100
        labels[ignored] = 0
        run()  # every row, as in a capture: compiled, loaded, and cuBLAS has its workspace
        labels[ignored] = -100
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    labels.copy_(torch.randint(V, (N,)))
    labels[1::4] = -100
    graph.replay()
    for ours, eager in zip(captured, run(), strict=True):
        parts = 4e-3 * eager.abs().max().item() if ours.dtype == torch.bfloat16 else 0  # of a sum that cuBLAS may split
        torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-4 + parts)
    assert not captured[0][1::4].any() and not captured[1][1::4].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(backend):
    logits, labels = torch.randn(300, V, dtype=torch.bfloat16), torch.randint(V, (300,))
    expected = token_stats(logits.cuda(0), labels.cuda(0), backend=backend)
    ours = token_stats(logits.to("cuda:1"), labels.to("cuda:1"), backend=backend)
    assert torch.cuda.current_device() == 0
    assert torch.equal(ours.logps.cpu(), expected.logps.cpu())
    assert torch.equal(token_stats(logits.cuda(0), labels.cuda(0), backend=backend).logps, expected.logps)


def test_a_bad_label_is_nan_and_reads_nothing():
    logits = torch.randn(4, V, device="cuda")
    labels = torch.tensor([0, V, -1, 2**40], device="cuda")
    logps = token_stats(logits, labels).logps
    assert logps[0].isfinite() and logps[1:].isnan().all()


@pytest.mark.parametrize("trained", [True, False])
def test_peak_memory_keeps_the_budget(trained):
    n, d, v, budget = 16_384, 256, 65_536, 128 << 20
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=trained)
    labels, cu = torch.randint(v, (n,), device="cuda"), torch.tensor([0, n // 2, n])
    ref = torch.zeros(1, 2, device="cuda")

    def run():
        linear_preference_loss(
            hidden, weight, labels, cu, objective=OBJECTIVE, ref_logps=ref, workspace_bytes=budget
        ).loss.backward()

    run()
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    beside = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes * trained
    assert beside <= budget + 4 * v * d * trained + (32 << 20)  # the fp32 sum of dW

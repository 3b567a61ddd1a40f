"""linear_token_stats: values and gradients against fp64, tilings, memory, and errors."""

import itertools

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_po import TokenStats, linear_token_stats
from entropy_po.ops import checks, gemm, lm_head
from entropy_po.plan import plan_tiles, tile_bytes
from entropy_po.testing import allocations

ALL = TokenStats._fields
SMALL = 60_000  # bytes: dozens of tiles on the shapes below


def problem(n, d, v, dtype, scale=1.0):
    hidden = torch.randn(n, d).to(dtype)
    weight = (scale * torch.randn(v, d) / d**0.5).to(dtype)
    bias = torch.randn(v).to(dtype)
    labels = torch.randint(v, (n,))
    # half of the rows confident: their label's weight is their own direction
    for i in range(0, n, 2):
        weight[labels[i]] = hidden[i] * (12 / d)
    return hidden, weight, bias, labels


OPTIONS = {
    "plain": {},
    "scale, softcap, temperature": {"logit_scale": 0.8, "softcap": 6.0, "temperature": 0.9},
    "row temperature and kept set": "rows",
}


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("workspace", [None, SMALL])
@pytest.mark.parametrize("case", OPTIONS)
def test_agrees_with_fp64(backend, dtype, workspace, case, poisoned):
    n, d, v = 37, 24, 1003
    hidden, weight, bias, labels = problem(n, d, v, dtype)
    labels[::5] = -100
    options = OPTIONS[case]
    if options == "rows":
        keep = torch.rand(n, v) < 0.7
        keep[torch.arange(n), labels.clamp_min(0)] = True
        options = {"temperature": torch.rand(n) + 0.5, "keep_mask": keep}
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    exact_inputs = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    ours = linear_token_stats(
        inputs[0], inputs[1], labels, bias=inputs[2], outputs=ALL, workspace_bytes=workspace, backend=backend, **options
    )
    exact = oracles.stats(exact_inputs[0] @ exact_inputs[1].t(), labels, bias=exact_inputs[2], **options)
    oracles.assert_stats(ours, [e.detach() for e in exact], 1e-10 if dtype == torch.float64 else 1e-5)
    g = torch.randn(2, n)
    (ours.logps @ g[0].to(ours.logps) + ours.entropy @ g[1].to(ours.logps)).backward()
    (exact[0] @ g[0].double() + exact[1] @ g[1].double()).backward()
    for x, truth in zip(inputs, exact_inputs, strict=True):
        oracles.assert_gradient(x.grad, truth.grad, upstream=1e-3)


def test_many_ignored_rows_among_many():
    """dH is made for the kept rows first and then spread over all: hundreds of them move over one another's places."""
    hidden, weight, _, labels = problem(700, 8, 40, torch.float32)
    labels[torch.rand(700) < 0.5] = -100
    inputs, exact_inputs = (
        [x.to(dtype).clone().requires_grad_() for x in (hidden, weight)] for dtype in (torch.float32, torch.float64)
    )
    exact = oracles.stats(exact_inputs[0] @ exact_inputs[1].t(), labels)
    (linear_token_stats(*inputs, labels).logps.sum() + exact[0].sum()).backward()
    for x, truth in zip(inputs, exact_inputs, strict=True):
        oracles.assert_gradient(x.grad, truth.grad, upstream=1.0)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_gradcheck(backend):
    hidden, weight, bias, labels = problem(5, 4, 13, torch.float64)
    labels[2] = -100
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_token_stats(h, w, labels, bias=b, softcap=4.0, backend=backend)[:2], inputs
    )


@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_only_where_needed(trained):
    hidden, weight, bias, labels = problem(9, 8, 70, torch.float32)
    inputs = [x.clone().requires_grad_(t) for x, t in zip((hidden, weight, bias), trained, strict=True)]
    exact_inputs = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    linear_token_stats(inputs[0], inputs[1], labels, bias=inputs[2]).logps.sum().backward()
    oracles.stats(exact_inputs[0] @ exact_inputs[1].t(), labels, bias=exact_inputs[2])[0].sum().backward()
    for x, truth, wanted in zip(inputs, exact_inputs, trained, strict=True):
        if wanted:
            oracles.assert_gradient(x.grad, truth.grad, upstream=1e-3)
        else:
            assert x.grad is None


def test_frozen_weight_allocates_nothing_of_its_size():
    # the hidden states are tiny and the budget too: only dW could be this large
    hidden, weight, _, labels = problem(6, 64, 5000, torch.float32)
    hidden.requires_grad_()

    def call():
        linear_token_stats(hidden, weight, labels, workspace_bytes=200_000).logps.sum().backward()

    assert allocations(call)[1] <= 200_000
    weight.requires_grad_()
    assert allocations(call)[1] >= weight.nbytes  # the check sees a dW when there is one


@pytest.fixture
def tiles_made(monkeypatch):
    """The shape of every tile of logits, as it is made."""
    shapes, product = [], gemm.logits_tile

    def counted(hidden, weight, out, *rest):
        shapes.append(tuple(out.shape))
        return product(hidden, weight, out, *rest)

    monkeypatch.setattr(gemm, "logits_tile", counted)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("workspace", [None, 3_000_000])
@pytest.mark.parametrize("case", OPTIONS)
def test_frozen_head_takes_two_products(dtype, workspace, case, poisoned, tiles_made):
    """Log-probs alone, of a frozen head: the gradient is made in the forward, and the backward multiplies rows by numbers."""
    n, d, v = 1517, 24, 1003
    hidden, weight, bias, labels = problem(n, d, v, dtype)
    labels[::5] = -100
    options = {"temperature": torch.rand(n) + 0.5} if OPTIONS[case] == "rows" else OPTIONS[case]
    hidden.requires_grad_()
    ours = linear_token_stats(
        hidden, weight, labels, bias=bias, outputs=ALL, workspace_bytes=workspace, expect_entropy_grad=False, **options
    )
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = oracles.stats(exact_hidden @ weight.double().t(), labels, bias=bias.double(), **options)
    oracles.assert_stats(ours, [e.detach() for e in exact], 1e-10 if dtype == torch.float64 else 1e-5)
    g = torch.randn(n)
    exact[0].backward(g.double())
    g[labels == -100] = torch.nan  # never read
    for graph_again in (True, False):
        (gradient,) = torch.autograd.grad(ours.logps, hidden, g.to(ours.logps), retain_graph=graph_again)
        oracles.assert_gradient(gradient, exact_hidden.grad, upstream=1e-3, slack=2)
    kept = int((labels != -100).sum())
    assert sum(rows * cols for rows, cols in tiles_made) == kept * v
    assert workspace is None or tiles_made[0][0] < kept


@pytest.mark.parametrize(
    "times, options",
    [
        (1, {"outputs": ("logps",)}),
        (1, {"outputs": ("logps",), "workspace_bytes": 30_000}),
        (1, {"outputs": ("logps", "lse")}),
        (1, {"expect_entropy_grad": False}),
        (2, {}),
        (2, {"outputs": ("entropy",), "expect_entropy_grad": False}),
    ],
)
def test_how_often_the_logits_of_a_frozen_head_are_made(times, options, tiles_made):
    hidden, weight, _, labels = problem(300, 24, 1003, torch.float32)
    stats = linear_token_stats(hidden.requires_grad_(), weight, labels, **options)
    (stats.entropy if stats.logps is None else stats.logps).sum().backward()
    assert sum(rows * cols for rows, cols in tiles_made) == times * 300 * 1003


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_head_whose_rows_rise_from_tile_to_tile(backend, dtype, tiles_made):
    """Sums are kept relative to the largest logit so far: it rises by a hundred a tile, stays where it was in the first, or is
    -inf for some tiles; labels out of reach, almost certain, and alive among a few."""
    n, d, v = 40, 16, 700
    hidden, weight, _, _ = problem(n, d, v, dtype)
    first, nothing, few, last = torch.arange(n).split(10)
    labels, keep = torch.empty(n, dtype=torch.int64), torch.ones(n, v, dtype=torch.bool)
    labels[first], labels[nothing], labels[few], labels[last] = 0, 650, 402, v - 1
    keep[torch.cat([nothing, few]), :400] = False
    keep[few, 404:] = False
    hidden.requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    g = torch.randn(n)
    for of_the_first in (0, 1000):
        bias = torch.linspace(0, 800, v).to(dtype)
        bias[0] = of_the_first
        ours = linear_token_stats(
            hidden,
            weight,
            labels,
            bias=bias,
            keep_mask=keep,
            outputs=("logps",),
            workspace_bytes=40_000,
            backend=backend,
        )
        exact = oracles.stats(exact_hidden @ weight.double().t(), labels, bias=bias.double(), keep_mask=keep)[0]
        assert torch.allclose(ours.logps.double(), exact, rtol=1e-6, atol=1e-4)
        (gradient,) = torch.autograd.grad(ours.logps, hidden, g)
        (truth,) = torch.autograd.grad(exact, exact_hidden, g.double())
        oracles.assert_gradient(gradient, truth, upstream=1e-3, slack=2)
    assert max(cols for _, cols in tiles_made) < 400 and sum(r * c for r, c in tiles_made) == 2 * n * v


def test_a_row_without_an_upstream_gradient_has_none_even_if_it_is_nan():
    hidden, weight, _, labels = problem(300, 24, 1003, torch.bfloat16)
    hidden[7] = torch.nan
    hidden.requires_grad_()
    logps = linear_token_stats(hidden, weight, labels, outputs=("logps",)).logps
    assert logps.isnan().nonzero().tolist() == [[7]]
    for graph_again in (True, False):
        (gradient,) = torch.autograd.grad(logps.nan_to_num().sum(), hidden, retain_graph=graph_again)
        assert (gradient[7] == 0).all() and gradient.isfinite().all() and gradient[8].any()


def test_a_frozen_head_holds_no_weight_for_the_backward():
    """The copy that autocast, or a cast, makes of it may be as large as the logits' budget many times over."""
    hidden, weight, _, labels = problem(300, 24, 1003, torch.float32)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(tuple(x.shape)) or x, lambda x: x):
        linear_token_stats(hidden.requires_grad_(), weight, labels, outputs=("logps",))
    assert sorted(held) == [(300,), (300, 24)]


def test_an_entropy_gradient_that_was_not_expected_is_right():
    hidden, weight, _, labels = problem(300, 24, 1003, torch.float32)
    labels[::7] = -100
    hidden.requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    logps, entropy, *_ = oracles.stats(exact_hidden @ weight.double().t(), labels)
    g = torch.randn(2, 300)
    for both in (True, False):
        stats = linear_token_stats(hidden, weight, labels, expect_entropy_grad=False)
        (gradient,) = torch.autograd.grad(stats.entropy @ g[1] + both * (stats.logps @ g[0]), hidden)
        loss = entropy @ g[1].double() + both * (logps @ g[0].double())
        (truth,) = torch.autograd.grad(loss, exact_hidden, retain_graph=True)
        oracles.assert_gradient(gradient, truth, upstream=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_head_holds_a_gradient_and_the_budget(dtype):
    n, d, v, budget = 2048, 1024, 3000, 6 << 20
    hidden, weight, _, labels = problem(n, d, v, dtype)
    hidden.requires_grad_()

    def call():
        linear_token_stats(hidden, weight, labels, outputs=("logps",), workspace_bytes=budget).logps.sum().backward()

    sums = hidden.numel() * 4 if dtype == torch.bfloat16 else 0
    peak, largest = allocations(call)
    assert peak <= hidden.nbytes + sums + n * 4 * 20 + 1.1 * budget
    assert largest <= max(budget, n * d * 4) < n * v * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_peak_memory_is_gradients_outputs_and_the_budget(dtype, trained):
    """No tensor has a token and a vocabulary axis, and every buffer beside the gradients is within the budget."""
    n, d, v, budget = 2048, 64, 3000, 1 << 20
    hidden, weight, _, labels = problem(n, d, v, dtype)
    hidden.requires_grad_(), weight.requires_grad_(trained)

    def call():
        stats = linear_token_stats(hidden, weight, labels, workspace_bytes=budget)
        (stats.logps + stats.entropy).sum().backward()

    sums = hidden.numel() * 4 if dtype == torch.bfloat16 else 0  # dH over several tiles is summed in fp32
    gradients = hidden.nbytes + sums + weight.nbytes * trained
    per_row = n * 4 * 20  # labels compared, row state and its fp64 copies, outputs, upstream gradients
    peak, largest = allocations(call)
    assert peak <= gradients + per_row + 1.1 * budget
    assert largest <= max(budget, hidden.numel() * 4, weight.nbytes) < n * v * 4 // 8


@pytest.mark.parametrize("vocab", [32_768, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_vocabularies(vocab, dtype):
    """Outputs within 1e-5 nats; gradients within 1e-5 in fp32 and 5e-3 in bf16, relative norm."""
    hidden, weight, _, labels = problem(6, 32, vocab, dtype)
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact_inputs = [x.double().requires_grad_() for x in (hidden, weight)]
    ours = linear_token_stats(*inputs, labels, outputs=ALL)
    exact = oracles.stats(exact_inputs[0] @ exact_inputs[1].t(), labels)
    oracles.assert_stats(ours, [e.detach() for e in exact], 1e-5)
    g = torch.randn(2, 6)
    (ours.logps @ g[0] + ours.entropy @ g[1]).backward()
    (exact[0] @ g[0].double() + exact[1] @ g[1].double()).backward()
    for x, truth in zip(inputs, exact_inputs, strict=True):
        # a bare fp32 product that reduces 151,936 columns is itself off by more than the tolerance in some rows
        oracles.assert_gradient(x.grad, truth.grad, upstream=g.norm(), slack=4)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_thousand_tiles_in_bf16_cost_no_digits(compiled, monkeypatch):
    """linkedin/Liger-Kernel#1391: gradients summed over 1,024 chunks in bf16 were 7 times worse."""
    if not compiled:
        monkeypatch.setattr(gemm, "compiled_bf16", lambda: False)
    n, d, v = 512, 16, 2048
    hidden, weight, _, labels = problem(n, d, v, torch.bfloat16)
    plan = plan_tiles(n, v, d, element=4, operand_copies=True, workspace_bytes=12_000)
    assert (n / plan.rows) * (v / plan.cols) >= 1000
    exact_inputs = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = oracles.stats(exact_inputs[0] @ exact_inputs[1].t(), labels)
    (exact[0] + 0.5 * exact[1]).sum().backward()
    for workspace in (None, 12_000):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        stats = linear_token_stats(*inputs, labels, workspace_bytes=workspace)
        (stats.logps + 0.5 * stats.entropy).sum().backward()
        for x, truth in zip(inputs, exact_inputs, strict=True):
            assert oracles.relative_error(x.grad, truth.grad) <= 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_budget_and_the_threads_do_not_change_results_beyond_rounding(dtype):
    hidden, weight, _, labels = problem(65, 32, 2111, dtype)
    whole = linear_token_stats(hidden, weight, labels)
    threads = torch.get_num_threads()
    try:
        for workspace in (40_000, 200_000, 3_000_000):
            for count in (1, 2):
                torch.set_num_threads(count)
                split = linear_token_stats(hidden, weight, labels, workspace_bytes=workspace)
                for a, b in zip(whole[:2], split[:2], strict=True):
                    assert (a - b).abs().max() <= 5e-6
    finally:
        torch.set_num_threads(threads)


def test_autocast_computes_in_its_dtype_and_keeps_the_parameters_own():
    hidden, weight, _, labels = problem(8, 16, 200, torch.float32)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = linear_token_stats(*inputs, labels)
    stats.logps.sum().backward()
    expected = linear_token_stats(hidden.detach().bfloat16(), weight.detach().bfloat16(), labels)
    assert torch.equal(stats.logps, expected.logps)
    assert inputs[1].grad.dtype == torch.float32


def test_the_matrix_library_setting_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(gemm, "compiled_bf16", lambda: False)  # through fp32 copies
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    hidden, weight, _, labels = problem(4, 7, 50, torch.bfloat16)
    with pytest.raises(ValueError):
        linear_token_stats(hidden, weight, labels + 50)
    linear_token_stats(hidden.requires_grad_(), weight, labels).logps.sum().backward()
    assert matmul.fp32_precision == before


def test_empty_and_wholly_ignored():
    for labels in (torch.empty(0, dtype=torch.int64), torch.full((3,), -100)):
        hidden = torch.full((len(labels), 8), torch.nan, requires_grad=True)
        weight = torch.randn(30, 8, requires_grad=True)
        stats = linear_token_stats(hidden, weight, labels, outputs=ALL)
        assert all((value == 0).all() for value in stats)
        (stats.logps.sum() + stats.entropy.sum()).backward()
        assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("n, v, d", [(1, 1, 1), (1, 151936, 4096), (16384, 151936, 4096), (100, 1000, 64)])
@pytest.mark.parametrize("budget", [2 << 20, 64 << 20, 1 << 30])
@pytest.mark.parametrize("copies", [True, False])
def test_plan_covers_everything_once_within_the_budget(n, v, d, budget, copies):
    plan = plan_tiles(n, v, d, element=4, operand_copies=copies, workspace_bytes=budget)
    assert tile_bytes(plan.rows, plan.cols, d, element=4, operand_copies=copies) == plan.workspace_bytes <= budget
    for size, slices in ((n, list(plan.row_slices())), (v, list(plan.col_slices()))):
        assert slices[0].start == 0 and slices[-1].stop == size
        assert all(a.stop == b.start for a, b in itertools.pairwise(slices))


BAD = {
    "hidden shape": (dict(hidden_states=torch.randn(2, 3, 8)), r"hidden_states has shape \(2, 3, 8\)"),
    "D differs": (dict(weight=torch.randn(30, 9)), r"weight \(30, 9\)"),
    "dtype differs": (dict(weight=torch.randn(30, 8).bfloat16()), r"weight has dtype torch.bfloat16"),
    "bias shape": (dict(bias=torch.randn(29)), r"bias has shape \(29,\)"),
    "label": (dict(labels=torch.tensor([0, 30, 2])), r"labels\[1\]=30 is outside \[0, 30\)"),
    "labels shape": (dict(labels=torch.tensor([0, 1])), r"labels has shape \(2,\)"),
    "temperature": (dict(temperature=-1.0), r"temperature=-1.0"),
    "budget": (dict(workspace_bytes=100), r"workspace_bytes=100 holds no tile; give at least"),
    "budget text": (dict(workspace_bytes="64MB"), r"workspace_bytes='64MB' must be an int"),
    "bias list": (dict(bias=[0.0] * 30), r"bias must be a tensor"),
    "bias integers": (dict(bias=torch.ones(30, dtype=torch.int64)), r"bias has dtype torch.int64"),
    "weight device": (dict(weight=torch.empty(30, 8, device="meta")), r"weight is on the meta device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    arguments = {
        "hidden_states": torch.randn(3, 8),
        "weight": torch.randn(30, 8),
        "labels": torch.tensor([0, 1, 2]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_token_stats(
            arguments.pop("hidden_states"), arguments.pop("weight"), arguments.pop("labels"), **arguments
        )


class WaitsForNothing(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        assert name not in ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("outputs", [("logps", "entropy"), ("logps",)])
@pytest.mark.parametrize("workspace", [None, SMALL])
def test_a_captured_call_computes_every_row_and_waits_for_nothing(trained, outputs, workspace, monkeypatch):
    hidden, weight, bias, labels = problem(37, 24, 1003, torch.float32)
    labels[::3] = -100

    def results():
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        stats = linear_token_stats(*inputs, labels, bias=bias, outputs=outputs, workspace_bytes=workspace)
        loss = sum(((i + 1) * x).sum() for i, x in enumerate(stats[: len(outputs)]))
        return [*(x.detach() for x in stats[: len(outputs)]), *torch.autograd.grad(loss, inputs[: 1 + trained])]

    expected = results()
    monkeypatch.setattr(lm_head, "_is_captured", lambda device: True)
    monkeypatch.setattr(checks, "check_values", lambda *args: None)  # of a CPU alone
    with WaitsForNothing():
        captured = results()
    for ours, eager in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert not captured[0][::3].any() and not captured[len(outputs)][::3].any()


def test_forward_and_backward_may_keep_different_rows(monkeypatch):
    """One of them in a graph, say."""
    hidden, weight, _, labels = problem(20, 8, 101, torch.float32)
    labels[::3] = -100
    gradients = []
    for forward, backward in ((False, False), (True, False), (False, True)):
        x = hidden.clone().requires_grad_()
        monkeypatch.setattr(lm_head, "_is_captured", lambda device, now=forward: now)
        loss = linear_token_stats(x, weight.requires_grad_(), labels).logps.sum()
        monkeypatch.setattr(lm_head, "_is_captured", lambda device, now=backward: now)
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])

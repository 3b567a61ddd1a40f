"""What went wrong in other loss heads, one test each; the docstring has the place where it was reported."""

import pytest
import torch
from oracles import stats as exact_stats

from entropy_po import linear_token_stats, reference, tiles, token_stats
from entropy_po.testing import SCALES, allocations, assert_within_reference_error, make_head, make_labels, make_logits
from entropy_po.tiles import Backend
from entropy_po.types import Level, TokenStats, Transform, new_state, stats_from_state

ALL = TokenStats._fields
pytestmark = pytest.mark.usefixtures("poisoned")


def gradients(function, inputs, g):
    """Gradients of g[0] . logps + g[1] . entropy by fresh copies of the inputs, and the stats."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    stats = function(*inputs)
    loss = stats[0] @ g[0].to(stats[0].dtype) + stats[1] @ g[1].to(stats[1].dtype)
    return stats, torch.autograd.grad(loss, inputs)


def check_logits(logits, labels, g=None, **options):
    """token_stats against torch in the same dtype and against fp64: both outputs and the gradient. Of the gradient's
    thousands of elements each side has its own unlucky one, so that there the factor is 4."""
    g = torch.randn(2, len(labels)) if g is None else g
    ours, (mine,) = gradients(lambda x: token_stats(x, labels, **options), [logits], g)
    theirs, (other,) = gradients(lambda x: reference.token_stats(x, labels, Transform(**options)), [logits], g)
    exact, (truth,) = gradients(lambda x: exact_stats(x, labels, **options), [logits.double()], g)
    for i, name in enumerate(("logps", "entropy")):
        assert_within_reference_error(ours[i], theirs[i], exact[i].detach(), unit=1.0, name=name)
    unit = g.abs().max().item() / logits.shape[-1]
    assert_within_reference_error(mine, other, truth, factor=4, unit=unit, name="d logits")


@pytest.mark.parametrize("v", [1, 2, 31, 127, 1000, 1001, 1025, 4099])  # SIMD width, block of 1024, one over and under
def test_vocabulary_that_is_no_multiple_of_a_block(v):
    """verl#2656, unsloth#10616: the padded tail of the last block counted as exp(0)."""
    for n in (1, 3, 17):
        logits = make_logits("fresh", n, v) - 5.0
        check_logits(logits, make_labels(logits))


@pytest.mark.parametrize("v", [1, 100, 1025])
def test_all_negative_logits(v):
    """verl#7439: a running maximum that began at 0 instead of -inf."""
    for shift in (50.0, 3e4):
        logits = -torch.rand(4, v) - shift
        check_logits(logits, make_labels(logits))


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_large_common_offset(offset, temperature):
    """pytorch#195829, SGLang#31958: entropy as lse - E[z] loses every digit to an offset."""
    logits = torch.randint(-64, 65, (6, 333)) / 16  # sums with the offset are exact in fp32
    labels = make_labels(logits)
    at_zero = exact_stats(logits, labels, temperature=temperature)
    for backend in ("cpp", "torch"):
        ours = token_stats(logits + offset, labels, temperature=temperature, backend=backend)
        # torch divides before it subtracts: there a temperature rounds the offset itself, by 1e4 * 2^-24
        bound = 1e-5 if backend == "cpp" or temperature == 1.0 else 5e-3
        for i in range(2):
            assert (ours[i].double() - at_zero[i]).abs().max() <= bound, (ALL[i], backend)


def test_minus_inf_entries():
    """trl#7221: 0 * -inf in the entropy and again in its gradient."""
    logits = torch.randn(5, 200)
    logits[:, ::3] = -torch.inf
    labels = torch.full((5,), 1)
    check_logits(logits, labels)
    ours, (gradient,) = gradients(lambda x: token_stats(x, labels), [logits], torch.randn(2, 5))
    assert (gradient[:, ::3] == 0).all()
    finite, (dense,) = gradients(
        lambda x: token_stats(x, torch.zeros_like(labels)), [logits[:, logits[0] > -torch.inf]], torch.randn(2, 5)
    )
    assert_within_reference_error(ours.entropy, finite.entropy, finite.entropy.double(), unit=1.0)
    assert dense.isfinite().all()


def test_first_block_wholly_masked():
    """SkyRL#2259: exp(-inf - -inf) while nothing live has been seen."""
    for hole in (slice(0, 1024), slice(0, 2500), slice(1024, 2048), slice(2048, None)):
        logits = torch.randn(3, 3000)
        logits[:, hole] = -torch.inf
        check_logits(logits, make_labels(logits))
        keep = torch.ones(3000, dtype=torch.bool)
        keep[hole] = False
        check_logits(torch.randn(3, 3000), make_labels(logits), keep_mask=keep)


def test_first_tile_wholly_masked_on_the_hidden_path():
    """SkyRL#2259, for tiles of a product: whole tiles of a kept set may be empty."""
    hidden, weight, _ = make_head("fresh", 8, 900, 16)
    keep = torch.zeros(900, dtype=torch.bool)
    keep[500:530] = True
    labels = torch.randint(500, 530, (8,))
    g = torch.randn(2, 8)
    for budget in (None, 12_000):
        ours, mine = gradients(
            lambda h, w, b=budget: linear_token_stats(h, w, labels, keep_mask=keep, workspace_bytes=b),
            [hidden, weight],
            g,
        )
        exact, truth = gradients(
            lambda h, w: exact_stats(h @ w.t(), labels, keep_mask=keep), [hidden.double(), weight.double()], g
        )
        assert (ours.logps.double() - exact[0]).abs().max() <= 1e-5
        for a, b in zip(mine, truth, strict=True):
            assert (a.double() - b).norm() <= 1e-5 * b.norm()
        assert (mine[1][~keep] == 0).all()


def test_fp16_extremes():
    """Logits at +-65504 and in the subnormals of fp16; the fold must not overflow on the way."""
    top = torch.finfo(torch.float16).max
    logits = torch.tensor([[top, -top, 0.0, 1.0], [top, top, top, -top], [6e-8, -6e-8, 5e-5, 0.0], [-top] * 4]).half()
    check_logits(logits, torch.tensor([1, 0, 2, 3]))
    assert token_stats(logits, torch.tensor([1, 0, 2, 3])).logps[0] == -2 * top


@pytest.mark.parametrize("bad", [-1, -101, 50, 2**31, 2**40, -(2**63)])
def test_label_out_of_range_is_an_error_and_never_a_read(bad):
    """Fused cross entropies read out of bounds, or took logit 0, for a label that is not in the vocabulary."""
    labels = torch.tensor([3, bad, 5])
    with pytest.raises(ValueError, match=r"labels\[1\]=" + str(bad)):
        token_stats(torch.randn(3, 50), labels)
    with pytest.raises(ValueError, match=r"labels\[1\]=" + str(bad)):
        linear_token_stats(torch.randn(3, 4), torch.randn(50, 4), labels)


def test_tile_without_its_label_gives_nan_not_a_number():
    """The layer below cannot know the vocabulary: a label no tile holds stays NaN, never 0."""
    for backend in (Backend.CPP, Backend.TORCH):
        x = torch.randn(2, 30)
        state = new_state(2, Level.ENTROPY, x)
        tiles.fold_(x, torch.tensor([3, 30]), 0, state, Transform(), level=Level.ENTROPY, backend=backend)
        logps = stats_from_state(state, ("logps",)).logps
        assert logps[0].isfinite() and logps[1].isnan()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_bias_of_the_least_number_bans_a_word(backend):
    """torch.finfo(dtype).min for -inf is how many mask; a tile of nothing else was 0 times an overflow, in a state and beyond it."""
    v, banned = 600, slice(0, 450)
    hidden, weight, labels = torch.randn(40, 8), torch.randn(v, 8), torch.randint(450, v, (40,))
    bias, keep = torch.zeros(v), torch.ones(v, dtype=torch.bool)
    bias[banned], keep[banned] = torch.finfo(torch.float32).min, False
    g = torch.randn(2, 40)
    common = {"backend": backend, "workspace_bytes": 20_000}  # several tiles, the first of banned words alone
    ours, (dh, dw) = gradients(lambda h, w: linear_token_stats(h, w, labels, bias=bias, **common), [hidden, weight], g)
    kept, (kept_dh, kept_dw) = gradients(
        lambda h, w: linear_token_stats(h, w, labels, keep_mask=keep, **common), [hidden, weight], g
    )
    for x, y in ((ours.logps, kept.logps), (ours.entropy, kept.entropy), (dh, kept_dh), (dw, kept_dw)):
        assert torch.equal(x, y)


def test_ignored_rows_give_zero_even_when_they_hold_nan():
    """Label -100: 0 * NaN reached the gradient of the weight. An ignore_index inside the vocabulary counts as well."""
    for ignore_index in (-100, 0, 49):
        labels = torch.tensor([3, ignore_index, 5, ignore_index])
        hidden, weight = torch.randn(4, 6), torch.randn(50, 6)
        hidden[1::2] = torch.nan
        g = torch.randn(2, 4)
        ours, (dh, dw) = gradients(
            lambda h, w, y=labels, i=ignore_index: linear_token_stats(h, w, y, ignore_index=i), [hidden, weight], g
        )
        _, (kept_dh, kept_dw) = gradients(
            lambda h, w, y=labels: linear_token_stats(h, w, y[::2]), [hidden[::2], weight], g[:, ::2]
        )
        assert (ours.logps[1::2] == 0).all() and (ours.entropy[1::2] == 0).all() and (dh[1::2] == 0).all()
        assert torch.equal(dh[::2], kept_dh) and torch.equal(dw, kept_dw)


def test_element_offsets_past_int32():
    """trl#7266: row * stride in 32 bits. The rows lie 2^30 elements apart in memory that is never touched between."""
    stride, v = 2**30 + 5, 64
    try:
        base = torch.empty(2 * stride + v, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for 4.3 GB: {error}")
    logits = base.as_strided((3, v), (stride, 1))
    values = torch.randn(3, v).bfloat16()
    logits.copy_(values)
    labels = torch.tensor([1, 2, 3])
    for backend in ("cpp", "torch"):
        far, near = (token_stats(x, labels, backend=backend) for x in (logits, values))
        assert torch.equal(far.logps, near.logps) and torch.equal(far.entropy, near.entropy)
    expected = torch.autograd.grad(token_stats(values.requires_grad_(), labels).logps.sum(), values)[0]
    token_stats(logits.requires_grad_(), labels, inplace_backward=True).logps.sum().backward()
    assert torch.equal(logits.detach(), expected)


def test_more_rows_than_a_grid_axis():
    """Liger's GRPO loss: a launch of 65,536 rows or more failed."""
    n = 65_536 + 7
    logits = torch.randn(n, 3)
    labels = torch.randint(3, (n,))
    check_logits(logits, labels)


@pytest.mark.parametrize("gap", [6.0, 12.0, 20.0])
def test_confident_tokens_in_bf16(gap):
    """Liger#1329: p rounded to bf16 before the 1 was taken off gave a gradient of 0 for p > 0.998."""
    logits = torch.zeros(4, 100).bfloat16()
    labels = torch.tensor([0, 99, 50, 7])
    logits[torch.arange(4), labels] = gap
    (gradient,) = gradients(lambda x: token_stats(x, labels), [logits], torch.tensor([[1.0] * 4, [0.0] * 4]))[1]
    (truth,) = gradients(lambda x: exact_stats(x, labels), [logits.double()], torch.tensor([[1.0] * 4, [0.0] * 4]))[1]
    at_label = torch.arange(4), labels
    assert (gradient[at_label] > 0).all() or gap == 20.0  # exp(-20) is below what fp32 keeps beside 1
    # fp32 sums s = 1 + 99 exp(-gap) to a few units of 2^-24, and bf16 then keeps 8 bits
    allowed = 2**-8 * truth[at_label] + 2**-22
    assert ((gradient[at_label].double() - truth[at_label]).abs() <= allowed).all()


@pytest.fixture
def one_thread():
    """A thousand tiny tiles: on a busy machine a second thread would wait for a core at each of their barriers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_thousand_chunks_in_bf16(one_thread):
    """Liger#1391: dW summed in bf16 over 1,024 chunks was 7.3 times worse. One tile and 1,024 must err alike."""
    hidden, weight, labels = make_head("fresh", 1024, 1024, 16, torch.bfloat16)
    g = torch.randn(2, 1024)
    _, truth = gradients(lambda h, w: exact_stats(h @ w.t(), labels), [hidden.double(), weight.double()], g)
    errors = []
    for budget in (None, 10_000):
        _, mine = gradients(
            lambda h, w, b=budget: linear_token_stats(h, w, labels, workspace_bytes=b), [hidden, weight], g
        )
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(mine, truth, strict=True)])
    for one, many in zip(*errors, strict=True):
        assert one <= 5e-3 and many <= 5e-3
        assert many <= 1.5 * one


def test_bf16_operands_do_not_bias_the_entropy():
    """A comment in TRL: bf16 logits shift the mean entropy. The product here leaves fp32 logits."""
    hidden, weight, labels = make_head("trained", 256, 1000, 32, torch.bfloat16)
    hidden = hidden / 4  # |z| near 10, where bf16 keeps 3e-2
    exact = exact_stats(hidden.double() @ weight.double().t(), labels)[1]
    ours = linear_token_stats(hidden, weight, labels).entropy.double()
    rounded = exact_stats(hidden @ weight.t(), labels)[1]
    assert (ours - exact).abs().max() <= 1e-5
    assert (rounded - exact).abs().max() > 1e-3  # the trap is there to fall into


def test_upstream_gradients_of_any_size_and_sign():
    """Liger#1082: a backward that took the upstream gradient for the constant 1/N."""
    hidden, weight, labels = make_head("fresh", 9, 120, 8)
    g = torch.randn(2, 9) * torch.logspace(-4, 4, 9)
    g[0, 3] = g[1, 4] = 0.0
    _ours, mine = gradients(lambda h, w: linear_token_stats(h, w, labels), [hidden, weight], g)
    _exact, truth = gradients(lambda h, w: exact_stats(h @ w.t(), labels), [hidden.double(), weight.double()], g)
    for a, b in zip(mine, truth, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()
    check_logits(hidden @ weight.t(), labels, g=g)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_the_entropy_has_a_gradient(backend):
    """trl#6625: the entropy came back detached, and its bonus did nothing, silently."""
    hidden, weight, labels = make_head("fresh", 7, 90, 8)
    g = torch.stack([torch.zeros(7), torch.randn(7)])
    ours, mine = gradients(lambda h, w: linear_token_stats(h, w, labels, backend=backend), [hidden, weight], g)
    _, truth = gradients(lambda h, w: exact_stats(h @ w.t(), labels), [hidden.double(), weight.double()], g)
    assert ours.entropy.requires_grad
    for a, b in zip(mine, truth, strict=True):
        assert b.norm() > 0 and (a.double() - b).norm() <= 1e-5 * b.norm()
    x = torch.randn(3, 20, requires_grad=True)
    token_stats(x, torch.tensor([1, 2, 3]), outputs=("entropy",), backend=backend).entropy.sum().backward()
    assert x.grad.norm() > 0


def test_outputs_may_be_changed_before_the_backward():
    """TRL's test: a metric that scaled the returned log-probs in place spoiled the gradient."""
    gradients_seen = []
    for scribble in (False, True):
        torch.manual_seed(5)
        x = torch.randn(4, 30, requires_grad=True)
        stats = token_stats(x, torch.tensor([1, 2, 3, 4]), outputs=ALL)
        loss = (2.0 * stats.logps).sum() + (3.0 * stats.entropy).sum()
        if scribble:
            with torch.no_grad():
                for value in stats:
                    value.zero_()
        loss.backward()
        gradients_seen.append(x.grad.clone())
    assert torch.equal(*gradients_seen)


def test_outputs_do_not_share_memory():
    """The other half of it: changing one output may not change another, nor what the backward needs."""
    for dtype in (torch.float32, torch.float64):
        stats = token_stats(torch.randn(4, 30, dtype=dtype), torch.tensor([1, 2, 3, 4]), outputs=ALL)
        assert len({value.data_ptr() for value in stats}) == len(ALL)


def test_non_contiguous_slices():
    """Logits, hidden states, weights, labels and temperatures as slices and transposes of something bigger."""
    wide = torch.randn(2, 9, 3 * 61)
    labels = torch.randint(61, (2, 18))[:, ::2]
    for logits in (wide[:, :, :61], wide[:, :, ::3], wide.mT.contiguous().mT[..., :61], wide[..., 1:62]):
        ours = token_stats(logits, labels, temperature=(torch.rand(2, 18) + 0.5)[:, ::2])
        assert ours.logps.shape == (2, 9)
        check_logits(logits.reshape(18, 61), labels.reshape(18))
    hidden, weight, labels = make_head("fresh", 16, 140, 20)
    g = torch.randn(2, 16)
    expected = gradients(lambda h, w: linear_token_stats(h, w, labels), [hidden, weight], g)[1]
    for dtype in (torch.float32, torch.bfloat16):
        base = linear_token_stats(hidden.to(dtype), weight.to(dtype), labels)
        wide_h, wide_w = torch.zeros(16, 41, dtype=dtype), torch.zeros(140, 27, dtype=dtype)
        odd_h, odd_w = wide_h[:, 3:23], wide_w[:, 7:27]  # rows that begin at odd addresses
        odd_h.copy_(hidden), odd_w.copy_(weight)
        for h, w in ((odd_h, odd_w), (hidden.to(dtype).t().contiguous().t(), weight.to(dtype).t().contiguous().t())):
            other = linear_token_stats(h, w, labels)
            assert_within_reference_error(other.logps, base.logps, base.logps.double(), unit=8.0)
    h = hidden.t().contiguous().t().requires_grad_()
    w = weight.t().contiguous().t().requires_grad_()
    stats = linear_token_stats(h, w, labels)
    (stats.logps @ g[0] + stats.entropy @ g[1]).backward()
    for a, b in zip((h.grad, w.grad), expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_a_frozen_head_costs_no_memory_of_its_size():
    """Liger: dW [V, D] was allocated, and computed, for a weight that wants none."""
    hidden, weight, labels = make_head("fresh", 8, 6000, 64)
    hidden.requires_grad_()

    def call():
        stats = linear_token_stats(hidden, weight, labels, workspace_bytes=200_000)
        (stats.logps + stats.entropy).sum().backward()

    assert allocations(call)[1] <= 200_000 < weight.numel() * 4
    assert weight.grad is None
    weight.requires_grad_()
    assert allocations(call)[1] >= weight.numel() * 4  # the measurement sees a dW when there is one


def excess_per_row(n, ignored):
    d, v, budget = 512, 700, 1 << 21
    hidden, weight, labels = make_head("fresh", n, v, d)
    labels[torch.arange(n) < ignored * n] = -100
    hidden.requires_grad_()

    def call():
        stats = linear_token_stats(hidden, weight, labels, workspace_bytes=budget)
        (stats.logps + stats.entropy).sum().backward()

    return (allocations(call)[0] - budget - hidden.numel() * 4) / (hidden.numel() * 4)


def test_memory_beside_the_gradient_does_not_grow_with_the_rows():
    """Everything beside dH and the budget: outputs and row state, 10 % of a dH of 512 columns at most."""
    assert excess_per_row(1024, 0.0) <= 0.1
    assert excess_per_row(4096, 0.0) <= 0.1


def test_memory_beside_the_gradient_with_ignored_rows():
    assert excess_per_row(4096, 0.5) <= 0.1


def test_no_rows_and_only_ignored_rows():
    """N = 0 after a filter, and a batch in which every label is masked: zeros, not NaN and not an error."""
    for n, label in ((0, 0), (3, -100), (257, -100)):
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(n, 8).to(dtype).requires_grad_()
            weight = torch.randn(40, 8).to(dtype).requires_grad_()
            bias = torch.randn(40).requires_grad_()
            labels = torch.full((n,), label)
            stats = linear_token_stats(hidden, weight, labels, bias=bias, outputs=ALL, temperature=torch.ones(n))
            assert all(value.shape == (n,) and (value == 0).all() for value in stats)
            (stats.logps.sum() + stats.entropy.sum()).backward()
            assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in (hidden, weight, bias))


@pytest.mark.parametrize("weight", [torch.empty(0), torch.empty(0, 8), torch.empty(50 * 8 // 2)])
def test_weight_that_was_not_gathered(weight):
    """verl#1565: under ZeRO-3 or FSDP the parameter is an empty or flat shard. The message must name the weight."""
    with pytest.raises(ValueError, match=r"weight|outside \[0, 0\)"):
        linear_token_stats(torch.randn(3, 8), weight, torch.tensor([1, 2, 3]))


def test_an_explicit_backend_never_falls_back():
    """trl#7253: the fused path was asked for, and was silently not the one that ran."""
    for call in (
        lambda backend: token_stats(torch.randn(2, 5), torch.tensor([0, 1]), backend=backend),
        lambda backend: linear_token_stats(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]), backend=backend),
    ):
        with pytest.raises(NotImplementedError, match="backend='triton' cannot be used"):
            call("triton")
        with pytest.raises(ValueError, match="backend='liger'"):
            call("liger")


def test_the_backend_asked_for_is_the_one_that_runs(monkeypatch):
    """trl#7253, seen from inside."""
    ran = []
    fold_ = tiles.fold_
    monkeypatch.setattr(tiles, "fold_", lambda *a, backend, **k: (ran.append(backend), fold_(*a, backend=backend, **k)))
    for backend in ("cpp", "torch", None):
        token_stats(torch.randn(2, 5), torch.tensor([0, 1]), backend=backend)
        linear_token_stats(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]), backend=backend)
    assert ran == [Backend.CPP] * 2 + [Backend.TORCH] * 2 + [Backend.CPP] * 2


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_torch_on_any_inputs(scale, dtype):
    """The rule behind the list: whatever torch loses in this dtype is the allowance, on inputs of three scales."""
    logits = make_logits(scale, 13, 1001, dtype)
    check_logits(logits, make_labels(logits))


# --- found in review of this package


def test_inplace_backward_of_rows_that_share_memory():
    row = torch.randn(1, 20, requires_grad=True)
    labels, g = torch.tensor([1, 2, 3]), torch.randn(3)
    (expected,) = torch.autograd.grad(token_stats((row * 1).expand(3, 20), labels).logps @ g, row)
    (gradient,) = torch.autograd.grad(
        token_stats((row * 1).expand(3, 20), labels, inplace_backward=True).logps @ g, row
    )
    assert_within_reference_error(gradient, expected, expected.double())


def test_a_second_derivative_is_refused_and_not_dropped():
    x = torch.randn(3, 20, requires_grad=True)
    weight = torch.randn(20, 20, requires_grad=True)
    labels = torch.tensor([1, 2, 3])
    for logps in (token_stats(x, labels).logps, linear_token_stats(x, weight, labels).logps):
        with pytest.raises(RuntimeError, match="differentiable once; call backward without create_graph"):
            torch.autograd.grad(logps.sum(), x, create_graph=True)


def test_the_usual_shift_does_not_copy_the_logits():
    logits, labels = torch.randn(4, 65, 500), torch.randint(500, (4, 64))
    assert allocations(lambda: token_stats(logits[:, :-1], labels))[1] < logits.numel() * 4 // 8


def test_autocast_leaves_float64_as_linear_does():
    hidden, weight = torch.randn(2, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.nn.functional.linear(hidden, weight).dtype
        assert linear_token_stats(hidden, weight, torch.tensor([1, 2])).logps.dtype == expected

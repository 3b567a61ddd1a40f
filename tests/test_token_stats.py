"""token_stats: the public operator on logits, its bars, its contract with autograd, and its errors."""

import oracles
import pytest
import torch

from entropy_po import TokenStats, token_stats, types

ALL = TokenStats._fields


@pytest.mark.parametrize("vocab", [32768, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["fresh", "trained", "hostile"])
def test_real_vocabularies_within_1e_5(vocab, dtype, kind, poisoned):
    logits = oracles.logits_of(kind, 9, vocab).to(dtype)
    labels = oracles.labels_for(logits.float())
    labels[4] = -100
    x, exact_x = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours, exact = token_stats(x, labels, outputs=ALL), oracles.stats(exact_x, labels)
    oracles.assert_stats(ours, [e.detach() for e in exact], 1e-5)
    g = torch.randn(2, 9)
    (ours.logps @ g[0] + ours.entropy @ g[1]).backward()
    (exact[0] @ g[0].double() + exact[1] @ g[1].double()).backward()
    oracles.assert_gradient(x.grad, exact_x.grad, upstream=g.norm())
    assert (x.grad[4] == 0).all()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_gradcheck(backend):
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 10, -100, 5])
    keep = torch.rand(4, 11) < 0.8
    keep[torch.arange(4), labels.clamp_min(0)] = True
    for options in ({}, {"temperature": torch.rand(4) + 0.5, "softcap": 3.0, "logit_scale": 0.7, "keep_mask": keep}):
        assert torch.autograd.gradcheck(
            lambda x, options=options: token_stats(x, labels, backend=backend, **options)[:2], (logits,)
        )


def test_only_what_is_asked_for(monkeypatch):
    logits, labels = torch.randn(3, 50), torch.tensor([1, 2, 3])
    stats = token_stats(logits, labels, outputs=("entropy",))
    assert [name for name, value in stats._asdict().items() if value is not None] == ["entropy"]
    levels = []
    from entropy_po import tiles

    fold_ = tiles.fold_
    monkeypatch.setattr(tiles, "fold_", lambda *a, level, **k: (levels.append(level), fold_(*a, level=level, **k)))
    token_stats(logits, labels, outputs=("logps", "lse", "is_top1"))
    token_stats(logits, labels)
    token_stats(logits, labels, outputs=("mean_logit",))
    assert levels == [types.Level.LOGPS, types.Level.ENTROPY, types.Level.EXTRAS]


def test_nothing_runs_beside_the_kernels(monkeypatch):
    """On a GPU each operation of torch's is a launch, some 2 us of a forward's 500: none is left beside fold, stats and grad."""
    from entropy_po.ops import checks
    from entropy_po.ops import token_stats as operator

    ran = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            ran.append(operation)
            return operation(*args, **(kwargs or {}))

    logits, labels, upstream = torch.randn(5, 333), torch.tensor([1, 2, -100, 4, 5]), torch.ones(2, 5).unbind()
    # the values of labels are looked at on a CPU alone
    monkeypatch.setattr(checks, "check_values", lambda *_: None)
    for outputs in (["logps", "entropy"], list(types.TokenStats._fields)):
        options = (None, None, 0.7, 1.0, 30.0, -100, outputs, "", "")
        with Recorder():
            *_, state = operator._forward(logits, labels, *options, False)
            operator._backward(*upstream, logits, labels, state, *options)
    launched = {op for op in ran if not op.is_view and "empty" not in op.name()}
    assert ran and not launched, launched


@pytest.mark.parametrize("which", ["logps", "entropy"])
def test_gradient_of_one_output_alone(which):
    logits = torch.randn(5, 333)
    labels = torch.randint(333, (5,))
    x, exact_x = logits.clone().requires_grad_(), logits.double().requires_grad_()
    index = ALL.index(which)
    g = torch.randn(5)
    (token_stats(x, labels)[index] @ g).backward()
    (oracles.stats(exact_x, labels)[index] @ g.double()).backward()
    oracles.assert_gradient(x.grad, exact_x.grad, upstream=g.norm())


def test_leading_dimensions_and_strides():
    logits = torch.randn(2, 3, 7, 40).transpose(1, 2)[..., ::2]  # neither contiguous nor unit stride
    labels = torch.randint(20, (2, 7, 3))
    stats = token_stats(logits, labels)
    exact = oracles.stats(logits.reshape(-1, 20), labels.reshape(-1))
    assert stats.logps.shape == labels.shape
    oracles.assert_stats(TokenStats(stats.logps.reshape(-1), stats.entropy.reshape(-1)), exact, 1e-5)


def test_inplace_backward_writes_over_the_logits_and_refuses_a_second():
    base = torch.randn(4, 100, requires_grad=True)
    labels = torch.randint(100, (4,))
    (expected,) = torch.autograd.grad(token_stats(base * 1, labels).logps.sum(), base)
    logits = base * 1
    stats = token_stats(logits, labels, inplace_backward=True)
    stats.logps.sum().backward(retain_graph=True)
    assert torch.equal(base.grad, expected)
    assert torch.equal(logits.detach(), expected)  # overwritten: the memory was reused
    with pytest.raises(RuntimeError, match="inplace operation"):
        stats.logps.sum().backward()


def test_second_backward_with_retain_graph_is_the_same():
    x = torch.randn(3, 60, requires_grad=True)
    loss = token_stats(x, torch.tensor([1, 2, 3])).logps.sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)


def test_empty_and_wholly_ignored():
    for labels in (torch.empty(0, dtype=torch.int64), torch.full((3,), -100)):
        x = torch.full((len(labels), 17), torch.nan, requires_grad=True)
        stats = token_stats(x, labels, outputs=ALL)
        assert all((value == 0).all() for value in stats)
        (stats.logps.sum() + stats.entropy.sum()).backward()
        assert (x.grad == 0).all()


BAD = {
    "labels dtype": (dict(labels=torch.zeros(3)), r"labels.*int64.*float32"),
    "labels shape": (dict(labels=torch.zeros(4, dtype=torch.int64)), r"labels has shape \(4,\)"),
    "label too large": (dict(labels=torch.tensor([0, 1, 20])), r"labels\[2\]=20 is outside \[0, 20\)"),
    "label negative": (dict(labels=torch.tensor([0, -1, 2])), r"labels\[1\]=-1"),
    "logits dtype": (dict(logits=torch.zeros(3, 20, dtype=torch.int64)), r"logits has dtype torch.int64"),
    "logits list": (dict(logits=[[0.0]]), r"logits must be a tensor"),
    "no vocabulary": (dict(logits=torch.zeros(3, 0)), r"logits has shape \(3, 0\)"),
    "temperature 0": (dict(temperature=0.0), r"temperature=0.0"),
    "temperature nan": (dict(temperature=float("nan")), r"temperature=nan"),
    "temperature row": (dict(temperature=torch.tensor([1.0, 0.0, 1.0])), r"temperature has an entry of 0 at row 1"),
    "temperature row inf": (dict(temperature=torch.tensor([1.0, 1.0, torch.inf])), r"temperature has an entry of inf"),
    "temperature tiny": (dict(temperature=1e-40), r"temperature=1e-40"),
    "temperature steep": (dict(temperature=1e-9), r"temperature=1e-09 and logit_scale=1 multiply logits by 1e\+09"),
    "temperature row steep": (
        dict(temperature=torch.tensor([1.0, 1e-9, 1.0])),
        r"temperature\[1\]=1e-09 and logit_scale=1 multiply logits by 1e\+09",
    ),
    "temperature none": (dict(temperature=None), r"temperature=None"),
    "logit_scale huge": (dict(logit_scale=1e39), r"logit_scale=1e\+39"),
    "keep_mask list": (dict(keep_mask=[True] * 20), r"keep_mask must be a bool tensor.*list"),
    "keep_mask scalar": (dict(keep_mask=torch.tensor(True)), r"keep_mask must be a bool tensor"),
    "temperature rows": (dict(temperature=torch.ones(2)), r"temperature has 2 entries for 3 rows"),
    "softcap": (dict(softcap=-1.0), r"softcap=-1.0"),
    "logit_scale": (dict(logit_scale=0.0), r"logit_scale=0.0"),
    "keep_mask dtype": (dict(keep_mask=torch.ones(20)), r"keep_mask must be a bool tensor.*float32"),
    "keep_mask shape": (dict(keep_mask=torch.ones(19, dtype=torch.bool)), r"keep_mask has shape"),
    "outputs": (dict(outputs=("logprob",)), r"outputs=\('logprob',\)"),
    "backend": (dict(backend="fast"), r"backend='fast'"),
    "labels device": (dict(labels=torch.zeros(3, dtype=torch.int64, device="meta")), r"labels is on meta"),
}


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_steepest_multiplier_of_the_largest_logits(rows, dtype):
    """Near greedy: what rounding leaves of the transformed maximum, half a last place of 1e9, is what exp still bears."""
    logits = (torch.rand(40, 50) * 2000 - 1000).to(dtype)
    logits[:, 0] = logits.amax(1) * (1 - 2.0**-23)  # as good as equal
    temperature = torch.full((40,), 1e-6) if rows else 1e-6
    leaf, labels = logits.requires_grad_(), logits.detach().argmax(1)
    ours = token_stats(leaf, labels, temperature=temperature)
    exact = (logits.detach().double() / torch.tensor(1e-6, dtype=torch.float32).double()).log_softmax(1)
    wanted = exact.gather(1, labels[:, None])[:, 0]
    assert (ours.logps.double() - wanted).abs().max() <= 2e-5 + 1e-4 * wanted.abs().max()
    assert (ours.entropy.double() + (exact.exp() * exact).sum(1)).abs().max() <= 1e-4
    (gradient,) = torch.autograd.grad(ours.logps.sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    arguments = {"logits": torch.randn(3, 20), "labels": torch.tensor([0, 1, 2]), **change}
    with pytest.raises(ValueError, match=message):
        token_stats(arguments.pop("logits"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("view", [lambda x: x[:, :-1], lambda x: x[:, 1:].transpose(0, 1), lambda x: x[::2, :, :11]])
def test_batches_whose_rows_do_not_lie_evenly(dtype, inplace, view):
    whole = torch.randn(4, 7, 23).to(dtype)
    leaf, other = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    rows = view(leaf * 1)
    labels = torch.randint(rows.shape[-1], rows.shape[:-1])
    labels[0, 0] = -100
    g = torch.randn(2, *labels.shape)
    temperature = torch.rand(labels.shape) + 0.5
    got = token_stats(rows, labels, temperature=temperature, inplace_backward=inplace)
    expected = token_stats(view(other).contiguous(), labels, temperature=temperature)
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(a, b)
    (got.logps * g[0] + got.entropy * g[1]).sum().backward()
    (expected.logps * g[0] + expected.entropy * g[1]).sum().backward()
    assert torch.equal(leaf.grad, other.grad)

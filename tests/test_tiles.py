"""fold_ and grad_ of every CPU backend and instruction set against fp64, and what they may not touch."""

import time
from itertools import pairwise

import oracles
import pytest
import torch

from entropy_po import tiles
from entropy_po.tiles import Backend
from entropy_po.types import STATE_ROWS, Level, Transform, new_state, state_dtype, stats_from_state

CORE = tiles.compiled_core()
ISAS = [("cpp", isa) for isa in (CORE.cpu_isas() if CORE else [])]
BACKENDS = [*ISAS, ("torch", "")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# vector width +-1, the block of 1024 and its tails, several blocks
VOCABULARIES = [1, 2, 31, 127, 1000, 1024, 1025, 4099]
ALL = ("logps", "entropy", "lse", "is_top1", "mean_logit", "log_sum_sq_probs")


def transforms(n, v):
    keep = torch.rand(n, v) < 0.7
    return {
        "plain": {},
        "temperature": {"temperature": 0.7, "logit_scale": 1.3},
        "row temperature": {"temperature": torch.rand(n) + 0.5},
        "softcap": {"softcap": 5.0, "logit_scale": 0.8, "temperature": 1.1},
        "bias": {"bias": torch.randn(v)},
        "keep": {"keep_mask": keep},
        "everything": {"bias": torch.randn(v), "softcap": 8.0, "temperature": torch.rand(n) + 0.5, "keep_mask": keep},
    }


def as_transform(kwargs, dtype):
    options = {k: v for k, v in kwargs.items() if k != "temperature"}
    temperature = kwargs.get("temperature", 1.0)
    if torch.is_tensor(temperature):
        transform = Transform(row_temperature=temperature, **options)
    else:
        transform = Transform(temperature=temperature, **options)
    return transform.tile(slice(None), slice(None), state_dtype(dtype))


def folded(tile, labels, transform, level, backend, isa, start=0, state=None):
    state = new_state(len(labels), level, tile) if state is None else state
    tiles.fold_(tile, labels, start, state, transform, level=level, backend=Backend(backend), isa=isa)
    return state


@pytest.mark.parametrize("backend, isa", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", transforms(1, 1))
def test_fold_and_grad_agree_with_fp64(backend, isa, dtype, name):
    n, v = 5, 1025
    for kind in ("fresh", "trained", "hostile"):
        x = oracles.logits_of(kind, n, v).to(dtype)
        if dtype == torch.float16:
            x = x.clamp(max=6e4)
        labels = oracles.labels_for(x.float())
        kwargs = transforms(n, v)[name]
        if "keep_mask" in kwargs:
            kwargs["keep_mask"][torch.arange(n), labels] = True
        transform = as_transform(kwargs, dtype)
        exact_x = x.double().requires_grad_()
        exact = oracles.stats(exact_x, labels, **kwargs)
        state = folded(x, labels, transform, Level.EXTRAS, backend, isa)
        bound = 1e-10 if dtype == torch.float64 else 1e-5
        # the portable code has no FMA: there a temperature rounds a common offset of 1e4, as torch does everywhere
        offset_rounds = kind == "hostile" and "temperature" in kwargs and (isa in ("baseline", ""))
        if dtype != torch.float64 and (
            offset_rounds or (kind == "hostile" and name in ("bias", "everything", "softcap"))
        ):
            bound = 5e-3
        oracles.assert_stats(stats_from_state(state, ALL), [e.detach() for e in exact], bound)
        g_logp, g_ent = torch.randn(2, n).to(state.dtype)
        for gl, ge in ((g_logp, g_ent), (g_logp, None), (None, g_ent)):
            objective = 0.0
            objective = objective + (exact[0] * gl.double()).sum() if gl is not None else objective
            objective = objective + (exact[1] * ge.double()).sum() if ge is not None else objective
            (truth,) = torch.autograd.grad(objective, exact_x, retain_graph=True)
            out = torch.full_like(x, torch.nan)
            tiles.grad_(x, labels, 0, state, gl, ge, transform, out=out, backend=Backend(backend), isa=isa)
            assert out.isfinite().all()
            assert (out[x == -torch.inf] == 0).all()
            if bound <= 1e-5:
                slack = 4 if isa in ("baseline", "") else 1  # two roundings of a scaled logit where there is no FMA
                oracles.assert_gradient(out, truth, upstream=g_logp.norm() + g_ent.norm(), slack=slack)
            # in place gives the same bits
            same = x.clone()
            tiles.grad_(same, labels, 0, state, gl, ge, transform, backend=Backend(backend), isa=isa)
            assert torch.equal(same, out)


@pytest.mark.parametrize("backend, isa", BACKENDS)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_every_tail(backend, isa, v):
    for n in (1, 3, 17):
        x = 3 * torch.randn(n, v)
        labels = torch.randint(v, (n,))
        state = folded(x, labels, Transform(), Level.EXTRAS, backend, isa)
        exact = oracles.stats(x, labels)
        oracles.assert_stats(stats_from_state(state, ALL), exact, 1e-5)


@pytest.mark.parametrize("backend, isa", BACKENDS)
def test_tiles_in_any_split_and_order_equal_the_whole(backend, isa):
    n, v = 6, 3001
    x = oracles.logits_of("trained", n, v)
    x[0, :700] = -torch.inf  # a whole first tile without a live entry
    labels = oracles.labels_for(x)
    whole = stats_from_state(folded(x, labels, Transform(), Level.EXTRAS, backend, isa), ALL)
    cuts = [0, 1, 700, 701, 1725, 3001]
    parts = list(pairwise(cuts))
    for order in (parts, parts[::-1], [parts[i] for i in torch.randperm(len(parts)).tolist()]):
        state = new_state(n, Level.EXTRAS, x)
        for a, b in order:
            folded(x[:, a:b], labels, Transform(), Level.EXTRAS, backend, isa, start=a, state=state)
        split = stats_from_state(state, ALL)
        oracles.assert_stats(split, [t.double() if t.dtype != torch.bool else t for t in whole], 5e-6)
        g = torch.randn(2, n)
        out, pieces = torch.empty_like(x), torch.empty_like(x)
        tiles.grad_(x, labels, 0, state, g[0], g[1], Transform(), out=out, backend=Backend(backend), isa=isa)
        for a, b in order:
            tiles.grad_(
                x[:, a:b],
                labels,
                a,
                state,
                g[0],
                g[1],
                Transform(),
                out=pieces[:, a:b],
                backend=Backend(backend),
                isa=isa,
            )
        assert oracles.relative_error(pieces, out) <= 1e-6


@pytest.mark.parametrize("backend, isa", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_is_written(backend, isa, dtype):
    n, v, pad = 5, 1027, 13
    canary = torch.full((n + 2, v + 2 * pad), 7.0, dtype=dtype)
    tile = canary[1:-1, pad:-pad]
    tile.copy_(torch.randn(n, v))
    labels = torch.randint(v, (n,))
    wide = torch.full((STATE_ROWS[Level.EXTRAS], n + 4), 7.0, dtype=state_dtype(dtype))
    state = wide[:, 2:-2]
    state.copy_(new_state(n, Level.EXTRAS, tile))
    folded(tile, labels, Transform(), Level.EXTRAS, backend, isa, state=state)
    g = torch.randn(n).to(state.dtype)
    tiles.grad_(tile, labels, 0, state, g, g, Transform(), backend=Backend(backend), isa=isa)
    border = torch.ones_like(canary, dtype=torch.bool)
    border[1:-1, pad:-pad] = False
    assert (canary[border] == 7).all() and (wide[:, :2] == 7).all() and (wide[:, -2:] == 7).all()


@pytest.mark.parametrize("backend, isa", BACKENDS)
def test_gradient_narrows_into_its_own_tile(backend, isa):
    n, v = 7, 2051
    x = 3 * torch.randn(n, v)
    labels = torch.randint(v, (n,))
    state = folded(x, labels, Transform(), Level.ENTROPY, backend, isa)
    g = torch.randn(2, n)
    wide = torch.empty_like(x)
    tiles.grad_(x, labels, 0, state, g[0], g[1], Transform(), out=wide, backend=Backend(backend), isa=isa)
    overlay = tiles.bf16_overlay(x)
    tiles.grad_(x, labels, 0, state, g[0], g[1], Transform(), out=overlay, backend=Backend(backend), isa=isa)
    assert torch.equal(overlay, wide.bfloat16())


@pytest.mark.parametrize("backend, isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_pattern_converts_as_torch_does(backend, isa, dtype):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[:, None]  # one entry a row: m is the value itself
    state = folded(x.contiguous(), torch.zeros(65536, dtype=torch.int64), Transform(), Level.LOGPS, backend, isa)
    finite = x[:, 0].isfinite()
    assert torch.equal(state[0][finite], x[:, 0].float()[finite])
    # out of the kernel: two equal entries, so that the gradient of logp at the label is g / 2, for g of every size
    g = torch.cat([torch.randn(4000) * 10.0**e for e in range(-10, 6)])
    two = torch.zeros(len(g), 2, dtype=dtype)
    labels = torch.zeros(len(g), dtype=torch.int64)
    state = folded(two, labels, Transform(), Level.LOGPS, backend, isa)
    out = torch.empty_like(two)
    tiles.grad_(two, labels, 0, state, g, None, Transform(), out=out, backend=Backend.CPP, isa=isa)
    assert torch.equal(out[:, 1], (-g * 0.5).to(dtype))


@pytest.mark.parametrize("backend, isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_result_rounds_as_torch_does(backend, isa, dtype):
    """With m = 0, s = 1 and logits of 0 the gradient off the label is -g: every pattern, and what lies between two."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    patterns = patterns[patterns.isfinite() & (patterns != 0)]  # a g of 0 is a row that nobody differentiates
    ordered = patterns.sort().values
    between = (ordered[1:].double() + ordered[:-1].double()) / 2  # ties, and the fp32 neighbours of ties
    ties = between.float()
    beyond = torch.tensor([65519.0, 65520.0, 65536.0, 1e5, 3e38, 3.4e38, 1e-8, 2e-8, 3e-8, 1e-20, torch.inf])
    g = torch.cat(
        [patterns, ties, torch.nextafter(ties, torch.tensor(torch.inf)), ties * (1 - 2**-23), beyond, -beyond]
    )
    g = torch.cat([g[g != 0], torch.tensor([torch.nan])])
    tile = torch.zeros(len(g), 2, dtype=dtype)
    state = new_state(len(g), Level.LOGPS, tile)
    state[0], state[1], state[2] = 0, 1, 0
    out = torch.empty_like(tile)
    labels = torch.zeros(len(g), dtype=torch.int64)
    tiles.grad_(tile, labels, 0, state, g, None, Transform(), out=out, backend=Backend.CPP, isa=isa)
    expected = (-g).to(dtype)
    assert torch.equal(out[:, 1].isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(out[number, 1].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("backend, isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_infinities_and_nan_of_half_precision_stay_what_they_are(backend, isa, dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    labels = torch.zeros(len(x), dtype=torch.int64)
    logps = stats_from_state(
        folded(x[:, None].contiguous(), labels, Transform(), Level.LOGPS, backend, isa), ("logps",)
    ).logps
    assert (logps[x.isfinite()] == 0).all() and logps[
        ~x.isfinite()
    ].isnan().all()  # one entry: p = 1, or no distribution
    # beside a 0: -inf is absent, +inf and NaN spoil the row
    pairs = torch.stack([torch.zeros_like(x), x], 1)
    logps = stats_from_state(folded(pairs, labels, Transform(), Level.LOGPS, backend, isa), ("logps",)).logps
    expected = torch.log_softmax(pairs.double(), -1)[:, 0]
    assert torch.equal(logps.isnan(), expected.isnan())
    number = ~expected.isnan()
    scale = expected[number].abs().clamp_min(1)
    assert ((logps[number].double() - expected[number]).abs() <= 2**-22 * scale).all()


@pytest.mark.parametrize("backend, isa", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lower_level_is_the_same_fold_with_less_in_it(backend, isa, dtype):
    x = oracles.logits_of("fresh", 4, 1100).to(dtype)
    labels = oracles.labels_for(x.float())
    full = folded(x, labels, Transform(), Level.EXTRAS, backend, isa)
    eps = 64 * torch.finfo(full.dtype).eps  # 1,100 terms in another order
    for level in (Level.LOGPS, Level.ENTROPY):
        state = folded(x, labels, Transform(), level, backend, isa)
        same = [0, 1, 3, 4] if level == Level.LOGPS else [0, 1, 2, 3, 4]
        assert ((state[same] - full[same]).abs() <= eps * full[same].abs()).all()


@pytest.mark.parametrize("backend, isa", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_upstream_gradient_is_a_gradient_of_zero(backend, isa, dtype):
    x = torch.randn(3, 70).to(dtype)
    labels = torch.tensor([1, 2, 3])
    state = folded(x, labels, Transform(), Level.ENTROPY, backend, isa)
    zero = torch.zeros(3, dtype=state.dtype)
    for g_logp, g_ent in ((None, None), (zero, None), (None, zero), (zero, zero)):
        out = torch.full_like(x, torch.nan)
        tiles.grad_(x, labels, 0, state, g_logp, g_ent, Transform(), out=out, backend=Backend(backend), isa=isa)
        assert (out == 0).all()


@pytest.mark.parametrize("backend, isa", ISAS)
@pytest.mark.parametrize("dtype, ulps", [(torch.float32, 2.5), (torch.float64, 2.5)])
def test_exp_of_the_kernels(backend, isa, dtype, ulps):
    """s of the pair (0, d) is 1 + exp(d); with exp(d) as the gradient's p it is read back without the 1."""
    d = -torch.logspace(-6, torch.log10(torch.tensor(86.0)).item(), 20001, dtype=torch.float64).to(dtype)
    x = torch.stack([torch.zeros_like(d), d], 1)
    state = new_state(len(d), Level.LOGPS, x)
    state[0], state[1] = 0, 1  # m = 0 and s = 1: the gradient at entry 1 is -exp(d) itself
    labels = torch.zeros(len(d), dtype=torch.int64)
    out = torch.empty_like(x)
    one = torch.ones(len(d), dtype=dtype)
    tiles.grad_(x, labels, 0, state, one, None, Transform(), out=out, backend=Backend.CPP, isa=isa)
    truth = torch.exp(d.double())
    error = ((-out[:, 1].double() - truth).abs() / truth).max().item()
    assert error <= ulps * torch.finfo(dtype).eps


def test_ignored_rows_are_not_touched_and_nan_does_not_leak():
    for backend, isa in BACKENDS:
        x = torch.randn(4, 50)
        x[1] = torch.nan
        labels = torch.tensor([3, -100, 4, 5])
        state = folded(x, labels, Transform(), Level.ENTROPY, backend, isa)
        g = torch.tensor([1.0, 1.0, 0.0, 1.0])
        x[2] = torch.nan  # a row nobody differentiates
        out = torch.empty_like(x)
        tiles.grad_(x, labels, 0, state, g, None, Transform(), out=out, backend=Backend(backend), isa=isa)
        assert out.isfinite().all() and (out[1] == 0).all() and (out[2] == 0).all()


@pytest.mark.parametrize("backend, isa", BACKENDS)
def test_nan_in_a_live_row_is_reported(backend, isa):
    for position in (0, 1023, 1500):
        x = torch.randn(2, 2000)
        x[0, position] = torch.nan
        state = folded(x, torch.tensor([7, 7]), Transform(), Level.ENTROPY, backend, isa)
        stats = stats_from_state(state, ("logps", "entropy"))
        assert stats.logps[0].isnan() and stats.logps[1].isfinite()


def test_unknown_backend_and_isa_say_what_there_is():
    with pytest.raises(ValueError, match=r"backend='cude'.*cpp"):
        tiles.resolve_backend("cude", torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"backend='triton'.*Usable on 'cpu'"):
        tiles.resolve_backend("triton", torch.device("cpu"))
    if CORE:
        with pytest.raises(ValueError, match="isa 'sse9'"):
            folded(torch.randn(1, 4), torch.tensor([0]), Transform(), Level.LOGPS, "cpp", "sse9")


def test_intels_gpus_are_triton_s():
    reason = tiles.unavailable_reason(Backend.TRITON)
    assert tiles.candidates_for("xpu") == (Backend.TRITON, Backend.TORCH) and not tiles.chosen_by_tile("xpu")
    if reason is None:
        assert tiles.resolve_backend(None, torch.device("xpu")) is Backend.TRITON
    with pytest.raises(NotImplementedError, match="does not serve device 'xpu'"):
        tiles.resolve_backend("cpp", torch.device("xpu"))


@pytest.mark.slow
@pytest.mark.skipif(not ISAS or "x86" not in ISAS[0][1], reason="needs x86-64-v3 or later")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loops_are_vectorised(dtype):
    """gcc 12 turns the fold scalar, five times slower and without a word, when a flag of setup.py is lost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tile = torch.randn(64, 32_768).to(dtype)
        labels, state = torch.zeros(64, dtype=torch.int64), new_state(64, Level.ENTROPY, tile)
        g, out, scratch = torch.ones(64), torch.empty_like(tile), torch.empty(64, 32_768)

        def fold():
            tiles.fold_(tile, labels, 0, state, Transform(), level=Level.ENTROPY, backend=Backend.CPP)

        def grad():
            tiles.grad_(tile, labels, 0, state, g, g, Transform(), out=out, backend=Backend.CPP)

        wide = tile.float()

        def exp():
            torch.exp(wide, out=scratch).sum()

        seconds = {run: [] for run in (fold, grad, exp)}
        for _ in range(9):
            for run, times in seconds.items():
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        # torch's own exp is vectorised; scalar loops take several times as long
        assert min(seconds[fold]) < 1.5 * min(seconds[exp])
        assert min(seconds[grad]) < 1.5 * min(seconds[exp])
    finally:
        torch.set_num_threads(threads)

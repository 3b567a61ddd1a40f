"""The compiled products of bf16 and fp32 operands with fp32 results, against fp64 of the same operands."""

from types import SimpleNamespace

import pytest
import torch
from oracles import relative_error

from entropy_po.ops import gemm
from entropy_po.ops.lm_head import LmHead
from entropy_po.tiles import DTYPES, bf16_overlay, compiled_core

CORE = compiled_core()
OPERANDS = [
    pytest.param(
        dtype,
        id=str(dtype),
        marks=pytest.mark.skipif(
            CORE is None or not CORE.gemm_supported(DTYPES[dtype]),
            reason="needs the compiled core and a processor with AVX-512, for bf16 with AVX512_BF16",
        ),
    )
    for dtype in (torch.bfloat16, torch.float32)
]
LAYOUTS = {"NT": (False, True), "TN": (True, False), "NN": (False, False)}  # (a_transposed, b_transposed)
# (m, n, k): below a block of 12 x 32 and a pair, whole ones, one over; several passes over k; several strips of either
# operand; more than 4 MiB of the smaller one; A with blocks enough for B to be shared although it is the larger
SIZES = [(1, 1, 1), (5, 7, 3), (11, 31, 2), (12, 32, 64), (13, 33, 65), (3, 500, 4097), (700, 9, 2049), (300, 290, 33)]
SIZES += [(1100, 1120, 2051), (200, 230, 2051)]
CANARY = 7.25


def stored(rows, cols, apart, dtype):
    """[rows, cols] amid NaN, at an odd address, rows `apart` elements further apart than they are long."""
    memory = torch.full((rows * (cols + apart) + 8,), torch.nan, dtype=dtype)
    return memory[3 : 3 + rows * (cols + apart)].view(rows, cols + apart)[:, :cols].copy_(torch.randn(rows, cols))


def product_and_size(left, right):
    """left @ right in fp64, and the root of its terms' squares: as large as the result, but where a few terms cancel."""
    left, right = left.double(), right.double()
    return left @ right, (left.square() @ right.square()).sqrt()


def product(layout, sizes, dtype, *, accumulate, apart=0, threads=2):
    """(the product, its truth in fp64, its terms' size); fails if a byte beside the result changed."""
    (m, n, k), (a_transposed, b_transposed) = sizes, LAYOUTS[layout]
    a = stored(*((k, m) if a_transposed else (m, k)), apart, dtype)
    b = stored(*((n, k) if b_transposed else (k, n)), apart, dtype)
    truth, size = product_and_size(a.t() if a_transposed else a, b.t() if b_transposed else b)
    memory = torch.full((m + 2, n + apart + 5), CANARY)
    out = memory[1:-1, 3 : 3 + n].fill_(torch.nan)
    if accumulate:
        truth += out.normal_().double()
        size = size.hypot(out.double())
    CORE.gemm(
        a=a.data_ptr(),
        b=b.data_ptr(),
        out=out.data_ptr(),
        dtype=DTYPES[dtype],
        m=m,
        n=n,
        k=k,
        a_stride=a.stride(0),
        b_stride=b.stride(0),
        out_stride=out.stride(0),
        a_transposed=a_transposed,
        b_transposed=b_transposed,
        accumulate=accumulate,
        threads=threads,
    )
    result = out.clone()
    out.fill_(CANARY)
    assert (memory == CANARY).all()
    return result, truth, size


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("apart", [0, 41])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_layout_size_and_stride(layout, accumulate, apart, sizes, dtype):
    result, truth, size = product(layout, sizes, dtype, accumulate=accumulate, apart=apart)
    assert (result - truth).norm() <= 1e-6 * size.norm()


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(0, 40, 8), (40, 0, 8), (40, 50, 0)], ids=str)
def test_empty(layout, sizes, dtype):
    for accumulate in (False, True):
        result, truth, _ = product(layout, sizes, dtype, accumulate=accumulate)
        assert torch.equal(result.double(), truth)


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout, seed, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.manual_seed(seed)
        results.append(product(layout, (500, 410, 4100), dtype, accumulate=True, threads=threads)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", OPERANDS)
def test_the_order_of_a_row_s_sums_depends_on_k_alone(dtype, gen):
    """What deterministic mode rests on: a row of the result has the same bits among other rows, columns and strides."""
    k = 2500
    a, b = (torch.randn(n, k, generator=gen).to(dtype) for n in (70, 90))
    whole, one = torch.empty(70, 90), torch.empty(3, 11)
    gemm._compiled_product(a, b.t(), whole, accumulate=False)
    gemm._compiled_product(a.repeat_interleave(2, 0)[10:16:2], b[40:51].clone().t(), one, accumulate=False)
    assert torch.equal(one, whole[5:8, 40:51])


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("n, v, d", [(37, 301, 45), (1, 5, 8), (9, 1, 1)])
def test_gradients_are_added_in_fp32_and_without_scratch(n, v, d, dtype, monkeypatch):
    monkeypatch.setattr(gemm, "compiled_bf16", lambda: True)
    monkeypatch.setattr(gemm, "compiled_fp32", lambda: True)
    gradient = torch.empty(n, v) if dtype == torch.float32 else bf16_overlay(torch.empty(n, v))
    gradient.copy_(torch.randn(n, v))
    hidden, weight = stored(n, d, 3, dtype), stored(v, d, 3, dtype)
    for left, right in ((gradient.t(), hidden), (gradient, weight)):
        total = torch.full((left.shape[0], d), torch.nan)
        exact, size = product_and_size(left, right)
        for times in (1, 2):
            gemm.add_product(total, left, right, first=times == 1, scratch=None)
            assert (total - times * exact).norm() <= 1e-6 * times * size.norm()


def test_a_gradient_in_fp32_keeps_its_digits_beside_bf16_operands(monkeypatch):
    """The matrix library's bf16 mode is for products of two copies of bf16, which are the logits' alone."""
    monkeypatch.setattr(gemm, "compiled_fp32", lambda: False)
    matmul, product, used = torch.backends.mkldnn.matmul, torch.mm, []
    monkeypatch.setattr(
        torch, "mm", lambda *args, **kwargs: used.append(matmul.fp32_precision) or product(*args, **kwargs)
    )
    head = SimpleNamespace(scratch=gemm.Scratch(torch.device("cpu")))
    weight = gemm.Operand(torch.randn(70, 16).bfloat16(), "weight", head.scratch)
    total, gradient = torch.empty(9, 16), torch.randn(9, 70)
    LmHead.add_product(head, total, gradient, weight, True)
    assert used == [matmul.fp32_precision] and used != ["bf16"]
    assert relative_error(total, gradient.double() @ weight.given.double()) <= 1e-6


@pytest.mark.parametrize("dtype", OPERANDS[:1])
def test_a_bf16_gradient_is_its_fp32_sum_rounded_once(dtype, monkeypatch):
    """Whether it is made at once or in pieces of some rows."""
    monkeypatch.setattr(gemm, "compiled_bf16", lambda: True)
    gradient, weight = bf16_overlay(torch.randn(37, 3001)).normal_(), torch.randn(3001, 45).to(dtype)
    exact = torch.empty(37, 45)
    gemm.add_product(exact, gradient, weight, first=True, scratch=None)
    for elements in (1 << 22, 45 * 10):
        monkeypatch.setattr(gemm, "PRODUCT_ELEMENTS", elements)
        total, scratch = torch.full((37, 45), torch.nan, dtype=dtype), gemm.Scratch(torch.device("cpu"))
        gemm.add_product(total, gradient, weight, first=True, scratch=scratch)
        assert torch.equal(total, exact.to(dtype))
        gemm.add_product(total, gradient, weight, first=False, scratch=scratch)
        assert (total - 2 * exact).abs().max() <= exact.abs().max() / 64


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("m, n, k", [(37, 45, 301), (500, 33, 5000), (33, 500, 5000), (1, 1, 1), (13, 33, 0)])
@pytest.mark.parametrize("first", [True, False])
def test_the_last_product_scales_and_rounds_the_sum(m, n, k, first, dtype):
    left, right = stored(k, m, 3, dtype).t(), stored(k, n, 3, dtype)
    total, factor = torch.randn(m, n), torch.tensor(-0.37)
    exact = gemm._compiled_product(left, right, total.clone(), accumulate=not first)
    memory = torch.full((m, n + 7), CANARY, dtype=dtype)
    gemm.add_last_product(total, left, right, first, factor, out=memory[:, 3 : 3 + n])
    assert torch.equal(memory[:, 3 : 3 + n], (exact * factor).to(dtype))
    assert (memory[:, :3] == CANARY).all() and (memory[:, 3 + n :] == CANARY).all()


@pytest.mark.parametrize("dtype", OPERANDS[1:])
def test_the_last_fp32_product_may_be_scaled_in_its_place(dtype):
    left, right, total = torch.randn(40, 3000), torch.randn(3000, 50), torch.randn(40, 50)
    exact = 0.3 * gemm._compiled_product(left, right, total.clone(), accumulate=True)
    gemm.add_last_product(total, left, right, False, torch.tensor(0.3), out=total)
    assert torch.equal(total, exact)

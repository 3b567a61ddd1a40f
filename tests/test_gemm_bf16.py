"""The compiled bf16 products with fp32 results, against fp64 of the same operands."""

import pytest
import torch
from oracles import relative_error

from entropy_po.ops import gemm
from entropy_po.tiles import bf16_overlay, compiled_core

CORE = compiled_core()
if CORE is None or not CORE.gemm_bf16_supported():
    pytest.skip("needs the compiled core and a processor with AVX512_BF16", allow_module_level=True)

LAYOUTS = {"NT": (False, True), "TN": (True, False), "NN": (False, False)}  # (a_transposed, b_transposed)
# (m, n, k): below a block of 12 x 32 and a pair, whole ones, one over; several passes over k; several strips of either
# operand; more than 4 MiB of the smaller one
SIZES = [(1, 1, 1), (5, 7, 3), (11, 31, 2), (12, 32, 64), (13, 33, 65), (3, 500, 4097), (700, 9, 2049), (300, 290, 33)]
SIZES += [(1100, 1120, 2051)]
CANARY = 7.25


def stored(rows, cols, apart):
    """bf16 [rows, cols] amid NaN, at an odd address, rows `apart` elements further apart than they are long."""
    memory = torch.full((rows * (cols + apart) + 8,), torch.nan, dtype=torch.bfloat16)
    return memory[3 : 3 + rows * (cols + apart)].view(rows, cols + apart)[:, :cols].copy_(torch.randn(rows, cols))


def product(layout, sizes, *, accumulate, apart=0, threads=2):
    """(the product, its truth in fp64); fails if a byte beside the result changed."""
    (m, n, k), (a_transposed, b_transposed) = sizes, LAYOUTS[layout]
    a = stored(k, m, apart) if a_transposed else stored(m, k, apart)
    b = stored(n, k, apart) if b_transposed else stored(k, n, apart)
    truth = (a.t() if a_transposed else a).double() @ (b.t() if b_transposed else b).double()
    memory = torch.full((m + 2, n + apart + 5), CANARY)
    out = memory[1:-1, 3 : 3 + n].fill_(torch.nan)
    if accumulate:
        truth += out.normal_().double()
    CORE.gemm_bf16(
        a=a.data_ptr(),
        b=b.data_ptr(),
        out=out.data_ptr(),
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
    return result, truth


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("apart", [0, 41])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_layout_size_and_stride(layout, accumulate, apart, sizes):
    result, truth = product(layout, sizes, accumulate=accumulate, apart=apart)
    assert relative_error(result, truth) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(0, 40, 8), (40, 0, 8), (40, 50, 0)], ids=str)
def test_empty(layout, sizes):
    for accumulate in (False, True):
        result, truth = product(layout, sizes, accumulate=accumulate)
        assert torch.equal(result.double(), truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout, seed):
    results = []
    for threads in (1, 2, 3):
        torch.manual_seed(seed)
        results.append(product(layout, (500, 410, 4100), accumulate=True, threads=threads)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(not gemm.compiled_bf16(), reason="with AMX the products are the matrix library's")
@pytest.mark.parametrize("n, v, d", [(37, 301, 45), (1, 5, 8), (9, 1, 1)])
def test_gradients_are_added_in_fp32_and_without_scratch(n, v, d):
    gradient = bf16_overlay(torch.empty(n, v)).copy_(torch.randn(n, v))
    hidden, weight = stored(n, d, 3), stored(v, d, 3)
    for left, right in ((gradient.t(), hidden), (gradient, weight)):
        total = torch.full((left.shape[0], d), torch.nan)
        for times in (1, 2):
            gemm.add_product(total, left, right, first=times == 1, scratch=None)
            assert relative_error(total, times * (left.double() @ right.double())) <= 1e-6

"""Row mathematics of a vocabulary tile for the Triton kernels: csrc/tile.h with the same names in the same order.

Derivation and the meaning of m, s, t, q, c, live, u, k, d: README.md in this folder. Everything is done in the dtype of the
arguments: fp32, or fp64 for an fp64 tile.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from entropy_po.types import Level

LEVEL_ENTROPY = tl.constexpr(int(Level.ENTROPY))
LEVEL_EXTRAS = tl.constexpr(int(Level.EXTRAS))
MINUS_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # number of fp32
LOWEST64 = tl.constexpr(-1.7976931348623157e308)  # and of fp64
# Of d: its exp is an exact 0. That of z is no lower than that no scale of a gradient takes it to infinity; that of u is, for k may be small.
FLOOR, FLOOR_OF_U = tl.constexpr(-1e15), tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.44269504088896340736)

# 2^d; one instruction on NVIDIA GPUs, where tl.exp2 has three more for results below the normal range of fp32.
exp2 = libdevice.exp2
# a / b to 2 units in the last place, for a b near 1
divide_fast = libdevice.fast_dividef
if triton.knobs.runtime.interpret:  # which has no libdevice

    @triton.jit
    def exp2(d):
        return tl.exp2(d)

    @triton.jit
    def divide_fast(a, b):
        return a / b


@triton.jit
def divide(a, b):
    """a / b correctly rounded: plain fp32 division is an approximation on GPUs, and k multiplies every logit."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def floored(d, floor):
    """d where it multiplies exp(d): -inf becomes finite, so that 0 * d is 0, and so is s * d * 0. A NaN may become finite, too, but
    its exp, which is taken of d itself, is one; a maximum that keeps a NaN takes three instructions on some GPUs."""
    return tl.maximum(d, floor)


@triton.jit
def exp_parts(d):
    """(scale, tail) with exp(d) = scale * (1 + tail), for d <= 0 or just above; exp(d) - 1 from them keeps its digits.

    Only where exp - 1 is wanted: exp itself is left to the hardware. Below the normal range scale is 0.
    """
    if d.dtype == tl.float64:
        d = tl.maximum(d, -709.2, propagate_nan=tl.PropagateNan.ALL)
        shifted = d * 1.44269504088896340736 + 6755399441055744.0  # 1.5 * 2^52 rounds to an integer in the low bits
        n = shifted - 6755399441055744.0
        scale = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
        r = (d - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
        p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0  # Taylor: the next term is 4e-18 on |r| <= ln2 / 2
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
    else:
        d = tl.maximum(d, -88.2, propagate_nan=tl.PropagateNan.ALL)
        shifted = d * 1.44269504088896341 + 12582912.0  # 1.5 * 2^23
        n = shifted - 12582912.0
        scale = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
        r = (d - n * 0.693359375) - n * -2.12194440e-4
        p = r * 0.0013926250394433737 + 0.0083632329478860  # Chebyshev nodes: relative error of exp 1.1e-8
        p = p * r + 0.04166655242443085
        p = p * r + 0.16666576266288757
    return scale, r + r * r * (p * r + 0.5)


@triton.jit
def tanh_and_slope(v):
    """tanh(v) and its derivative. Neither cancels where tanh saturates, nor tanh near 0."""
    if v.dtype == tl.float64:
        scale, tail = exp_parts(-2.0 * tl.abs(v))
        e = scale * tail + scale
        em1 = scale * tail + (scale - 1.0)
        inverse = 1.0 / (em1 + 2.0)
        magnitude = -em1 * inverse
        return tl.where(v < 0.0, -magnitude, magnitude), 4.0 * e * inverse * inverse
    else:
        # e = exp(-2 v); past 2^60 nothing changes any more, and inf / inf would be NaN
        e = exp2(tl.minimum(v * (-2.0 * LOG2E), 60.0))
        inverse = divide_fast(1.0, 1.0 + e)
        # Below 0.3, where 1 - e cancels: v + v^3 p(v^2) with p at Chebyshev nodes, relative error 4.3e-8.
        w = v * v
        p = (w * -0.05113268 + 0.13323874) * w - 0.33333286
        small = (v * w) * p + v  # of a NaN, too, which `minimum` may drop
        return tl.where(tl.abs(v) >= 0.3, (1.0 - e) * inverse, small), 4.0 * e * inverse * inverse


@triton.jit
def moved(delta, shrink, s, t, q, c, live, LEVEL: tl.constexpr):
    """The sums relative to another reference: the old one lies `delta` from it, in the unit of d, `shrink` is e^(z's part)."""
    if LEVEL >= LEVEL_ENTROPY:
        t = (t + s * floored(delta, FLOOR_OF_U)) * shrink
    s = s * shrink
    if LEVEL >= LEVEL_EXTRAS:
        q = q * (shrink * shrink)
        c = c + tl.where(live == 0.0, 0.0, live * delta)  # an infinite delta, where nothing is live yet
    return s, t, q, c


@triton.jit
def at_label(d, s, mean_d, g_logp, g_entropy):
    """d loss / d z at the label, d = z_label - m.

    1 - p = -expm1(log p) keeps its digits when p rounds to 1; written without the logarithm, which GPUs approximate worst
    near 1, it is (s - exp(d)) / s. And p keeps its digits when it is small, which 1 + expm1(d) would not.
    """
    scale, tail = exp_parts(d)
    em1 = scale * tail + (scale - 1.0)
    one_minus_p = divide((s - 1.0) - em1, s)
    p = divide(scale * tail + scale, s)
    return tl.where(d == MINUS_INF, 0.0, g_logp * one_minus_p - g_entropy * p * (d - mean_d))


@triton.jit
def row_pointer(ptr, row, stride, ALIGNED: tl.constexpr):
    """Where row `row` starts. The hint is on the offset: it survives where a backend splits pointers into base + offset."""
    offset = row * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 128 // ptr.dtype.element_ty.primitive_bitwidth)
    return ptr + offset


# Rows that begin and end anywhere in an aligned tensor, as those of an odd vocabulary: all between a row's first 16-byte boundary and
# its last multiple of 16 columns is the body, whose loads and stores are as those of an aligned row; the rest are its edges.
@triton.jit
def before_boundary(ptr, row, stride):
    """How many elements row `row` has before its first boundary."""
    return -(row * stride) & (128 // ptr.dtype.element_ty.primitive_bitwidth - 1)


@triton.jit
def from_boundary(ptr, row, stride, head):
    """Where row `row` goes on after its `head`."""
    return ptr + tl.multiple_of(row * stride + head, 128 // ptr.dtype.element_ty.primitive_bitwidth)


@triton.jit
def edge_columns(offs_v, head, n_body):
    """Columns 0, ..., head - 1 and those after the body, fewer than 32 in all that a row has."""
    return tl.where(offs_v < head, offs_v, offs_v + n_body)


@triton.jit
def body_end(n_body, ALIGNED: tl.constexpr):
    """n_body; that it is a multiple of 16 is told to the compiler: a mask by it then leaves 16-byte loads and stores whole."""
    return n_body // 16 * 16 if ALIGNED else n_body


# The logit transform of one row, z = k * u with k > 0: `transformed` makes u, and the kernels form z - m as fma(u, k, -m).
#   without a softcap: u = x + bias,                              k = logit_scale / temperature
#   with one:          u = tanh((x + bias) * logit_scale / cap),  k = cap / temperature
@triton.jit
def row_scales(k, slope_scale, row_temperature_ptr, row, dtype: tl.constexpr):
    """k and logit_scale / temperature of this row; a scalar temperature has been divided by on the host."""
    k = tl.full((), k, dtype)
    slope_scale = tl.full((), slope_scale, dtype)
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
        k = divide(k, temperature)
        slope_scale = divide(slope_scale, temperature)
    return k, slope_scale


@triton.jit
def transformed(x, bias, keep, before_tanh, HAS_SOFTCAP: tl.constexpr):
    """u of the logits x, and tanh's slope there (1 without a softcap). `bias`, `keep`: at the same columns, or None.

    A logit of -inf stays -inf under a softcap: it means "not in the vocabulary", not "minus the cap".
    """
    if bias is not None:
        x += bias
    if keep is not None:
        x = tl.where(keep != 0, x, MINUS_INF)
    slope = 1.0
    if HAS_SOFTCAP:
        y, slope = tanh_and_slope(x * tl.full((), before_tanh, x.dtype))
        x = tl.where(x == MINUS_INF, MINUS_INF, y)
    return x, slope


@triton.jit
def whole_block(
    x_ptr,  # the row's column 0
    bias_ptr,  # column 0, or None
    keep_ptr,  # the row's column 0, or None
    col,
    before_tanh,
    HAS_SOFTCAP: tl.constexpr,
    KEEP_STRIDE_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr,
    dtype: tl.constexpr,
):
    """`transformed` of the columns col, ..., col + BLOCK_V - 1, all of which are there: a mask would cut 16-byte loads into single
    elements."""
    offs_v = col + tl.arange(0, BLOCK_V)
    if ALIGNED and x_ptr.dtype.element_ty == tl.bfloat16 and BLOCK_V > 1:
        # Two bf16 are the halves of a word shifted into place; one by one they cost an extraction more.
        word = tl.load(x_ptr.to(tl.pointer_type(tl.uint32)) + (col // 2 + tl.arange(0, BLOCK_V // 2)))
        x = tl.join(word << 16, word & 0xFFFF0000).reshape((BLOCK_V,)).to(tl.float32, bitcast=True)
    else:
        x = tl.load(x_ptr + offs_v).to(dtype)
    bias = None if bias_ptr is None else tl.load(bias_ptr + offs_v)
    keep = None if keep_ptr is None else tl.load(keep_ptr + offs_v * KEEP_STRIDE_V)
    return transformed(x, bias, keep, before_tanh, HAS_SOFTCAP)


@triton.jit
def at_columns(
    x_ptr,
    bias_ptr,
    keep_ptr,
    offs_v,
    mask_v,
    before_tanh,
    HAS_SOFTCAP: tl.constexpr,
    KEEP_STRIDE_V: tl.constexpr,
    dtype: tl.constexpr,
):
    """`transformed` of the columns offs_v; where mask_v does not hold nothing is read and u is -inf, which counts as 0."""
    x = tl.load(x_ptr + offs_v, mask=mask_v, other=MINUS_INF).to(dtype)
    bias = None if bias_ptr is None else tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
    keep = None if keep_ptr is None else tl.load(keep_ptr + offs_v * KEEP_STRIDE_V, mask=mask_v, other=0)
    return transformed(x, bias, keep, before_tanh, HAS_SOFTCAP)

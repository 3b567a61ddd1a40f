"""Strange values for every kind of argument, and what the refusal of one must say."""

import numpy as np
import torch

ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, FileNotFoundError)
INF, NAN = float("inf"), float("nan")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def one_at(x, value):
    """x with the value at an entry that is neither the first nor the last."""
    x = x.clone()
    x[tuple(size // 2 for size in x.shape)] = value
    return x


def strange_floats(x):
    """[name, value] for a float tensor shaped like `x`: of other types, shapes, devices, layouts and magnitudes."""
    yield "NaN", one_at(x, NAN)
    yield "inf", one_at(x, INF)
    yield "-inf", one_at(x, -INF)
    yield "all NaN", x * NAN
    yield "all -inf", torch.full_like(x, -INF)
    yield "huge", x * 1e30
    yield "largest", torch.full_like(x, torch.finfo(torch.float32).max)
    yield "denormal", x * 1e-41
    yield "zeros", torch.zeros_like(x)
    yield "constant", torch.ones(()).expand(x.shape)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield str(dtype), x.to(dtype)
    yield "strided", torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if x.ndim == 2:
        yield "transposed", x.t().contiguous().t()
    yield "grad", x.clone().requires_grad_()
    yield "parameter", torch.nn.Parameter(x)


def strange_tensors(x):
    """[name, value] that no tensor argument can take for `x`."""
    yield "int64", x.long()
    yield "complex", x.to(torch.complex64)
    yield "meta", x.to("meta")
    yield "sparse", x.to_sparse()
    yield "a row less", x[:-1]
    yield "a dimension more", x[None]
    yield "a dimension less", x[0]
    yield "empty", x[:0]
    yield "float8", x.to(torch.float8_e4m3fn)
    yield "list", x.tolist()
    yield "numpy", x.numpy()
    yield "None", None
    yield "a word", "logits"
    yield "quantized", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


STRANGE_NUMBERS = [
    ("NaN", NAN), ("inf", INF), ("-inf", -INF), ("zero", 0.0), ("negative", -1.0), ("tiny", 1e-300), ("huge", 1e300), ("bool", True),
    ("a word", "1.0"), ("None", None), ("complex", 1j), ("list", [1.0]), ("int", 2), ("numpy", np.float32(2.0)), ("object", object()),
    ("big int", 10**400),
    ("a tensor of two", torch.ones(2)), ("int tensor", torch.tensor(2)),
]  # fmt: skip
STRANGE_WORDS = [
    None,
    "",
    "nonsense",
    3,
    0.5,
    b"cpp",
    ["cpp"],
    ("logps",),
    object(),
    True,
    "torch",
    "cpp",
    "cuda",
    "triton",
]
STRANGE_INTS = [-1, 0, 1, 10**30, 2**62, 1.5, True, NAN, None, "100", [100], torch.tensor(4), np.int64(1 << 20)]


def complaints(what, error, names):
    """What is wrong with a refusal: it must be of a caller's kind, short, and name one of the arguments."""
    text = str(error)
    if not isinstance(error, ERRORS):
        yield f"{what}: {type(error).__name__}: {text[:200]}"
    elif not any(name in text for name in names):
        yield f"{what}: the message names no argument: {text[:200]}"
    elif len(text) > 400:
        yield f"{what}: a message of {len(text)} characters"

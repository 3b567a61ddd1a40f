"""For tests of this package and of code built on it: inputs that can expose a bug, and one way to judge a result.

A result is judged against what plain torch loses at the same job in the same dtype, both measured from fp64: no
tolerance to choose, and none to loosen. `tests/test_reference.py` holds mutants that the judgement must reject.

    >>> logits = make_logits("trained", 8, 100)
    >>> exact = logits.double().log_softmax(-1)
    >>> assert_within_reference_error(logits.log_softmax(-1), logits.log_softmax(-1), exact)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entropy_po import pages

SCALES = ("fresh", "trained", "hostile")


def make_logits(
    scale: str, n: int, v: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
) -> Tensor:
    """Logits [n, v] on the CPU.

    Args:
        scale: "fresh", a new model: small and flat. "trained": one entry of each row towers, p > 0.999. "hostile": a
            common offset of +1e4 on even and -1e4 on odd rows, leading entries of -inf, and every third row flat.
        dtype: rounded to it at the end (1e4 is exact to 64 in bf16, to 8 in fp16: rows tie there, as they do in models).
    """
    x = torch.randn(n, v, generator=generator)
    if scale == "fresh":
        x *= 0.3
    elif scale == "trained":
        x *= 3
        x.scatter_(1, torch.randint(v, (n, 1), generator=generator), 40.0)
    elif scale == "hostile":
        x = 3 * x
        x[::3] = 0.5
        x[::2] += 1e4
        x[1::2] -= 1e4
        x[:, : (v - 1) // 4] = -torch.inf
    else:
        raise ValueError(f"scale={scale!r} is not one of {SCALES}.")
    return x.to(dtype)


def make_labels(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Labels [n] for logits [n, v]: half the rows at the largest logit, half at any entry that is not -inf."""
    if len(logits) == 0:
        return torch.empty(0, dtype=torch.int64)
    live = (logits > -torch.inf).float()
    anywhere = torch.multinomial(live, 1, generator=generator)[:, 0]
    return torch.where(torch.rand(len(logits), generator=generator) < 0.5, logits.float().argmax(-1), anywhere)


def make_head(
    scale: str,
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [n, d], an lm_head weight [v, d] and labels [n] whose logits have the scale asked for.

    "hostile" here is a direction that all weights and all hidden states share: logits near 1e3 with a common offset.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not one of {SCALES}.")
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) * (0.02 if scale == "fresh" else d**-0.5)
    labels = torch.randint(v, (n,), generator=generator)
    if scale == "trained" and n:
        towering = weight[labels]
        hidden = hidden + 40 * towering / towering.square().sum(-1, keepdim=True).clamp_min(1e-6)
    if scale == "hostile" and d:
        hidden[:, 0], weight[:, 0] = 32.0, 32.0
    if n:
        elsewhere = torch.randint(v, (n,), generator=generator)
        labels = torch.where(torch.rand(n, generator=generator) < 0.5, labels, elsewhere)
    return hidden.to(dtype), weight.to(dtype), labels


def assert_within_reference_error(
    ours: Tensor,
    torch_same_dtype: Tensor,
    exact: Tensor,
    factor: float = 2.0,
    *,
    unit: float = 0.0,
    name: str = "result",
) -> None:
    """Raise unless `ours` is about as near to `exact` as `torch_same_dtype` is.

    Two errors are compared, `factor` times torch's plus one rounding unit of `ours.dtype`: the worst element's, relative
    to max(|exact|, root mean square of exact, unit), and the norm's, relative to the norm of exact (or of `unit` in
    every element, if that is larger). Shapes, infinities and NaNs must match first.

    Args:
        ours, torch_same_dtype: the same result from the code under test and from plain torch, both in the dtype of the
            job.
        exact: fp64.
        factor: how much worse than torch is still no worse.
        unit: magnitude of the terms whose difference a result is, where that is more than the result: 1 for nats, the
            upstream gradient for d loss / d logits.
        name: begins the message.

    Raises:
        AssertionError: with both errors of both, and the coordinates of the worst element.
    """
    if not ours.shape == torch_same_dtype.shape == exact.shape:
        shapes = tuple(ours.shape), tuple(torch_same_dtype.shape), tuple(exact.shape)
        raise AssertionError(f"{name}: shapes of ours, torch and exact are {shapes}")
    if exact.dtype != torch.float64:
        raise AssertionError(f"{name}: exact is {exact.dtype}, not float64")
    if exact.numel() == 0:
        return
    bits = torch.finfo(ours.dtype).eps
    mine, theirs, exact = ours.detach().double(), torch_same_dtype.detach().double(), exact.detach()
    for kind, where in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = where(mine) != where(exact)
        if differ.any():
            raise AssertionError(f"{name}: {kind} out of place at {differ.nonzero()[:4].tolist()}")
    finite = exact.isfinite()
    mine, theirs, truth = (x.masked_fill(~finite, 0) for x in (mine, theirs, exact))
    theirs = torch.where(theirs.isfinite(), theirs, truth)  # an infinity of torch's own earns no allowance
    count = max(int(finite.sum()), 1)
    rms = (truth.square().sum() / count).sqrt()
    scale = truth.abs().clamp_min(max(rms.item(), unit, 1e-300))
    whole = max(truth.norm().item(), unit * count**0.5, 1e-300)
    worst_mine, worst_theirs = ((x - truth).abs() / scale for x in (mine, theirs))
    norm_mine, norm_theirs = ((x - truth).norm().item() / whole for x in (mine, theirs))
    at = int(worst_mine.argmax())
    element = worst_mine.flatten()[at].item() > factor * worst_theirs.max().item() + bits
    norm = norm_mine > factor * norm_theirs + bits
    if element or norm:
        place = [int(i) for i in torch.unravel_index(torch.tensor(at), exact.shape)]
        raise AssertionError(
            f"{name}: worst element {worst_mine.max().item():.3g} at {place} (torch {worst_theirs.max().item():.3g}; "
            f"ours {mine.flatten()[at].item():.9g}, exact {truth.flatten()[at].item():.9g}), "
            f"norm {norm_mine:.3g} (torch {norm_theirs:.3g}), allowed {factor} times torch's + {bits:.2g}"
        )


def allocations(call: Callable[[], object]) -> tuple[int, int]:
    """(peak, largest) bytes that torch's CPU allocator hands out during `call`, beside what was alive before it.

    Tensors made inside a registered operator count; a TorchDispatchMode would not see them.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with pages.from_torch(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak, largest = max(peak, alive), max(largest, event.nbytes())
    return peak, largest

"""The operators in fp64 from their definitions alone, and the one way tests compare with them."""

import torch


def transformed(logits, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, keep_mask=None):
    """z in fp64 (docs: Transform); differentiable."""
    x = logits.double()
    if bias is not None:
        x = x + bias.double()
    masked = x == -torch.inf
    z = x.masked_fill(masked, 0) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if torch.is_tensor(temperature):
        temperature = temperature.double()[:, None]
    z = z / temperature
    if keep_mask is not None:
        masked = masked | ~keep_mask
    return z.masked_fill(masked, -torch.inf)


def stats(logits, labels, ignore_index=-100, **transform):
    """(logps, entropy, lse, is_top1, mean_logit, log_sum_sq_probs) of [N, V] logits, fp64."""
    z = transformed(logits, **transform)
    ignored = labels == ignore_index
    lse = torch.logsumexp(z, -1)
    log_p = z - lse[:, None]
    p = log_p.exp()
    live = z > -torch.inf
    safe = torch.where(live, log_p, 0.0)
    picked = log_p.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    z_label = z.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    values = (
        picked,
        -(p * safe).sum(-1),
        lse,
        z_label >= z.amax(-1),
        torch.where(live, z, 0.0).sum(-1) / live.sum(-1),
        p.pow(2).sum(-1).log(),
    )
    return tuple(v.masked_fill(ignored, 0) for v in values)


def relative_error(ours, exact):
    """Relative error in norm. Infinities and NaNs must stand in the same places."""
    ours, exact = ours.detach().double(), exact.detach().double()
    special = ~exact.isfinite()
    assert torch.equal(ours[special].nan_to_num(7e77), exact[special].nan_to_num(7e77)), "infinities or NaNs differ"
    ours, exact = ours[~special], exact[~special]
    return ((ours - exact).norm() / exact.norm().clamp_min(1e-30)).item()


# What one call may lose against fp64: (relative norm, worst element) of a gradient, by the dtype it is returned in.
GRADIENT_BOUND = {
    torch.float64: (1e-10, 1e-6),  # the oracle rounds too: logits of 1e4, and p = 1 - 1e-9
    torch.float32: (1e-5, 1e-3),
    # a tile, its sum, what is held of it and its product with the upstream are each rounded to 8 bits: where one entry holds
    # the norm, as in a gradient of the bias, all four may be at their worst
    torch.bfloat16: (4 * 2**-9, 0.1),
    torch.float16: (1e-3, 0.02),
}


def assert_gradient(ours, exact, upstream=0.0, slack=1):
    """Within GRADIENT_BOUND of `exact`. `upstream` is the norm of the upstream gradients: a row whose label has
    p = 1 - 1e-9 has a gradient below what fp32 keeps of s = 1 + 1e-9, a rounding unit of the upstream (fp64: likewise)."""
    norm, worst = GRADIENT_BOUND[ours.dtype]
    assert ours.shape == exact.shape
    arithmetic = torch.float64 if ours.dtype == torch.float64 else torch.float32
    floor = 64 * torch.finfo(arithmetic).eps * float(upstream)  # logits of 50, in ours and in the oracle
    error = (ours.detach().double() - exact).norm().item()
    assert error <= slack * (norm * exact.norm().item() + floor)
    if exact.numel():
        scale = exact.abs().clamp_min(exact.pow(2).mean().sqrt().item())
        excess = (ours.detach().double() - exact).abs() - slack * (worst * scale + floor)
        assert excess.max().item() <= 0


def assert_stats(ours, exact, bound):
    """Every output that was asked for within `bound` nats; infinities in place; flags equal."""
    for name, value, truth in zip(ours._fields, ours, exact, strict=True):
        if value is None:
            continue
        if value.dtype == torch.bool:
            assert torch.equal(value, truth), name
            continue
        finite = truth.isfinite()
        assert torch.equal(value.double()[~finite], truth[~finite]), name
        # lse and mean_logit carry the magnitude of the logits themselves: that of the largest, which is the lse's
        scale = exact[2][finite].abs().clamp_min(1.0) if name in ("lse", "mean_logit") else 1.0
        error = ((value.double() - truth)[finite].abs() / scale).max().item() if finite.any() else 0.0
        # of 2 log s and log q, each of the bound
        limit = 2 * bound if name == "log_sum_sq_probs" else bound
        assert error <= limit, f"{name}: {error:.2e} > {limit:.0e}"


def logits_of(kind, n, v):
    """fresh: a new model. trained: one entry towers. hostile: a common offset, masked entries, equal logits."""
    x = torch.randn(n, v)
    if kind == "fresh":
        return 0.3 * x
    if kind == "trained":
        x = 3 * x
        if n:
            x[torch.arange(n), torch.randint(v, (n,))] += 25
        return x
    x = 3 * x + 1e4
    if v > 8:
        x[:, : v // 4] = -torch.inf
        x[::3, v // 4 :] = 1e4
    return x


def labels_for(logits):
    """Half at the largest logit, half anywhere that is live."""
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64)
    live = (logits > -torch.inf).float()
    anywhere = torch.multinomial(live, 1)[:, 0]
    return torch.where(torch.rand(len(logits)) < 0.5, logits.argmax(-1), anywhere)

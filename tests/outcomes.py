"""Finite outcome spaces to try an objective on, and how near a result must be."""

import torch

ROUNDING = 1e-12  # relative, of a few fp64 operations on numbers up to ~1e3


def randn(gen, *shape):
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def toy(gen, size):
    """rewards and normalised ref log-probs of a finite outcome space, partly correlated as after SFT."""
    rewards = randn(gen, size)
    return rewards, torch.log_softmax(randn(gen, size) + 0.5 * rewards, dim=0)


def assert_close(ours, truth, relative=ROUNDING):
    ours, truth = torch.as_tensor(ours), torch.as_tensor(truth)
    assert ours.shape == truth.shape
    assert torch.equal(ours.isfinite(), truth.isfinite())
    live = truth.isfinite()
    worst = ((ours - truth)[live].abs() / truth[live].abs().clamp(min=1.0)).max()
    assert worst <= relative, f"worst error {worst:.3g} > {relative:.3g}"

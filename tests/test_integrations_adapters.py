"""What verl and OpenRLHF call, by their published signatures, against fp64."""

import inspect

import pytest
import torch

from entropy_po.integrations import openrlhf, verl

# verl 0.9.1: utils/kernel/linear_cross_entropy.py (forward, without ctx), utils/torch_functional.py;
# OpenRLHF 0.11.2: models/utils.py.
EMPTY = inspect.Parameter.empty
SIGNATURES = {
    verl.linear_cross_entropy: {
        "hidden": EMPTY, "weight": EMPTY, "labels": EMPTY, "temperature": 1.0, "reduction": "none", "dist_process_group": None
    },
    verl.logprobs_from_logits: {"logits": EMPTY, "labels": EMPTY, "inplace_backward": True},
    verl.entropy_from_logits: {"logits": EMPTY},
    verl.entropy_from_logits_with_chunking: {"logits": EMPTY, "chunk_size": 2048},
    openrlhf.log_probs_from_logits: {"logits": EMPTY, "labels": EMPTY, "temperature": 1.0},
    openrlhf.compute_entropy: {"logits": EMPTY},
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures_are_the_published_ones(function):
    parameters = inspect.signature(function).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == SIGNATURES[function]


def truth_of(logits, labels, temperature=1.0):
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def assert_close(ours, truth, tolerance=1e-5):
    assert torch.linalg.norm(ours.double() - truth) <= tolerance * torch.linalg.norm(truth)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verl_linear_cross_entropy(reduction, dtype, operator_calls):
    hidden, weight = torch.randn(2, 7, 24), torch.randn(301, 24) / 3
    labels = torch.randint(301, (2, 7))
    ours = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    logps, entropy = verl.linear_cross_entropy(*ours, labels, 0.7, reduction)
    assert operator_calls == {"linear_token_stats": 1}
    true_logps, true_entropy = (x.flatten() for x in truth_of(exact[0] @ exact[1].t(), labels, 0.7))
    if reduction != "none":
        true_logps = getattr(true_logps, reduction)()
    assert logps.shape == true_logps.shape and entropy.shape == (14,) and logps.dtype == torch.float32
    assert_close(logps, true_logps)
    assert_close(entropy, true_entropy)
    (logps.sum() - 0.3 * entropy.sum()).backward()
    (true_logps.sum() - 0.3 * true_entropy.sum()).backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert_close(mine.grad, theirs.grad, 1e-5 if dtype == torch.float32 else 1e-2)


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match=r"reduction='batchmean' is unknown; choose one of none, sum, mean"):
        verl.linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]), 1.0, "batchmean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_helpers_on_logits(dtype):
    logits, labels = (3 * torch.randn(2, 5, 97)).to(dtype), torch.randint(97, (2, 5))
    cases = [
        (lambda z: verl.logprobs_from_logits(z, labels, inplace_backward=False), 0, 1.0),
        (lambda z: verl.logprobs_from_logits(z, labels), 0, 1.0),
        (verl.entropy_from_logits, 1, 1.0),
        (lambda z: verl.entropy_from_logits_with_chunking(z.flatten(0, 1), 2).view(2, 5), 1, 1.0),
        (lambda z: openrlhf.log_probs_from_logits(z, labels, 0.7), 0, 0.7),
        (openrlhf.compute_entropy, 1, 1.0),
    ]
    weights = torch.randn(2, 5)
    for function, which, temperature in cases:
        mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        ours, truth = function(mine * 1), truth_of(exact, labels, temperature)[which]
        assert ours.dtype == torch.float32
        assert_close(ours, truth)
        (ours * weights).sum().backward()
        (truth * weights).sum().backward()
        assert_close(mine.grad, exact.grad, 1e-5 if dtype == torch.float32 else 1e-2)

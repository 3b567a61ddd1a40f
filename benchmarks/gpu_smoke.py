"""Whether a backend's kernels launch at all on this device, and are right: `python -m benchmarks.gpu_smoke triton`, or cuda.

Seconds, before minutes are spent on it: every operator once, forward and backward, against plain torch's.
"""

from __future__ import annotations

import sys

import torch

from entropy_po import EntropyObjective, linear_preference_loss, linear_token_stats, token_stats

N, D, V = 66, 64, 5003
OFFSETS = torch.tensor([0, 20, 33, 50, N])


def results(operator: str, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of one call, of the same inputs for every backend."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(N, V)] if operator == "token_stats" else [(N, D), (V, D)]
    inputs = [torch.randn(x, generator=generator, device="cuda").to(dtype).requires_grad_() for x in shapes]
    labels = torch.randint(V, (N,), generator=generator, device="cuda")
    labels[::7] = -100
    if operator == "linear_preference_loss":
        objective = EntropyObjective.qempo(lam=100.0)
        outputs = [linear_preference_loss(*inputs, labels, OFFSETS, objective=objective, backend=backend).loss]
    else:
        outputs = [
            *(token_stats if operator == "token_stats" else linear_token_stats)(*inputs, labels, backend=backend)[:2]
        ]
    gradients = torch.autograd.grad([x.sum() for x in outputs], inputs)
    return [*(x.detach() for x in outputs), *gradients]


def main(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for operator in ("token_stats", "linear_token_stats", "linear_preference_loss"):
            ours, plain = (results(operator, name, dtype) for name in (backend, "torch"))
            apart = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(ours, plain, strict=True)]
            worst = torch.stack(apart).max().item()  # Python's max passes over a NaN
            print(f"{backend} {operator} {dtype}: {worst:.1e} from torch", flush=True)
            if not worst < (1e-5 if dtype == torch.float32 else 1e-2):
                raise SystemExit(f"{backend}: {operator} of {dtype} is wrong")


if __name__ == "__main__":
    main(*sys.argv[1:])

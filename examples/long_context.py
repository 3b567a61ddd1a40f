"""Peak memory of one long pair's H-DPO loss, forward and backward, with eager logits and without: each in its own process.

python examples/long_context.py --tokens 16384
"""

import argparse
import subprocess
import sys

import torch

from entropy_po import EntropyObjective, linear_preference_loss
from entropy_po.memory import held_bytes, peak_bytes, reset_peak

OBJECTIVE = EntropyObjective.hdpo(beta=0.1, alpha=0.9)


def with_logits(hidden, weight, labels, ref_logps):
    logps = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels[:, None]).view(2, -1).sum(-1)
    return OBJECTIVE.pair_loss(OBJECTIVE.margin(*logps, *ref_logps[0]))


def without(hidden, weight, labels, ref_logps):
    offsets = torch.tensor([0, len(labels) // 2, len(labels)])
    return linear_preference_loss(hidden, weight, labels, offsets, objective=OBJECTIVE, ref_logps=ref_logps).loss


def measure(function, tokens, dim, vocab):
    """(loss, MiB beside hidden states, weight and their gradients)."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(tokens, dim, device=device, requires_grad=True)
    weight = (torch.randn(vocab, dim, device=device) / dim**0.5).requires_grad_()
    labels, ref_logps = torch.randint(vocab, (tokens,), device=device), torch.zeros(1, 2, device=device)
    function(hidden[:64], weight, labels[:64], ref_logps).backward()  # libraries are loaded, gradients there
    hidden.grad.zero_(), weight.grad.zero_()
    reset_peak()
    before = held_bytes()
    loss = function(hidden, weight, labels, ref_logps)
    loss.backward()
    return loss.item(), (peak_bytes() - before) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("dim", 576), ("vocab", 49152)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("with_logits", "without"), help="measure one of them, in this process")
    args = parser.parse_args()
    if args.only:
        loss, mib = measure(globals()[args.only], args.tokens, args.dim, args.vocab)
        print(f"{args.only:12} loss {loss:.6f}, peak {mib:8.0f} MiB beside inputs and gradients", flush=True)
    else:
        for name in ("with_logits", "without"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)

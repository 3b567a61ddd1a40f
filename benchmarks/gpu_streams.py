"""Whether two streams pay on the hidden path: `python -m benchmarks.gpu_streams`, on a CUDA device.

The library takes one tile after the other: product, fold, grad, two products. With two tiles, each half as high in the same
memory, the fold and grad of one (bound by bandwidth) could run beside the products of the other (bound by arithmetic), where
those leave a multiprocessor anything to run them with. This times both, by the library's own steps, and prints the ratio.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from entropy_po.bench.timing import ratio, time_interleaved
from entropy_po.ops import schema
from entropy_po.ops.lm_head import LmHead
from entropy_po.plan import slices
from entropy_po.tiles import available_backends
from entropy_po.types import Transform

SHAPES = [(8192, 4096, 151_936), (4096, 4096, 131_072), (8192, 1024, 151_936)]  # tokens, hidden size, words
WORKSPACE = 1 << 30


def products(heads: list[LmHead], beside: list, tile_rows: int, grad_hidden: Tensor, grad_weight: Tensor) -> None:
    """Logits, and the gradients of the sum of all log-probs, tile by tile; each of `heads` has a tile, and on CUDA a stream, the
    current one or one of `beside`."""
    first = heads[0]
    cuda, cols = first.hidden.is_cuda, slice(0, first.vocab_size)
    streams = [torch.cuda.current_stream(), *beside] if cuda else []
    added = None  # to grad_weight, which one product at a time may add to
    for stream in streams[1:]:
        stream.wait_stream(streams[0])
    for i, rows in enumerate(slices(0, first.num_kept, tile_rows)):
        head, n = heads[i % len(heads)], rows.stop - rows.start
        with torch.cuda.stream(streams[i % len(heads)]) if cuda else nullcontext():
            hidden, weight = head.hidden_rows(rows), head.weight_rows(cols)
            tile = head.logits(hidden, weight, head.tile(n, head.vocab_size))
            state = head.state(n)
            head.fold_(tile, rows, cols, state)
            gradient = head.grad_(tile, rows, cols, state, torch.ones_like(state[0]), None)
            head.add_product(grad_hidden[rows], gradient, weight, True)
            if added is not None:
                added.wait()
            head.add_product(grad_weight, gradient.t(), hidden, i == 0)
            if cuda:
                added = torch.cuda.Event()
                added.record()
    for stream in streams[1:]:
        streams[0].wait_stream(stream)


def runs(n: int, d: int, v: int, device: str, backend: str, workspace: int = WORKSPACE) -> dict[str, partial]:
    """What is compared, each with its own sums, and streams that are kept: memory and a library's workspace belong to one."""
    hidden = torch.randn(n, d, device=device).bfloat16()
    weight = (torch.randn(v, d, device=device) / d**0.5).bfloat16()
    labels = torch.randint(v, (n,), device=device)
    options = schema.flat_options(Transform(), -100, ("logps",), backend, None)
    made = {}
    for name, count in (("one stream", 1), ("two streams", 2)):
        heads = [LmHead(hidden, weight, None, labels, options) for _ in range(count)]
        sums = torch.empty(n, d, device=device, dtype=torch.bfloat16), torch.empty(v, d, device=device)
        beside = [torch.cuda.Stream() for _ in heads[1:]] if hidden.is_cuda else []
        made[name] = partial(products, heads, beside, max(workspace // (4 * v * count) // 128 * 128, 1), *sums)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    backend = available_backends()["cuda"][0]
    for n, d, v in SHAPES:
        one, two = time_interleaved(runs(n, d, v, "cuda", backend), rounds).values()
        print(f"{backend}, {n} x {d} x {v}: two streams take {ratio(two, one):.3f} times the time of one", flush=True)


if __name__ == "__main__":
    main()

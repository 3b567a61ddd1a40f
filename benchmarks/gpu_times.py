"""Times and memory on a CUDA device, against floors measured in the same run: `python -m benchmarks.gpu_times`.

Logits path: share of the device's copy bandwidth. Hidden path and preference loss: multiples of the bare matrix products of
the same shape. Every time stands beside the largest error against fp64 on some rows. Peers that cannot be imported or run
are listed with their own error. Writes benchmarks/results/<device>/gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.floors import fold_bytes, grad_bytes
from benchmarks.harness import RESULTS, machine
from benchmarks.peers import eager_stats, exact_stats, trl_logps_and_entropy
from entropy_po import EntropyObjective, available_backends, linear_preference_loss, linear_token_stats, token_stats

BACKENDS = [name for name in available_backends()["cuda"] if name != "torch"]
GIB = 1 << 30


def milliseconds(run: Callable[[], object], rounds: int = 7) -> float:
    """Median of single calls, by the device's own clock."""
    run()
    run()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def peak_gib(run: Callable[[], object]) -> float:
    """Memory above what is held now."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def tried(run: Callable[[], dict]) -> dict:
    """The row, or why there is none."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    finally:
        torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and write counted."""
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source)) * 1e-3)


# ---- logits path


def logits_path(bandwidth: float, quick: bool) -> list[dict]:
    shapes = [(8192, 151_936, torch.bfloat16), (4096, 131_072, torch.bfloat16), (4096, 151_936, torch.float32)]
    if not quick:
        shapes.append((16_384, 248_320, torch.bfloat16))
    rows = []
    for n, vocab, dtype in shapes:
        for kind, scale in (("flat", 0.3), ("peaked", 4.0)):
            logits = torch.empty(n, vocab, dtype=dtype, device="cuda").normal_(std=scale)
            labels = torch.randint(vocab, (n,), device="cuda")
            case = f"[{n}, {vocab}] {str(dtype)[6:]} {kind}"
            candidates: dict[str, Callable] = {
                f"entropy_po {backend}": lambda x, y, b=backend: token_stats(x, y, backend=b)[:2]
                for backend in BACKENDS
            }
            if kind == "flat" and n <= 8192:
                torch._dynamo.reset()
                candidates |= {"eager": eager_stats, "torch.compile": torch.compile(eager_stats, dynamic=False)}
                candidates["TRL"] = trl_logits
            for name, function in candidates.items():
                row = tried(lambda f=function, x=logits, y=labels: logits_row(f, x, y, bandwidth))
                rows.append({"case": case, "who": name, **row})
    return rows


def trl_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, labels)


def logits_row(function: Callable, logits: Tensor, labels: Tensor, bandwidth: float) -> dict:
    some = slice(0, 64)
    exact = exact_stats(logits[some], labels[some])
    ours = function(logits, labels)
    error = max((a[some].double() - b).abs().max().item() for a, b in zip(ours, exact, strict=True))
    del ours
    forward = milliseconds(lambda: function(logits, labels))
    leaf = logits.requires_grad_()
    upstream = [torch.full((len(logits),), 1e-3, device="cuda")] * 2
    outputs = function(leaf, labels)
    backward = milliseconds(lambda: torch.autograd.grad(outputs, leaf, upstream, retain_graph=True))
    leaf.requires_grad_(False)
    size = logits.itemsize
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_share": fold_bytes(*logits.shape, size) / (forward * 1e-3) / bandwidth,
        "backward_share": grad_bytes(*logits.shape, size, size) / (backward * 1e-3) / bandwidth,
        "error_nats": error,
    }


# ---- hidden path


def products_ms(n: int, d: int, vocab: int) -> dict[str, float]:
    """The bare products of 8192 rows (bf16, bf16 results), scaled to n rows."""
    rows = min(n, 8192)
    hidden, weight = (torch.randn(k, d, device="cuda", dtype=torch.bfloat16) for k in (rows, vocab))
    tile = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(tile)
    times = {
        "logits": milliseconds(lambda: torch.mm(hidden, weight.t(), out=out)),
        "dH": milliseconds(lambda: torch.mm(tile, weight)),
        "dW": milliseconds(lambda: torch.mm(tile.t(), hidden)),
    }
    return {name: ms * n / rows for name, ms in times.items()}


def hidden_path(quick: bool) -> list[dict]:
    shapes = [(8192, 4096, 151_936), (4096, 4096, 131_072)]
    if not quick:
        shapes += [(16_384, 2048, 248_320), (32_768, 4096, 151_936), (131_072, 4096, 151_936)]
    objective, rows = EntropyObjective.hdpo(beta=0.1, alpha=1.1), []
    for n, d, vocab in shapes:
        floor = products_ms(n, d, vocab)
        torch.cuda.empty_cache()
        hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = (torch.randn(vocab, d, device="cuda") * 0.02).to(torch.bfloat16)
        labels = torch.randint(vocab, (n,), device="cuda")
        cu_seqlens, ref = torch.tensor([0, n // 2, n]), torch.full((1, 2), -n * 5.5, device="cuda")
        upstream = [torch.full((n,), 1e-3, device="cuda")] * 2
        for trained in (True, False):
            weight.requires_grad_(trained)
            inputs = (hidden, weight) if trained else (hidden,)

            def by_stats(function, inputs=inputs, hidden=hidden, weight=weight, labels=labels, upstream=upstream):
                torch.autograd.grad(function(hidden, weight, labels), inputs, upstream)

            candidates: dict[str, tuple[Callable, int]] = {}
            for backend in BACKENDS:
                candidates[f"linear_token_stats, {backend}"] = (
                    lambda b=backend: by_stats(lambda h, w, y: linear_token_stats(h, w, y, backend=b)[:2]), 4
                )  # fmt: skip
                candidates[f"linear_preference_loss, {backend}"] = (
                    lambda b=backend, inputs=inputs, h=hidden, w=weight, y=labels, cu=cu_seqlens, r=ref: torch.autograd.grad(
                        linear_preference_loss(h, w, y, cu, objective=objective, ref_logps=r, backend=b).loss, inputs
                    ), 3,
                )  # fmt: skip
            if n <= 16_384:
                candidates["TRL"] = (lambda: by_stats(trl_logps_and_entropy()), 4)
                candidates["eager"] = (lambda: by_stats(lambda h, w, y: eager_stats(h @ w.t(), y)), 3)
            if trained and n <= 16_384:
                candidates["Liger FLCE"] = (lambda h=hidden, w=weight, y=labels: liger_loss(h, w, y), 3)
                candidates["cut-cross-entropy"] = (lambda h=hidden, w=weight, y=labels: cce_loss(h, w, y), 4)
            for name, (run, products) in candidates.items():
                total = floor["logits"] * (products - 2) + floor["dH"] + floor["dW"]
                total -= 0 if trained else floor["dW"]

                def row(run=run, total=total) -> dict:
                    ms = milliseconds(run, rounds=5)
                    return {"ms": ms, "floor_ms": total, "times_products": ms / total, "peak_gib": peak_gib(run)}

                case = f"N {n}, D {d}, V {vocab}, {'trained' if trained else 'frozen'} head"
                count = products if trained else products - 1
                rows.append({"case": case, "who": name, "products": count, **tried(row)})
    return rows


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    torch.autograd.grad(LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels), (hidden, weight))


def cce_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    from cut_cross_entropy import linear_cross_entropy

    torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))


# ---- report


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    lines = ["| case | who | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        if "error" in row:
            cells = [row["error"], *[""] * (len(columns) - 1)]
        else:
            cells = [form.format(row[key]) for key, form in columns.items()]
        lines.append(f"| {row['case']} | {row['who']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_times", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smaller shapes only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    logits = logits_path(bandwidth, arguments.quick)
    hidden = hidden_path(arguments.quick)
    command = "python -m benchmarks.gpu_times" + (" --quick" if arguments.quick else "")
    report = {"command": command, "device": device, "copy_bandwidth": bandwidth, "machine": machine(), "logits": logits,
              "hidden": hidden}  # fmt: skip
    lines = [
        f"# {device}",
        "",
        f"`{command}`, torch {torch.__version__}; device copy {bandwidth / 1e12:.2f} TB/s. Medians.",
        "",
        "Logits path: share of the copy bandwidth (wanted: forward 0.88, backward 0.85), largest error in nats.",
        "",
        *table(logits, {"forward_ms": "{:.3f}", "forward_share": "{:.2f}", "backward_ms": "{:.3f}",
                        "backward_share": "{:.2f}", "error_nats": "{:.1e}"}),
        "",
        "Hidden path, bf16, forward and backward: multiples of the bare products (wanted: 1.12), peak GiB beside the inputs.",
        "",
        *table(hidden, {"ms": "{:.1f}", "products": "{}", "times_products": "{:.2f}", "peak_gib": "{:.2f}"}),
    ]  # fmt: skip
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

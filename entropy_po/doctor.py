"""`entropy-po doctor`: what an issue report needs, on one screen."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from entropy_po import __version__, tiles

RELATED = (
    "triton", "transformers", "accelerate", "peft", "datasets", "trl", "liger-kernel", "cut-cross-entropy", "numpy",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Which backend serves which device, what the build contains, and the versions around it.

    Returns:
        A dict of plain values: `backends` (device -> usable backends, the one in use first), `override` (what
        ENTROPY_PO_BACKEND put first, or None), `unavailable` (backend -> reason), `cpu` (instruction sets, the one in use
        first, and threads), `build` (with the CUDA architectures compiled in, or why none), `cuda`, `versions`.

    Example:
        >>> describe()["backends"]["cpu"][-1]
        'torch'
    """
    core = tiles.compiled_core()
    override = tiles.backend_override()
    reasons = {b.value: tiles.unavailable_reason(b) for b in tiles.Backend}
    return {
        "entropy_po": __version__,
        "backends": tiles.available_backends(),
        "override": override.value if override else None,
        "unavailable": {name: reason for name, reason in reasons.items() if reason},
        "cpu": {
            "processor": _processor(),
            "instruction_sets": core.cpu_isas() if core else [],
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "native_bf16_products": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        },
        "build": core.build_info() if core else None,
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in RELATED},
        },
        "platform": platform.platform(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="entropy-po doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args(argv)
    report = describe()
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"entropy_po {report['entropy_po']} on {report['platform']}, Python {report['versions']['python']}")
    for device, backends in report["backends"].items():
        in_use = backends[0] if device != "cuda" or report["cuda"] else "no device here"
        print(f"  {device:5} {in_use}" + (f"  (also {', '.join(backends[1:])})" if len(backends) > 1 else ""))
    if report["override"]:
        print(f"  {tiles.OVERRIDE}={report['override']} puts that one first where it serves")
    for backend, reason in report["unavailable"].items():
        print(f"  {backend}: not available: {reason}")
    cpu = report["cpu"]
    print(f"  CPU {cpu['processor']}, {cpu['cores']} cores, {cpu['threads']} threads in use")
    if cpu["instruction_sets"]:
        first, *others = cpu["instruction_sets"]
        print(f"  instruction set {first}" + (f"  (also compiled: {', '.join(others)})" if others else ""))
    print(f"  bf16 products {'on bf16 hardware' if cpu['native_bf16_products'] else 'through fp32'}")
    if report["build"]:
        build = report["build"]
        print(f"  built by {build['compiler']} with {build['flags']}" + ("" if build["openmp"] else ", no OpenMP"))
        print(f"  CUDA kernels for {build['cuda']}" if build["cuda"] else f"  no CUDA kernels: {build['no_cuda']}")
    print(f"  GPUs {', '.join(report['cuda']) or 'none'}")
    installed = {k: v for k, v in report["versions"].items() if v and k != "python"}
    print("  " + ", ".join(f"{name} {version}" for name, version in installed.items()))
    missing = [k for k, v in report["versions"].items() if not v]
    print(f"  not installed: {', '.join(missing) or 'nothing'}")
    return 0

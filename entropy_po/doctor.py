"""`entropy-po doctor`: all that an issue report needs, on one screen, with a check of every backend against fp64."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_po import __version__, dispatch, reference, tiles
from entropy_po.ops import gemm
from entropy_po.ops.linear_token_stats import linear_token_stats
from entropy_po.ops.token_stats import token_stats
from entropy_po.tiles import BackendName
from entropy_po.types import TokenStats, Transform

RELATED = (
    "triton", "transformers", "accelerate", "peft", "datasets", "trl", "liger-kernel", "cut-cross-entropy", "numpy",
)  # fmt: skip
# What the kernels and the products behind them choose by, as /proc/cpuinfo names it.
FEATURES = {
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16",
}  # fmt: skip
# Variables that change which code runs, on how many threads, or which libraries are found.
VARIABLES = re.compile(
    r"(ENTROPY_PO|OMP|GOMP|KMP|MKL|DNNL|ONEDNN|OPENBLAS|ATEN|C10|TORCH\w*|PYTORCH|TRITON|CUDA|NVIDIA|NCCL|HIP|ROCR|HSA"
    r"|MALLOC|GLIBC)_\w+|LD_PRELOAD|LD_LIBRARY_PATH|PYTHONPATH"
)
OPENMP_LIBRARY = re.compile(r"\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*")
# Bounds of the check: nats, and for a gradient parts of its largest element. Plain torch is 1e-6 from fp64 on these inputs,
# 4e-3 where bf16 rounds the gradient; a wrong label, mask or sum is off by 1e-2 nat or more.
BOUND, BF16_GRADIENT_BOUND = 1e-4, 2e-2


def describe() -> dict[str, Any]:
    """Which backend serves which device, what the build contains, and what is around it. Does not raise.

    Returns:
        A dict of plain values: `install` (kind, path, commit or wheel tag), `backends` (device -> usable backends, the one
        in use first), `dispatch` (architecture -> rule where a tile's shape decides between Triton and CUDA C++: the number
        of rows up to which CUDA C++ goes first, None for any), `override` (what ENTROPY_PO_BACKEND names, or None),
        `unavailable` (backend -> reason), `problems` (what this installation could not answer, and why), `cpu` (instruction sets, the one in use first; threads; the
        OpenMP runtimes in the process, where the system tells; bytes of memory; of which operands the compiled core makes the
        products), `build` (with the CUDA architectures
        compiled in, or why none), `gpu` (torch's CUDA or HIP, the driver, the devices), `versions`, `platform`,
        `environment` (the variables set here that change what runs).

    Example:
        >>> describe()["backends"]["cpu"][-1]
        'torch'
    """
    problems: list[str] = []

    def ask(question: Callable[[], Any], default: Any = None) -> Any:
        """The answer; where a broken installation cannot give one, the default, and the error among the problems."""
        try:
            return question()
        except Exception as error:  # whatever it is, the rest of the report is needed all the more
            if (text := _one_line(error)) not in problems:
                problems.append(text)
            return default

    core = ask(tiles.compiled_core)
    reasons = {b.value: ask(partial(tiles.unavailable_reason, b), "see problems") for b in tiles.Backend}
    return {
        "entropy_po": __version__,
        "install": ask(_install, {}),
        "backends": ask(tiles.available_backends, {}),
        "dispatch": ask(_dispatch, {}),
        "override": os.environ.get(tiles.OVERRIDE) or None,
        "unavailable": {name: reason for name, reason in reasons.items() if reason},
        "cpu": {
            "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
            "features": [f for f in (_cpuinfo("flags") or _cpuinfo("Features") or "").split() if f in FEATURES],
            "instruction_sets": ask(core.cpu_isas, []) if core else [],
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "openmp": _openmp_runtimes(),
            "memory": _memory(),
            "native_bf16_products": ask(lambda: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), False),
            "compiled_products": ask(_compiled_products, []),
        },
        "build": ask(core.build_info) if core else None,
        "gpu": ask(_gpu, {"devices": []}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in RELATED},
        },
        "platform": platform.platform(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if VARIABLES.fullmatch(name)},
        "problems": problems,
    }


def self_check() -> list[dict[str, Any]]:
    """Forward and backward of the operators, on every usable backend of every device here, against fp64. Does not raise.

    `token_stats` on fp32 logits checks the kernels, `linear_token_stats` on bf16 operands the matrix products as well.

    Returns:
        One dict for each (device, backend, operator) with these keys, `logps` and `entropy` (largest error, nats),
        `gradient` (largest error, parts of the largest element) and `ok`; or `error` in place of the numbers.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = 4099  # odd, so that every instruction set has a remainder to do
    hidden = torch.randn(64, 96, generator=generator).bfloat16()
    weight = 0.3 * torch.randn(vocab, 96, generator=generator).bfloat16()
    labels = torch.randint(vocab, (64,), generator=generator)
    labels[::7] = -100

    def head(x: Tensor, y: Tensor, backend: BackendName) -> TokenStats:
        return linear_token_stats(x, weight.to(x.device), y, backend=backend)

    def exact(logits: Tensor, y: Tensor) -> TokenStats:
        return reference.token_stats(logits, y, Transform())

    def exact_head(x: Tensor, y: Tensor) -> TokenStats:
        return exact(x @ weight.double().t(), y)

    cases = (
        ("token_stats", token_stats, exact, (hidden @ weight.t()).float(), BOUND),
        ("linear_token_stats", head, exact_head, hidden, BF16_GRADIENT_BOUND),
    )
    checks = []
    for name, operator, truth, x, gradient_bound in cases:
        true = _with_gradient(truth, x.double(), labels)
        for device in (d for d in tiles.BACKENDS_BY_DEVICE if d == "cpu" or torch.get_device_module(d).is_available()):
            for backend in (b.value for b in tiles.BACKENDS_BY_DEVICE[device]):
                check: dict[str, Any] = {"device": device, "backend": backend, "operator": name}
                try:
                    if tiles.unavailable_reason(tiles.Backend(backend)):
                        continue
                    got = _with_gradient(partial(operator, backend=backend), x.to(device), labels.to(device))
                    logps, entropy, gradient = (
                        (value.double().cpu() - t).abs().max().item() for value, t in zip(got, true, strict=True)
                    )
                    gradient /= true[2].abs().max().item()
                    ok = logps <= BOUND and entropy <= BOUND and gradient <= gradient_bound  # False for a NaN
                    check |= {"logps": logps, "entropy": entropy, "gradient": gradient, "ok": ok}
                except Exception as error:
                    check |= {"ok": False, "error": _one_line(error)}
                checks.append(check)
    return checks


def _with_gradient(function: Callable[[Tensor, Tensor], TokenStats], x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    stats = function(x, labels)
    (gradient,) = torch.autograd.grad(stats.logps.sum() - 0.5 * stats.entropy.sum(), x)
    return stats.logps.detach(), stats.entropy.detach(), gradient


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _install() -> dict[str, str | None]:
    """How this package came to be imported: the wheel it was installed from, or the tree and its commit."""
    package = Path(__file__).resolve().parent
    facts: dict[str, str | None] = {"kind": "source tree", "path": str(package)}
    origin = {}
    try:
        found = importlib.metadata.distribution("entropy_po")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is not None:
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if Path(str(found.locate_file("entropy_po"))).resolve() == package and (wheel := found.read_text("WHEEL")):
            facts["kind"] = "wheel"
            facts["tag"] = ", ".join(re.findall(r"^Tag: (\S+)", wheel, re.MULTILINE))
            facts["commit"] = origin.get("vcs_info", {}).get("commit_id")
            return facts
    if origin.get("dir_info", {}).get("editable") and origin.get("url") == package.parent.as_uri():
        facts["kind"] = "editable"
    git = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        facts["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        facts["commit"] = None
    return facts


def _cpuinfo(name: str) -> str | None:
    """The first processor's line of that name; None where the system has none."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.partition(":")[0].strip() == name)
    except (OSError, StopIteration):
        return None


def _openmp_runtimes() -> list[str] | None:
    """The OpenMP libraries in this process; two of them mean two thread pools. None where the system does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return sorted(set(OPENMP_LIBRARY.findall(maps)))


def _compiled_products() -> list[str]:
    """Of which operands the compiled core makes the hidden path's products on this CPU."""
    made = {"bf16": gemm.compiled_bf16, "fp32": gemm.compiled_fp32}
    return [name for name, is_compiled in made.items() if is_compiled()]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _dispatch() -> dict[str, dispatch.Rule]:
    """By the architectures of the GPUs here; where there is none, the default rule."""
    if not tiles.chosen_by_tile("cuda"):
        return {}
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {arch: dispatch.rule(arch) for arch in [dispatch.architecture(device) for device in devices] or ["default"]}


def _gpu() -> dict[str, Any]:
    driver = Path("/proc/driver/nvidia/version")
    return {
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "devices": [
            {"type": "cuda", "name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        + [
            {"type": "xpu", "name": p.name, "capability": f"driver {p.driver_version}", "memory": p.total_memory}
            for p in map(torch.xpu.get_device_properties, range(torch.xpu.device_count()))
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Print the report; exit status 1 if the installation has a problem or a backend fails its check."""
    parser = argparse.ArgumentParser(prog="entropy-po doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args(argv)
    checks = self_check()  # first: it loads what `describe` then finds in the process
    report = {**describe(), "self_check": checks}
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(_lines(report)))
    return int(bool(report["problems"]) or not all(check["ok"] for check in checks))


def _lines(report: dict[str, Any]) -> list[str]:
    install, cpu, build, gpu = report["install"], report["cpu"], report["build"], report["gpu"]
    lines = [f"entropy_po {report['entropy_po']} on {report['platform']}, Python {report['versions']['python']}"]
    origin = [install.get("tag"), install.get("commit") and f"commit {install['commit']}"]
    lines.append("  ".join(["  installed as", *filter(None, [install.get("kind"), *origin]), install.get("path", "?")]))
    lines += [f"  PROBLEM {problem}" for problem in report["problems"]]
    present = ["cpu", *(d["type"] for d in gpu["devices"])]
    for device, backends in report["backends"].items():
        in_use = backends[0] if device in present else "no device here"
        lines.append(f"  {device:5} {in_use}" + (f"  (also {', '.join(backends[1:])})" if len(backends) > 1 else ""))
    for arch, rule in report["dispatch"].items() if "cuda" in present else ():
        for most in dict.fromkeys(rule.values()):
            tiles_of = ", ".join(entry for entry, rows in rule.items() if rows == most)
            where = "any number of" if most is None else f"up to {most}"
            lines.append(f"  tiles on {arch} of {where} rows, cuda before triton: {tiles_of}")
    if report["override"] and report["backends"]:
        lines.append(f"  {tiles.OVERRIDE}={report['override']} puts that one first where it serves")
    lines += [f"  {backend}: not available: {reason}" for backend, reason in report["unavailable"].items()]
    lines += [f"  check {_check_line(check)}" for check in report["self_check"]]

    memory = f", {cpu['memory'] / 2**30:.1f} GiB" if cpu["memory"] else ""
    cores = f"{cpu['usable_cores']} of {cpu['cores']}" if cpu["usable_cores"] != cpu["cores"] else cpu["cores"]
    lines.append(f"  CPU {cpu['processor']}, {cores} cores, {cpu['threads']} threads in use{memory}")
    if cpu["features"]:
        lines.append(f"  features {' '.join(cpu['features'])}")
    if cpu["instruction_sets"]:
        first, *others = cpu["instruction_sets"]
        lines.append(f"  instruction set {first}" + (f"  (also compiled: {', '.join(others)})" if others else ""))
    compiled = " and ".join(cpu["compiled_products"])
    lines.append(f"  bf16 products {'on bf16 hardware' if cpu['native_bf16_products'] else 'through fp32'}")
    lines.append(
        f"  compiled core's own products {f'of {compiled} operands' if compiled else 'unused: the matrix library is'}"
    )
    if cpu["openmp"] is not None:
        several = ": more than one, each with threads of its own" if len(cpu["openmp"]) > 1 else ""
        lines.append(f"  OpenMP runtime {', '.join(cpu['openmp']) or 'none'}{several}")
    if build:
        lines.append(
            f"  built by {build['compiler']} with {build['flags']}" + ("" if build["openmp"] else ", no OpenMP")
        )
        lines.append(
            f"  CUDA kernels for {build['cuda']}" if build["cuda"] else f"  no CUDA kernels: {build['no_cuda']}"
        )
    devices = [f"{d['name']} ({d['capability']}, {d['memory'] / 2**30:.0f} GiB)" for d in gpu["devices"]]
    platforms = [f"{name} {gpu[key]}" for key, name in (("torch_cuda", "CUDA"), ("torch_hip", "HIP")) if gpu.get(key)]
    lines.append(f"  GPUs {', '.join(devices) or 'none'}; torch built for {', '.join(['CPU', *platforms])}")
    if gpu.get("driver"):
        lines.append(f"  {gpu['driver']}")
    installed = {k: v for k, v in report["versions"].items() if v and k != "python"}
    lines.append("  " + ", ".join(f"{name} {version}" for name, version in installed.items()))
    missing = [k for k, v in report["versions"].items() if not v]
    lines.append(f"  not installed: {', '.join(missing) or 'nothing'}")
    lines += [f"  {name}={value}" for name, value in report["environment"].items()]
    return lines


def _check_line(check: dict[str, Any]) -> str:
    name = f"{check['device']} {check['backend']} {check['operator']}"
    if "error" in check:
        return f"{name}: FAILED: {check['error']}"
    errors = f"log-probs {check['logps']:.0e} nat, entropy {check['entropy']:.0e} nat, gradient {check['gradient']:.0e}"
    return f"{name}: {'ok' if check['ok'] else 'WRONG'}: {errors} from fp64"


if __name__ == "__main__":
    sys.exit(main())

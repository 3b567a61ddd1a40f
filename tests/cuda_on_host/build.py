"""The compiled core with csrc/cuda running on the CPU: compiled with g++ against the header beside this file."""

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = ["tile_cuda", "tile_float32", "tile_bfloat16", "tile_float16", "tile_float64"]
CPU = ["bindings", "gemm", "tile_cpu_baseline", "tile_cpu_x86_v3", "tile_cpu_x86_v4"]  # they are linked, not run
# nvcc contracts a product and a sum into an fma wherever it finds them; where the source needs the product rounded it says so.
CONTRACTED = ["-ffp-contract=fast", "-mfma"] if torch.cpu._is_avx2_supported() else ["-ffp-contract=off"]
CUDA_FLAGS = ["-O2", *CONTRACTED, "-x", "c++", f"-I{Path(__file__).parent}"]
CUDA_FLAGS += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
CUDA_FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]


def build(folder: Path, csrc: Path = ROOT / "csrc") -> ModuleType:
    """The module, made in `folder`."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    macros = ['-DENTROPY_PO_CUDA_ARCHS="a CPU"', '-DENTROPY_PO_BUILD_FLAGS=""']

    def compile_one(source: tuple[str, list[str]]) -> str:
        name, flags = source
        out = str(folder / f"{Path(name).name}.o")
        command = [
            "g++",
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            *flags,
            "-c",
            str(csrc / name),
            "-o",
            out,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:8000]
        return out

    sources = [(f"{stem}.cpp", ["-O0", "-fopenmp", *include, *macros]) for stem in CPU]
    sources += [(f"cuda/{stem}.cu", CUDA_FLAGS) for stem in CUDA]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    path = folder / "_C.so"
    subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-o", str(path)], check=True)
    name = f"{folder.name}_{id(path)}._C"  # its own: pybind11 hands out a module it has seen again, by name
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module

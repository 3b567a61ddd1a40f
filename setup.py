"""Builds the compiled core `entropy_po._C`. All metadata is in pyproject.toml.

The core is compiled against nothing but pybind11: raw pointers cross the boundary, so one build serves every torch.
Each instruction set is one translation unit that sets its own target; the flags here are the platform's baseline.
Without a working compiler the install still succeeds and the package runs on plain torch, saying so at first use.

The CUDA kernels come with it where nvcc is found (in CUDA_HOME if that is set, else on PATH). Their runtime is linked
statically: the module imports where there is no driver. ENTROPY_PO_CUDA=1 makes it an error if they cannot be built,
=0 leaves them out.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

# No loop may become a memcpy call: gcc expands one of unknown size to `rep movs`, slow at the 4 KiB of a block.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"]
# Nor may gcc 12 split a loop at a comparison inside it: what is left has control flow and is not vectorised.
FLAGS += ["-fno-tree-loop-distribute-patterns", "-fno-split-loops"]
# Apple's clang ships no OpenMP runtime; there the kernels run on one thread.
OPENMP = [] if sys.platform in ("darwin", "win32") else ["-fopenmp"]
if sys.platform == "win32":
    FLAGS = ["/O2"]

CUDA_SOURCES = ["tile_bfloat16", "tile_cuda", "tile_float16", "tile_float32", "tile_float64"]
# Machine code serves later chips of the same major version; the PTX of the last serves those of later ones.
CUDA_ARCHS = [80, 90, 100]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def nvcc_targets(nvcc: str) -> tuple[list[str], str]:
    """The -gencode flags for what this nvcc can compile, and their names; none for an old one."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = {int(n) for n in re.findall(r"sm_(\d+)\b", listed)}
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(arch, f"compute_{arch}") for arch in archs[-1:]]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets], " ".join(
        code for _, code in targets
    )


def static_runtime(nvcc: str) -> Path | None:
    """The static CUDA runtime that this nvcc itself would link."""
    plan = subprocess.run([nvcc, "--dryrun", "x.o"], capture_output=True, text=True).stderr
    folders = re.findall(r'-L"?([^"\s]+)"?', plan)
    return next((path for folder in folders if (path := Path(folder, "libcudart_static.a")).exists()), None)


def digest_of_cuda(nvcc: str, flags: list[str]) -> str:
    version = subprocess.run([nvcc, "--version"], capture_output=True).stdout
    digest = hashlib.sha256(version + repr((NVCC_FLAGS, flags)).encode())
    for path in sorted(Path("csrc").rglob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class BuildWithCuda(build_ext):
    def build_extension(self, ext) -> None:
        wanted = os.environ.get("ENTROPY_PO_CUDA", "")
        ext.optional = wanted != "1"  # asked for, it is made or an error
        reason = "ENTROPY_PO_CUDA=0" if wanted == "0" else self.add_cuda(ext)
        if reason:
            if wanted == "1":
                raise CompileError(f"ENTROPY_PO_CUDA=1, but {reason}")
            ext.define_macros.append(("ENTROPY_PO_NO_CUDA", f'"{reason}"'))
        print(f"entropy_po: CUDA kernels {'left out: ' + reason if reason else 'built'}")
        super().build_extension(ext)

    def add_cuda(self, ext) -> str | None:
        """Compile the CUDA kernels and hand them to the extension; or the reason why there will be none."""
        nvcc = find_nvcc()
        if nvcc is None or sys.platform == "win32":
            return "nvcc was not found"
        flags, names = nvcc_targets(nvcc)
        runtime = static_runtime(nvcc)
        if not flags or runtime is None:
            return f"{nvcc} is too old" if not flags else f"{nvcc} has no libcudart_static.a"
        # Minutes of work that knows no Python: the objects lie under the digest of all that they are made from, and the
        # wheels of several interpreters share them.
        folder = Path("build", "cuda", digest_of_cuda(nvcc, flags))
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(stem: str) -> subprocess.CompletedProcess:
            made, unfinished = folder / f"{stem}.o", folder / f"{stem}.unfinished.o"
            command = [nvcc, *NVCC_FLAGS, *flags, "-c", f"csrc/cuda/{stem}.cu", "-o", str(unfinished)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode == 0:
                unfinished.replace(made)
            return run

        missing = [stem for stem in CUDA_SOURCES if not (folder / f"{stem}.o").exists()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = list(pool.map(compile_one, missing))
        print(*(run.stdout + run.stderr for run in runs), sep="")
        if any(run.returncode for run in runs):
            return "nvcc failed"
        ext.extra_objects += [str(folder / f"{stem}.o") for stem in CUDA_SOURCES]
        ext.extra_objects.append(str(runtime))
        ext.libraries += ["dl", "rt", "pthread"]
        ext.define_macros.append(("ENTROPY_PO_CUDA_ARCHS", f'"{names}"'))
        return None


core = Pybind11Extension(
    "entropy_po._C",
    sources=[
        "csrc/bindings.cpp",
        "csrc/gemm.cpp",
        "csrc/tile_cpu_baseline.cpp",
        "csrc/tile_cpu_x86_v3.cpp",
        "csrc/tile_cpu_x86_v4.cpp",
    ],
    depends=[str(path) for path in Path("csrc").rglob("*.*")],
    define_macros=[("ENTROPY_PO_BUILD_FLAGS", '"' + " ".join(FLAGS + OPENMP) + '"')],
    extra_compile_args=FLAGS + OPENMP,
    extra_link_args=OPENMP,
    cxx_std=17,
)

with ParallelCompile(default=0):
    setup(ext_modules=[core], cmdclass={"build_ext": BuildWithCuda})

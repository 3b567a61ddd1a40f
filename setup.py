"""Builds the compiled core `entropy_po._C`. All metadata is in pyproject.toml.

The core is compiled against nothing but pybind11: raw pointers cross the boundary, so one build serves every torch.
Each instruction set is one translation unit that sets its own target; the flags here are the platform's baseline.
Without a working compiler the install still succeeds and the package runs on plain torch, saying so at first use.
"""

import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# No loop may become a memcpy call: gcc expands one of unknown size to `rep movs`, slow at the 4 KiB of a block.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"]
# Nor may gcc 12 split a loop at a comparison inside it: what is left has control flow and is not vectorised.
FLAGS += ["-fno-tree-loop-distribute-patterns", "-fno-split-loops"]
# Apple's clang ships no OpenMP runtime; there the kernels run on one thread.
OPENMP = [] if sys.platform in ("darwin", "win32") else ["-fopenmp"]
if sys.platform == "win32":
    FLAGS = ["/O2"]

core = Pybind11Extension(
    "entropy_po._C",
    sources=[
        "csrc/bindings.cpp",
        "csrc/gemm_bf16.cpp",
        "csrc/tile_cpu_baseline.cpp",
        "csrc/tile_cpu_x86_v3.cpp",
        "csrc/tile_cpu_x86_v4.cpp",
    ],
    depends=["csrc/gemm_bf16.h", "csrc/half.h", "csrc/tile.h", "csrc/tile_args.h", "csrc/tile_cpu.h", "csrc/tile_cpu_impl.h"],
    define_macros=[("ENTROPY_PO_BUILD_FLAGS", '"' + " ".join(FLAGS + OPENMP) + '"')],
    extra_compile_args=FLAGS + OPENMP,
    extra_link_args=OPENMP,
    cxx_std=17,
)
core.optional = True

with ParallelCompile(default=0):
    setup(ext_modules=[core], cmdclass={"build_ext": build_ext})

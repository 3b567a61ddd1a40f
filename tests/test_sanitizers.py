"""The compiled CPU kernels under the tools that see what a right result hides: reads past an end, races, undefined values."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from entropy_po import tiles

HERE = Path(__file__).resolve().parent / "sanitizers"
CSRC = HERE.parent.parent / "csrc"
CORE = tiles.compiled_core()
KERNELS = ["gemm_bf16", "tile_cpu_baseline", "tile_cpu_x86_v3", "tile_cpu_x86_v4"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CORE is None or platform.system() != "Linux", reason="needs gcc on Linux"),
]


def build(folder, compile_flags=(), link_flags=("-fopenmp",), more=()):
    """The program of kernels_main.cpp with the kernels compiled as the package compiles them, and `compile_flags`."""
    flags = ["-std=c++17", "-g", f"-I{CSRC}", *CORE.build_info()["flags"].split(), *compile_flags]

    def compile_one(source):
        out = folder / f"{source.stem}.o"
        done = subprocess.run(["g++", *flags, "-c", source, "-o", out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    sources = [CSRC / f"{name}.cpp" for name in KERNELS] + [HERE / f"{name}.cpp" for name in ("kernels_main", *more)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "kernels"
    subprocess.run(["g++", *objects, *compile_flags, *link_flags, "-o", program], check=True)
    return program


def run(program, seed, cases, prefix=(), **environment):
    done = subprocess.run(
        [*prefix, program, str(seed), str(cases)],
        capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.startswith(f"{cases} rounds of "), done.stdout
    return done


def test_addresses_and_undefined_behaviour(tmp_path, seed):
    program = build(tmp_path, ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    run(program, seed, 400)


def test_threads(tmp_path, seed):
    program = build(tmp_path, ["-fsanitize=thread"], ["-pthread"], ["openmp_on_threads"])
    run(program, seed, 60, TSAN_OPTIONS="halt_on_error=1")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The kernels as they are shipped."""
    return build(tmp_path_factory.mktemp("kernels"))


def test_twenty_thousand_tiles(program, seed):
    """Five pairs of dtypes and a product per round and instruction set."""
    found = run(program, seed, 1400).stdout
    isas = int(found.split()[3])
    assert 1400 * 5 * isas >= 20_000 or isas < 3, found


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_values_never_written(program, seed):
    """valgrind has no AVX-512: it runs the other levels, and sees a branch on memory that nobody wrote."""
    run(program, seed, 8, ["valgrind", "--error-exitcode=9", "--quiet"])

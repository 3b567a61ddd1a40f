"""The compiled CPU kernels under the tools that see what a right result hides: reads past an end, races, undefined values."""

import json
import os
import platform
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from entropy_po import tiles

HERE = Path(__file__).resolve().parent / "sanitizers"
CSRC = HERE.parent.parent / "csrc"
CORE = tiles.compiled_core()
TILES = ("tile.h", "tile_cpu_impl.h", "half.h")
KERNELS = ["gemm", "tile_cpu_baseline", "tile_cpu_x86_v3", "tile_cpu_x86_v4"]

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


def test_every_line_runs_and_every_condition_goes_both_ways(tmp_path, seed):
    """By gcov, over all instantiations and instruction sets; of the products every line. What no generated case reaches, no
    sanitizer has seen."""
    # without OpenMP, which moves the loops to functions that gcov takes for the compiler's own
    program = build(tmp_path, ["-O0", "-fno-openmp", "--coverage"], ["--coverage"])
    run(program, seed, 60)
    done = subprocess.run(
        ["gcov", "--json-format", "--stdout", "--branch-probabilities", *map(str, tmp_path.glob("*.gcda"))],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines, branches = Counter(), Counter()
    for report in map(json.loads, done.stdout.splitlines()):
        for file in report["files"]:
            name = Path(file["file"]).name
            if Path(file["file"]).parent != CSRC:
                continue
            for line in file["lines"]:
                lines[name, line["line_number"]] += line["count"]
                if "switch (a.dtype)" in (CSRC / name).read_text().splitlines()[line["line_number"] - 1]:
                    continue  # to none of its cases: there are no other dtypes
                for i, branch in enumerate(line["branches"]):
                    if name in TILES and not branch["throw"]:
                        # inlining repeats a condition, with copies for constants that never hold: both ways, somewhere
                        branches[name, line["line_number"], i % 2] += branch["count"]
    assert {*TILES, "gemm.cpp"} <= {name for name, _ in lines}
    source = (CSRC / "gemm.cpp").read_text().splitlines()
    out_of_memory = {("gemm.cpp", i + d) for i, text in enumerate(source, 1) if "if (!own)" in text for d in (1, 2, 3)}
    missed = sorted(where for counted in (lines, branches) for where, count in counted.items() if not count)
    missed = [where for where in missed if where not in out_of_memory]
    assert not missed, "\n".join(map(str, missed))

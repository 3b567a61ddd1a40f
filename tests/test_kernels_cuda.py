"""The CUDA C++ kernels against the fp64 specification, and what nvcc makes of them.

Without a GPU the kernels, with their launches, run on the CPU (cuda_on_host). With one they run as they are, by the
same tests, which are then marked `gpu`. Registers and instructions are read from the built module by the disassembler that
Triton carries. `python tests/test_kernels_cuda.py` rewrites the committed table of them.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import assembly
import pytest
import torch
from cuda_on_host import build
from tile_contract import *  # noqa: F403
from tile_contract import DEVICE, functions, make_logits, randn, same_bits, truth_of

from entropy_po import tiles
from entropy_po.tiles import Backend
from entropy_po.types import IGNORED, Level, Transform, new_state, stats_from_state

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = ROOT / "csrc" / "cuda" / "resources.json"
ON_GPU = DEVICE == "cuda"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

built_with_cuda = pytest.mark.skipif(
    tiles.unavailable_reason(Backend.CUDA) is not None, reason=str(tiles.unavailable_reason(Backend.CUDA))
)
runs_on_host = pytest.mark.skipif(
    ON_GPU or shutil.which("g++") is None or importlib.util.find_spec("pybind11") is None,
    reason="the true kernels run here, or g++ or pybind11 is missing",
)


@pytest.fixture(scope="module")
def host_core(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("cuda_on_host"))


def use(core, monkeypatch):
    """Have the tile interface call this core, on CPU tensors."""
    monkeypatch.setattr(tiles, "compiled_core", lambda: core)
    monkeypatch.setattr(tiles, "_cuda_stream", lambda tile: (0, 0))
    return functions(Backend.CUDA)


@pytest.fixture
def kernels(request, monkeypatch):
    if not ON_GPU:
        if shutil.which("g++") is None or importlib.util.find_spec("pybind11") is None:
            pytest.skip("without a GPU, g++ and pybind11 are needed to run the kernels on the CPU")
        return use(request.getfixturevalue("host_core"), monkeypatch)
    if tiles.unavailable_reason(Backend.CUDA):
        pytest.skip(tiles.unavailable_reason(Backend.CUDA))
    return functions(Backend.CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_few_long_rows_are_split_over_blocks(kernels, gen, dtype):
    """3 rows of 30,001 columns on 132 multiprocessors; a part without a live entry, labels in the first and last."""
    n, v = 3, 30_001
    x = randn(gen, n, v + 3, dtype=dtype)[:, 3:] * 3  # rows at every alignment
    x[1, :9000] = -torch.inf
    labels = torch.tensor([2, 15_000, 30_000], device=DEVICE)
    g_logp, g_ent = randn(gen, 2, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    state = new_state(n, Level.EXTRAS, x)
    args = tiles._tile_args(x, labels, 0, state, Transform(), -100)
    assert tiles.compiled_core().cuda_fold_workspace(args, 0) >= n * 2 * 6 * 4
    kernels.fold_(x, labels, 0, state, Transform(), level=Level.EXTRAS)
    truth, truth_grad = truth_of(x, labels + 1000, Transform(), g_logp, g_ent)
    for name, ours in stats_from_state(state, truth._fields)._asdict().items():
        if ours.dtype == torch.bool:
            assert torch.equal(ours, truth.is_top1)
        else:
            assert ((ours.double() - getattr(truth, name)).abs() < 5e-6).all(), name
    before = x.clone()
    kernels.grad_(x, labels, 0, state, g_logp, g_ent, Transform())
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-6
    assert (x.double() - truth_grad).norm() <= bound * truth_grad.norm()
    again = new_state(n, Level.EXTRAS, x)
    kernels.fold_(before, labels, 0, again, Transform(), level=Level.EXTRAS)
    assert same_bits(state, again), "the parts were merged in another order"


@pytest.mark.parametrize("level", list(Level))
def test_split_and_whole_rows_agree_at_every_level(kernels, gen, level):
    n, v = 2, 20_000
    x, labels = randn(gen, n, v, dtype=torch.float32), torch.tensor([19_999, -100], device=DEVICE)
    states = []
    for workspace in (True, False):
        state = torch.full_like(new_state(n, level, x), torch.nan)
        args = tiles._tile_args(x, labels, 0, state, Transform(), -100)
        core = tiles.compiled_core()
        scratch = torch.full((core.cuda_fold_workspace(args, 0),), 255, dtype=torch.uint8, device=DEVICE)  # NaN
        core.cuda_fold(args, int(level), True, scratch.data_ptr() if workspace else 0, *tiles._cuda_stream(x))
        states.append(state)
    torch.testing.assert_close(*states, rtol=2e-6, atol=2e-6, equal_nan=True)
    for state in states:
        assert state[:, 1].tolist() == list(IGNORED[: len(state)]), "an ignored row was folded"
    assert level >= Level.ENTROPY or not states[0][2].any()


@pytest.mark.parametrize("shift", range(8))
def test_every_alignment_of_a_row_and_of_its_output(kernels, gen, shift):
    """Wide stores need the output at the same phase as the tile; where it is not, single elements are written."""
    for dtype in (torch.bfloat16, torch.float32):
        base, labels = make_logits(gen, dtype, v=1031, kinds=("wide",))
        n = base.shape[0]
        labels -= 1000
        g = randn(gen, n, dtype=torch.float32)
        state = new_state(n, Level.ENTROPY, base)
        kernels.fold_(base, labels, 0, state, Transform(), level=Level.ENTROPY)
        expected = torch.empty_like(base)
        kernels.grad_(base, labels, 0, state, g, g, Transform(), out=expected)
        frame = torch.full((n, 1031 + 16), 7.0, dtype=dtype, device=DEVICE)
        x = frame[:, shift : shift + 1031]
        x.copy_(base)
        other_state = new_state(n, Level.ENTROPY, base)
        kernels.fold_(x, labels, 0, other_state, Transform(), level=Level.ENTROPY)
        torch.testing.assert_close(other_state, state, rtol=2e-6, atol=2e-6)
        outs = [dtype] if dtype == torch.bfloat16 else [torch.float32, torch.bfloat16]
        for out_dtype in outs:
            out = torch.full((n, 1031 + 9), 7.0, dtype=out_dtype, device=DEVICE)
            kernels.grad_(x, labels, 0, state, g, g, Transform(), out=out[:, 1:-8])
            assert torch.equal(out[:, 1:-8], expected.to(out_dtype))
            assert (out[:, :1] == 7).all() and (out[:, -8:] == 7).all()


def test_the_tile_of_a_sequence_of_ignored_rows_is_not_read(kernels):
    x = torch.full((4, 500), torch.nan, device=DEVICE)
    labels = torch.full((4,), -100, device=DEVICE)
    state = new_state(4, Level.ENTROPY, x)
    kernels.fold_(x, labels, 0, state, Transform(), level=Level.ENTROPY)
    assert same_bits(state, new_state(4, Level.ENTROPY, x))


def test_messages(kernels):
    x, labels = torch.zeros(4, 6, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    state = new_state(4, Level.ENTROPY, x)
    with pytest.raises(ValueError, match="tile has strides"):
        kernels.fold_(x.t().contiguous().t(), labels, 0, state, Transform(), level=Level.ENTROPY)
    with pytest.raises(ValueError, match="out has strides"):
        kernels.grad_(x, labels, 0, state, None, None, Transform(), out=x.t().contiguous().t())
    with pytest.raises(ValueError, match="out dtype must be"):
        kernels.grad_(x, labels, 0, state, None, None, Transform(), out=x.half())


@runs_on_host
@pytest.mark.slow
@pytest.mark.parametrize(
    "barrier", ["  __syncthreads();\n  if (threadIdx.x >= kWarp) return;", "    if (kNarrows) __syncthreads();"]
)
def test_the_host_run_sees_a_missing_barrier(barrier, tmp_path, monkeypatch, gen):
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    header = source / "cuda" / "tile_cuda_impl.h"
    text = header.read_text()
    assert text.count(barrier) == 1
    header.write_text(text.replace(barrier, barrier.replace("__syncthreads();", "{}")))
    broken = use(build.build(tmp_path, source), monkeypatch)
    n, v = 4, 9000
    x, labels = randn(gen, n, v, dtype=torch.float32), torch.tensor([1, 2, 3, 4])
    state, expected = new_state(n, Level.ENTROPY, x), new_state(n, Level.ENTROPY, x)
    tiles.fold_(x, labels, 0, expected, Transform(), level=Level.ENTROPY, backend=Backend.CPP)
    broken.fold_(x, labels, 0, state, Transform(), level=Level.ENTROPY)
    g, wide = torch.ones(n), torch.empty_like(x)
    tiles.grad_(x, labels, 0, expected, g, g, Transform(), out=wide, backend=Backend.CPP)
    broken.grad_(x, labels, 0, expected, g, g, Transform(), out=tiles.bf16_overlay(x))
    folds = torch.allclose(state, expected, rtol=1e-4, atol=1e-4)
    narrows = torch.allclose(tiles.bf16_overlay(x).float(), wide, rtol=0.02, atol=1e-6)
    assert not (folds and narrows)


@pytest.mark.compiler
@built_with_cuda
def test_the_module_needs_no_cuda_library_to_be_loaded():
    assert b"libcudart.so" not in Path(tiles.compiled_core().__file__).read_bytes()


@built_with_cuda
@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_where_there_is_no_driver_a_call_says_so():
    x, labels = torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)
    args = tiles._tile_args(x, labels, 0, new_state(2, Level.ENTROPY, x), Transform(), -100)
    with pytest.raises(RuntimeError, match="CUDA: "):
        tiles.compiled_core().cuda_fold(args, 1, False, 0, 0, 0)


@pytest.mark.gpu
@built_with_cuda
def test_a_graph_captures_a_call_and_replays_it(gen):
    x, labels = make_logits(gen, torch.bfloat16, 4099, kinds=("wide",))
    labels -= 1000
    n = x.shape[0]
    g = randn(gen, n, dtype=torch.float32)
    eager = new_state(n, Level.ENTROPY, x)
    tiles.fold_(x, labels, 0, eager, Transform(), level=Level.ENTROPY, backend=Backend.CUDA)
    expected = torch.empty_like(x)
    tiles.grad_(x, labels, 0, eager, g, g, Transform(), out=expected, backend=Backend.CUDA)
    empty, state, out = new_state(n, Level.ENTROPY, x), new_state(n, Level.ENTROPY, x), torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.copy_(empty)
        tiles.fold_(x, labels, 0, state, Transform(), level=Level.ENTROPY, backend=Backend.CUDA)
        tiles.grad_(x, labels, 0, state, g, g, Transform(), out=out, backend=Backend.CUDA)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(state, eager) and same_bits(out, expected)


@pytest.mark.gpu
@built_with_cuda
def test_calls_run_on_the_current_stream_and_do_not_wait(gen):
    x, labels = randn(gen, 64, 50_000, dtype=torch.float32), torch.zeros(64, dtype=torch.int64, device=DEVICE)
    stream = torch.cuda.Stream()
    state = new_state(64, Level.ENTROPY, x)
    with torch.cuda.stream(stream):  # the first call loads the kernel, and takes memory for this stream
        tiles.fold_(x, labels, 0, state.clone(), Transform(), level=Level.ENTROPY, backend=Backend.CUDA)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # some 0.2 s of nothing before it on this stream
        tiles.fold_(x, labels, 0, state, Transform(), level=Level.ENTROPY, backend=Backend.CUDA)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert (state[1] >= 1).all()


# What nvcc made of the sources.

DTYPES = {"f": "float32", "d": "float64", "BFloat16": "bfloat16", "Float16": "float16"}
LEVELS = [level.name.lower() for level in Level]
FEW_NUMBERS = ("merge", "stats")  # kernels that read no logits
TOKEN = re.compile(r"NS0_(?:8(BFloat16)|7(Float16))E|S\w?_|([fd])|L[ib](\d)E")


def readable(mangled):
    """fold bfloat16 entropy plain, grad float32 into bfloat16 logp general, merge float16, stats float32."""
    kind, parameters = re.search(r"\d+(fold|grad|merge|stats)_kernelI(.*?)EvN?", mangled).groups()
    types, numbers = [], []
    for token in TOKEN.finditer(parameters):
        if token[4]:
            numbers.append(int(token[4]))
        else:
            types.append(DTYPES[token[1] or token[2] or token[3]] if token[0][0] != "S" else types[0])
    words = [kind, types[0]]
    if kind in ("merge", "stats"):
        return " ".join(words)
    if kind == "grad" and types[1] != types[0]:
        words += ["into", types[1]]
    words.append(LEVELS[numbers[0]] if kind == "fold" else ("logp", "both")[numbers[0]])
    return " ".join([*words, ("general", "plain")[numbers[1]]])


@cache
def resources():
    """{arch: {kernel: {registers, shared, spilled}}} of the built module."""
    report, arch, name = {}, None, None
    for line in assembly.cuobjdump("-res-usage", tiles.compiled_core().__file__).splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            arch = report.setdefault(found[1], {})
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            arch[readable(name)] = {"registers": registers, "shared": shared, "spilled": stack + local}
    return report


@cache
def listings(arch):
    """{kernel: [(address, instruction)]} of the built module."""
    kernels = {}
    for text in assembly.cuobjdump("-sass", "-arch", arch, tiles.compiled_core().__file__).split("Function : ")[1:]:
        kernels[readable(text.split("\n", 1)[0])] = assembly.listing(text)
    return kernels


# 16 bytes of logits: what comes from a bias is not marked first to be evicted
WIDE_LOAD = r"\bLDG\.E\.EF\.128"


ARCHS = re.findall(r"sm_\d+", (tiles.compiled_core().build_info()["cuda"] or "") if tiles.compiled_core() else "")


@pytest.mark.compiler
@built_with_cuda
def test_no_kernel_spills_and_two_blocks_fit_a_multiprocessor():
    report = resources()
    assert sorted(report) == sorted(ARCHS) and len(ARCHS) >= 1
    for arch, kernels in report.items():
        assert len(kernels) == 4 * (3 * 2 + 1) + 5 * 4 + 2, arch
        for name, made in kernels.items():
            assert made["spilled"] == 0, f"{name} on {arch} spills: {made}"
            lanes = {"merge": 32, "stats": 128}.get(name.split()[0], 256 if "float64" in name else 512)
            assert 2 * lanes * made["registers"] <= 65_536, f"{name} on {arch}: {made}"
            assert 2 * made["shared"] <= 163_840, f"{name} on {arch}: {made}"


def nvcc_release():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    return re.search(r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)[
        1
    ]


def table():
    made = {"nvcc": nvcc_release(), "kernels": {}}
    for arch, kernels in resources().items():
        code = listings(arch)
        for name, numbers in sorted(kernels.items()):
            loop = {} if name.startswith(FEW_NUMBERS) else {"hot_loop": len(assembly.hot_loop(code[name], WIDE_LOAD))}
            entry = {"registers": numbers["registers"], "shared": numbers["shared"], **loop}
            made["kernels"].setdefault(name, {})[arch] = entry
    return made


@pytest.mark.compiler
@built_with_cuda
def test_registers_and_instructions_are_no_more_than_committed():
    committed = json.loads(TABLE.read_text())
    if nvcc_release() != committed["nvcc"]:
        pytest.skip(f"the table is of nvcc {committed['nvcc']}, this is {nvcc_release()}")
    for name, archs in table()["kernels"].items():
        for arch, numbers in archs.items():
            for what, value in numbers.items():
                limit = committed["kernels"][name][arch][what]
                advice = "if that is meant, python tests/test_kernels_cuda.py writes a new table"
                assert value <= limit, f"{name} on {arch}: {what} {value}, committed {limit}; {advice}"


@pytest.mark.compiler
@built_with_cuda
@pytest.mark.parametrize("arch", ARCHS)
def test_hot_loops_have_several_16_byte_loads_on_their_way(arch):
    for name, listing in listings(arch).items():
        assert not any(re.search(r"\b(LDL|STL)\b", what) for _, what in listing), f"{name} uses local memory"
        if name.startswith(FEW_NUMBERS):
            continue
        loop, in_flight = assembly.hot_loop(listing, WIDE_LOAD), 4 if "plain" in name else 2
        first_use = next(i for i, what in enumerate(loop) if "FFMA" in what or "DFMA" in what or "FMNMX" in what)
        assert sum(re.search(WIDE_LOAD, what) is not None for what in loop[:first_use]) == in_flight, (
            f"{name}: fewer loads before their first use"
        )
        wide_store = r"\bSTG\.E\S*\.64" if "into" in name else r"\bSTG\.E\S*\.128"
        if name.startswith("grad"):
            assert any(re.search(wide_store, what) for what in loop), f"{name} stores single elements"
        if "float64" not in name:
            assert not any(re.search(r"\bD(ADD|MUL|FMA)\b", what) for what in loop), f"{name} computes in fp64"
        if "plain" in name and "float64" not in name:
            elements = 4 * (4 if "float32" in name.split()[1] else 8)
            assert sum("MUFU.EX2" in what for what in loop) >= elements, f"{name}: exp is not the hardware's"


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_source_compiles_for_every_target_without_a_warning(source, tmp_path):
    nvcc_release()
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC"]
    command += ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror", "-c", str(source), "-o", str(tmp_path / "x.o")]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    command += ["-gencode=arch=compute_100,code=compute_100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert set(spills) <= {("0", "0", "0")}
    assert spills


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")

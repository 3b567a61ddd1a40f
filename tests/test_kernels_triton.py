"""The Triton kernels against the fp64 specification, and compiled ahead of time for five GPUs.

Without a GPU the kernels run in Triton's interpreter, which must be asked for before Triton is first imported. With one
they run as they are, by the same tests.
"""

import importlib.machinery
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import assembly
import numpy as np
import pytest
import torch
from tile_contract import *  # noqa: F403
from tile_contract import (
    DEVICE,
    STATS,
    VOCAB_START,
    folded,
    functions,
    gradient,
    make_logits,
    make_transform,
    randn,
    relative_error_at_an_offset,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
COMPILES = __name__ == "__main__"  # run as a script, this file is the compiler of `compiled` below
INTERPRETED = not COMPILES and not torch.cuda.is_available()

with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if INTERPRETED else {}):
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from entropy_po import tiles
    from entropy_po.kernels import config, fold, grad, launch, stats
    from entropy_po.kernels.launch import LaunchConfig
    from entropy_po.types import Level, Transform, new_state, state_dtype

# Something in this process imported Triton to compile with it: then the whole file runs in a process of its own.
TOO_LATE = INTERPRETED and (isinstance(tl.sum, JITFunction) or isinstance(fold._fold_kernel, JITFunction))
SMALL = LaunchConfig(block_v=256, num_warps=1, num_stages=1)


# The interpreter computes NaN and inf with numpy, which mentions each.
pytestmark = [pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|overflow|divide by zero):RuntimeWarning")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def gpu_arithmetic(request, monkeypatch):
    """The interpreter rounds twice in an fma, truncates to bf16 and keeps a NaN in a maximum; GPUs do not. And what LLVM makes of
    a product that is added or subtracted, it makes here, too: an fma, also where a select lies between them."""
    if TOO_LATE and request.function.__name__ != "test_in_a_process_of_its_own":
        pytest.skip("Triton was imported to compile; test_in_a_process_of_its_own runs this test")
    if not INTERPRETED:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton asks again when it first calls a function
    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def wide(x):
        return x.data.astype("float64" if x.data.dtype == "float32" else "longdouble")

    def exact(x):
        return getattr(x, "product", None)

    def fma(self, x, y, z):
        return handle((wide(x) * wide(y) + wide(z)).astype(x.data.dtype), z.dtype.scalar)

    def multiply(self, x, y):
        made = self.binary_op(x, y, np.multiply)
        made.product = wide(x) * wide(y)
        return made

    def select(self, condition, x, y):
        made = self.ternary_op(condition, x, y, np.where)
        if exact(x) is not None or exact(y) is not None:
            made.product = np.where(condition.data, *(wide(z) if exact(z) is None else exact(z) for z in (x, y)))
        return made

    def contracted(operation):
        def apply(self, x, y):
            left, right = exact(x), exact(y) if exact(x) is None else None  # of two products one is fused
            if left is None and right is None:
                return self.binary_op(x, y, operation)
            made = operation(wide(x) if left is None else left, wide(y) if right is None else right)
            return handle(made.astype(x.data.dtype), x.dtype.scalar)

        return apply

    monkeypatch.setattr(interpreter, "_convert_float", rounded)

    def number(function):  # of a NaN and a number
        return lambda self, x, y: self.binary_op(x, y, function)

    monkeypatch.setattr(builder, "create_fma", fma)
    monkeypatch.setattr(builder, "create_maxnumf", number(np.fmax))
    monkeypatch.setattr(builder, "create_minnumf", number(np.fmin))
    monkeypatch.setattr(builder, "create_fmul", multiply)
    monkeypatch.setattr(builder, "create_select", select)
    monkeypatch.setattr(builder, "create_fadd", contracted(np.add))
    monkeypatch.setattr(builder, "create_fsub", contracted(np.subtract))


@pytest.mark.skipif(not TOO_LATE, reason="this process interprets Triton itself")
def test_in_a_process_of_its_own(request):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "--deselect",
        request.node.nodeid,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:]


@pytest.fixture
def kernels():
    """The launchers with small blocks: several to a row of the tests."""
    by_table = functions(tiles.Backend.TRITON)
    fold_, grad_ = partial(launch.fold_, config=SMALL), partial(launch.grad_, config=SMALL)
    return SimpleNamespace(fold_=fold_, grad_=grad_, stats=by_table.stats)


def test_default_launch_equals_small_blocks(kernels, gen):
    tile, labels = make_logits(gen, torch.bfloat16, 5000, kinds=("wide",))  # one whole default block and a tail
    g = randn(gen, tile.shape[0], dtype=torch.float32)
    by_default, by_small = folded(launch, tile, labels, Transform()), folded(kernels, tile, labels, Transform())
    torch.testing.assert_close(by_default, by_small, rtol=1e-5, atol=1e-5)
    ours = gradient(launch, tile, labels, by_small, g, g, Transform())
    assert torch.equal(ours, gradient(kernels, tile, labels, by_small, g, g, Transform()))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU contracts or does not")
@pytest.mark.parametrize("temperature", [0.7, 1.9])
def test_a_common_offset_is_no_error_without_contraction_either(kernels, gen, temperature, monkeypatch):
    for name, operation in (("create_fadd", np.add), ("create_fsub", np.subtract)):
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, name, lambda self, x, y, op=operation: self.binary_op(x, y, op)
        )
    assert relative_error_at_an_offset(kernels, gen, temperature) < 2e-6


@pytest.mark.skipif(not INTERPRETED, reason="a GPU's fma cannot be taken apart")
def test_a_common_offset_needs_the_fma(kernels, gen, monkeypatch):
    def rounded_twice(self, x, y, z):
        return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", rounded_twice)
    assert relative_error_at_an_offset(kernels, gen, 0.7) > 2e-5


@pytest.mark.parametrize("v", [1, 5, 40, 256, 1043])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_may_begin_and_end_anywhere(kernels, gen, dtype, v):
    """At every distance from a boundary, and the tensor at one or not; the output with it, or not."""
    acc = state_dtype(dtype)
    bias, keep = randn(gen, v, dtype=acc), torch.rand(9, v, generator=gen).to(DEVICE) < 0.8
    keep[:, 0] = True
    seen = set()
    for transform in (Transform(), Transform(bias=bias, keep_mask=keep, softcap=5.0)):
        for stride, first, out_stride in (
            (v, 0, v),
            (v + 1, 0, v + 1),
            (v + 3, 1, v + 3),
            (v + 16, 0, v + 17),
            (1088, 0, 1088),
        ):
            frame, out_frame = (
                torch.full((12 * s + 64,), torch.nan, dtype=dtype, device=DEVICE) for s in (stride, out_stride)
            )
            tile = frame.as_strided((9, v), (stride, 1), first)
            tile.copy_(randn(gen, 9, v))
            out = out_frame.as_strided((9, v), (out_stride, 1), first)
            seen.add(tuple(config.alignment(tile, out, None).values())[:2])
            labels, g = torch.arange(9, device=DEVICE) % v + VOCAB_START, randn(gen, 9, dtype=acc)
            plain = functions(tiles.Backend.TORCH)
            ours, theirs = (folded(k, tile, labels, transform) for k in (kernels, plain))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            expected = gradient(plain, tile, labels, theirs, g, g, transform)
            gradient(kernels, tile, labels, ours, g, g, transform, out=out)
            rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
            torch.testing.assert_close(out, expected, rtol=rounding, atol=1e-5)
            assert out_frame.isnan().sum() == out_frame.numel() - out.numel(), "written outside"
            gradient(kernels, tile, labels, ours, g, g, transform, out=tile)
            assert torch.equal(tile, out)
            assert frame.isnan().sum() == frame.numel() - tile.numel(), "written outside"
    assert seen == {(True, True), (False, False)} | ({(True, False)} if v % 16 == 0 else set())


def test_through_the_tile_interface(gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    n = tile.shape[0]
    g = randn(gen, n, dtype=torch.float32)
    outcomes = []
    for backend in (tiles.Backend.TRITON, tiles.Backend.TORCH):
        x, state = tile.clone(), new_state(n, Level.ENTROPY, tile)
        tiles.fold_(x, labels, VOCAB_START, state, Transform(), level=Level.ENTROPY, backend=backend)
        tiles.grad_(x, labels, VOCAB_START, state, g, g, Transform(), backend=backend)
        outcomes.append((state, x))
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_messages(kernels, gen):
    tile, labels = make_logits(gen, torch.float32, kinds=("wide",))
    state = new_state(tile.shape[0], Level.ENTROPY, tile)
    with pytest.raises(ValueError, match="tile has strides"):
        folded(kernels, tile.t().contiguous().t(), labels, Transform(), state=state)
    with pytest.raises(ValueError, match="out has strides"):
        gradient(kernels, tile, labels, state, None, None, Transform(), out=tile.t().contiguous().t())
    with pytest.raises(ValueError, match="block_v=96 must be a power of two"):
        replace(SMALL, block_v=96)


@pytest.mark.parametrize("hip, name", [(None, "sm_90"), ("6.4", "gfx942")])
def test_an_architecture_s_name_is_not_that_of_the_card(hip, name, monkeypatch):
    """torch gives gcnArchName of NVIDIA's too, where it is the card's."""
    called = "NVIDIA H100 80GB HBM3" if hip is None else "gfx942:sramecc+:xnack-"
    found = SimpleNamespace(gcnArchName=called, major=9, minor=0)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert config.architecture.__wrapped__(torch.device("cuda", 0)) == name


def test_the_programs_of_a_call_lie_on_the_long_grid_axis():
    for module, grid in (
        (fold, "(tile.shape[0],)"),
        (grad, "(tile.shape[0],)"),
        (stats, "(triton.cdiv(n, BLOCK_ROWS),)"),
    ):
        source = inspect.getsource(module)
        assert re.findall(r"program_id\((.*?)\)(.*)", source)[0][1].startswith(".to(tl.int64)")
        assert re.findall(r"_kernel\[(.*?)\]\(\n", source) == [grid]


# Ahead-of-time compilation. A process without the interpreter makes the real launches, records them instead of running
# them, and compiles what each would have compiled, for five GPUs. It prints one JSON object.

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
}
HOT = ("fold bfloat16", "fold float32", "grad bfloat16", "grad float32 into its bf16 overlay")
SHARED_BYTES = {
    "sm_80": 167_936,
    "sm_90": 233_472,
    "sm_100": 233_472,
    "gfx90a": 65_536,
    "gfx942": 65_536,
}  # of a multiprocessor
RESERVED_BYTES = 1024  # of them, for each program
TABLE = ROOT / "kernels" / "resources.json"  # what a test keeps from growing


def recorded_launches():
    """name -> (kernel, arguments) of launches on a tile as wide as a real vocabulary."""
    gen, n, v = torch.Generator().manual_seed(0), 2, 151_936
    launches = []

    def record(kernel, *, grid, warmup, **arguments):
        launches.append((kernel, arguments))

    def call(dtype, name, level=Level.ENTROPY, out=None, upstream=(True, True), columns=slice(None), n=n, start=0, v=v):
        acc = state_dtype(dtype)
        tile = torch.zeros(n, v, dtype=dtype)[:, columns]
        transform = make_transform(gen, name, n, dtype, v, device="cpu").tile(slice(None), columns, acc)
        state, labels = new_state(n, level, tile), torch.zeros(n, dtype=torch.int64)
        launch.fold_(tile, labels, start, state, transform, level=level)
        g_logp, g_ent = (torch.ones(n, dtype=acc) if wanted else None for wanted in upstream)
        launch.grad_(tile, labels, start, state, g_logp, g_ent, transform, out=out and out(tile))
        return launches[-2:]

    with mock.patch.object(JITFunction, "run", record):
        named = {}
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            named[f"fold {name}"], named[f"grad {name}"] = call(dtype, "plain")
            named[f"fold {name} logps"], named[f"grad {name} logp"] = call(
                dtype, "plain", Level.LOGPS, upstream=(True, False)
            )
            named[f"fold {name} softcap"], named[f"grad {name} softcap"] = call(dtype, "softcap")
            named[f"fold {name} everything, odd"], named[f"grad {name} everything, odd"] = call(
                dtype, "everything", Level.EXTRAS, v=50_257
            )
            named[f"fold {name} odd"], named[f"grad {name} odd"] = call(dtype, "plain", v=50_257)
            named[f"fold {name} unaligned"], named[f"grad {name} unaligned"] = call(
                dtype, "plain", columns=slice(1, 50_258)
            )
        named["fold float16"], named["grad float16"] = call(torch.float16, "plain")
        named["fold float64"], named["grad float64"] = call(torch.float64, "everything", Level.EXTRAS)
        _, named["grad float32 of labels alone, unaligned"] = call(
            torch.float32, "plain", upstream=(True, False), columns=slice(0, 1)
        )
        _, named["grad float32 into its bf16 overlay"] = call(torch.float32, "plain", out=tiles.bf16_overlay)
        for dtype in (torch.float32, torch.float64):
            state = torch.zeros(8, 4096, dtype=dtype)
            tiles.stats(state, STATS, backend=tiles.Backend.TRITON)
            named[f"stats {str(dtype).removeprefix('torch.')}"] = launches[-1]
        variations = [
            call(torch.bfloat16, "scaled", n=n, columns=slice(0, width), start=start)
            for n, width, start in ((2, 4096, 0), (1, 100_000, 1), (16, 4112, 16), (3, 131_072, 100_000))
        ]
    return named, variations


def binding(kernel, arguments, target):
    """What Triton makes of a launch: bound arguments, and the (type, attribute) pairs that decide whether to compile."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        **arguments
    )
    return backend, bound, specialization, options


def compiled_launch(kernel, arguments, target):
    from triton.compiler import ASTSource

    backend, bound, specialization, options = binding(kernel, arguments, target)
    names, values = [p.name for p in kernel.params], list(bound.values())
    signature = {name: kind for name, (kind, _) in zip(names, specialization, strict=True)}
    constants = {(i,): values[i] for i, (kind, _) in enumerate(specialization) if kind == "constexpr"}
    attributes = {(i,): backend.parse_attr(a) for i, (_, a) in enumerate(specialization) if isinstance(a, str)}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def per_logit(instructions, pattern, arguments, threads):
    """Instructions of a kernel's loop by the logits that a thread has in it."""
    if arguments.get("BLOCK_V", 0) < threads:
        return {}
    loop = assembly.hot_loop(instructions, pattern)
    return {"instructions per logit": round(len(loop) * threads / arguments["BLOCK_V"], 1)}


def facts(binary, arch, arguments):
    """Numbers that a test can judge, from the assembly and the linker's view of the binary."""
    ttir = binary.asm["ttir"]
    rows = re.findall(r"tt\.addptr %(\w+_ptr)(?:_\d+)?, %\w+ : !tt\.ptr<\w+>, (i\d+)", ttir)
    made = {"shared": binary.metadata.shared, "warps": binary.metadata.num_warps}
    # a product that is subtracted becomes a fused one, unrounded: of two equal numbers, one may then be another
    llir = binary.asm["llir"]
    products = set(re.findall(r"(%\d+) = fmul\b", llir))
    made["subtracted_products"] = sum(
        not products.isdisjoint(operands) for operands in re.findall(r"= fsub \w+ (%\d+), (%\d+)", llir)
    )
    made |= {"row_offsets": sorted({bits for _, bits in rows})}
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        made |= per_logit(assembly.amd_listing(text), r"v_exp_f32|\bv_fma_f64", arguments, made["warps"] * 64)
        numbers = {
            k: int(n)
            for k, n in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
        }
        wide = bool(re.search(r"(buffer|global)_load_dwordx4", text))
        return made | {
            "registers": numbers["vgpr_count"],
            "spilled": numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"],
            "wide_loads": wide,
            "wide_stores": bool(re.search(r"(buffer|global)_store_dwordx4", text)),
            "fused": "v_fma_f32" in text or "v_fmac_f32" in text or "v_pk_fma_f32" in text,
            "doubles": len(re.findall(r"v_\w+_f64", text)),
        }
    text = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        code = assembly.cuobjdump("-res-usage", "-sass", file.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", code).groups())
    made["bf16_alone"] = len(re.findall(r"\b(?:LDG|STG)\.E\S*\.U16", code))
    made |= per_logit(assembly.listing(code), r"MUFU\.EX2|\bDFMA\b", arguments, made["warps"] * 32)
    return made | {
        "registers": registers,
        "spilled": stack + local,
        "wide_loads": bool(
            re.search(
                r"ld\.global\.v4\.b32|ld\.global\.v2\.b64|cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10",
                text,
            )
        ),
        "wide_stores": bool(re.search(r"st\.global\.v4\.b32|st\.global\.v2\.b64", text)),
        "fused": "fma.rn.f32" in text,
        "doubles": len(re.findall(r"\.f64", text)),
    }


def compile_report(which):
    from triton.backends.compiler import GPUTarget

    named, variations = recorded_launches()
    chosen = [name for name in named if (name in HOT) == (which == "hot")]
    report = {"kernels": {}, "specialisations": []}
    for arch, target in TARGETS.items():
        for name in chosen:
            kernel, arguments = named[name]
            if "LANES" in arguments:  # the launch was recorded for a warp of 32
                most = arguments["BLOCK_V"] // arguments["WIDTH"]
                arguments = arguments | {"LANES": min(arguments["num_warps"] * target[2], most)}
            arguments = arguments | config.compiler_options(hip=target[0] == "hip")
            binary = compiled_launch(kernel, arguments, GPUTarget(*target))
            report["kernels"][f"{name} {arch}"] = facts(binary, arch, arguments)
    for pair in zip(*variations, strict=True):
        keys = {repr(binding(*one, GPUTarget(*TARGETS["sm_90"]))[2]) for one in pair}
        report["specialisations"].append(sorted(keys))
    return report


def launch_and_report():
    """Launches by Triton's own code, all of it but the driver: this one notes what it would have been given."""
    from triton.backends.compiler import GPUTarget

    noted = []

    class Launcher:
        def __init__(self, source, metadata):
            self.name = metadata.name

        def __call__(self, x, y, z, stream, function, metadata, *arguments):
            noted.append((self.name, x, y, z))

    utils = SimpleNamespace(
        load_binary=lambda *binary: (object(), 0, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES["sm_90"] - RESERVED_BYTES},
    )
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, launcher_cls=Launcher, utils=utils,
        get_current_target=lambda: GPUTarget(*TARGETS["sm_90"]),
    ))  # fmt: skip
    gen, v = torch.Generator().manual_seed(0), 4099
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for name in ("plain", "everything"):
            for n in (3, 5):  # the second time nothing is compiled
                acc = state_dtype(dtype)
                tile, labels = torch.zeros(n, v, dtype=dtype), torch.zeros(n, dtype=torch.int64)
                transform = make_transform(gen, name, n, dtype, v, device="cpu").tile(slice(None), slice(0, v), acc)
                state = new_state(n, Level.ENTROPY, tile)
                launch.fold_(tile, labels, 0, state, transform, level=Level.ENTROPY)
                launch.grad_(tile, labels, 0, state, torch.ones(n, dtype=acc), None, transform)
                tiles.stats(state, STATS[:2], backend=tiles.Backend.TRITON)
    print(json.dumps(noted))


def compiled(which, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, which]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-8000:]
    assert "Warning" not in run.stderr, run.stderr  # a user would read it
    return json.loads(run.stdout.splitlines()[-1])


def assert_sound(kernels):
    for name, made in kernels.items():
        assert made["spilled"] == 0, f"{name} spills: {made}"
        # one column is no block: its number is added to the row's pointer
        one_column = name.startswith("stats") or "of labels alone" in name
        assert made["row_offsets"] == ["i64"] or one_column, f"{name}: {made}"
        arch = name.split()[-1]
        nvidia = arch.startswith("sm")
        assert 2 * (made["shared"] + RESERVED_BYTES * nvidia) <= SHARED_BYTES[arch], f"{name}: {made}"
        # two programs: of 65,536 registers, or of 512 to a lane of each of four units
        lanes = made["warps"] * 32 / 65_536 if nvidia else -(-made["warps"] // 4) / 512
        assert 2 * lanes * made["registers"] <= 1, f"{name}: {made}"
        if name.startswith("stats"):  # differences in fp64, of a few numbers
            continue
        if name.startswith("fold") and "float64" not in name:
            assert not made["subtracted_products"], f"{name}: {made}"
        if "float64" not in name:
            assert made["fused"] and not made["doubles"], f"{name}: {made}"
        if "unaligned" not in name:
            assert made["wide_loads"], f"{name} loads single elements: {made}"
            assert made["wide_stores"] or name.startswith("fold"), f"{name} stores single elements: {made}"


def table(kernels):
    """What resources.json has of each: registers, bytes of shared memory, instructions."""
    kept = ("registers", "shared", "instructions per logit")
    return {name: {what: made[what] for what in kept if what in made} for name, made in kernels.items()}


def assert_no_more_than_committed(kernels):
    committed = json.loads(TABLE.read_text())
    if triton.__version__ != committed["triton"]:
        return  # another compiler
    for name, numbers in table(kernels).items():
        for what, value in numbers.items():
            limit = committed["kernels"][name][what]
            advice = "if that is meant, python tests/test_kernels_triton.py table writes a new one"
            assert value <= limit, f"{name}: {what} {value}, committed {limit}; {advice}"


@pytest.mark.parametrize(
    "loop, name",
    [
        ("fold bf16, entropy", "fold bfloat16"),
        ("fold bf16, log-probs alone", "fold bfloat16 logps"),
        ("fold fp32, entropy", "fold float32"),
        ("fold fp32 under a softcap", "fold float32 softcap"),
        ("fold bf16, entropy, of an odd vocabulary", "fold bfloat16 odd"),
        ("grad bf16, both", "grad bfloat16"),
        ("grad bf16, both, of an odd vocabulary", "grad bfloat16 odd"),
        ("grad fp32 into bf16", "grad float32 into its bf16 overlay"),
    ],
)
def test_the_readme_tells_the_committed_instructions(loop, name):
    committed = json.loads(TABLE.read_text())["kernels"]
    numbers = [committed[f"{name} {arch}"]["instructions per logit"] for arch in ("sm_90", "sm_100", "gfx942")]
    assert f"| {loop} | {' | '.join(map(str, numbers))} |" in TABLE.with_name("README.md").read_text()


@pytest.mark.compiler
def test_hot_kernels_compile_for_every_target(tmp_path):
    report = compiled("hot", tmp_path)
    assert len(report["kernels"]) == len(HOT) * len(TARGETS)
    assert_sound(report["kernels"])
    for name, made in report["kernels"].items():  # the label's logit and gradient; not a row's last columns
        assert made.get("bf16_alone", 0) <= 2, f"{name}: {made}"
    assert_no_more_than_committed(report["kernels"])
    assert [len(keys) for keys in report["specialisations"]] == [1, 1], "a size, stride or offset compiles anew"


@pytest.mark.compiler
def test_every_launch_reaches_the_driver(tmp_path):
    """What is checked at a launch, a compiled binary alone does not show."""
    noted = compiled("launches", tmp_path)
    assert len(noted) == 3 * 2 * 2 * 3
    assert {tuple(grid) for name, *grid in noted if name != "_stats_kernel"} == {(3, 1, 1), (5, 1, 1)}
    assert {name for name, *_ in noted} == {"_fold_kernel", "_grad_kernel", "_stats_kernel"}


@pytest.mark.compiler
@pytest.mark.slow
def test_other_kernels_compile_for_every_target(tmp_path):
    kernels = compiled("rest", tmp_path)["kernels"]
    assert_sound(kernels)
    assert_no_more_than_committed(kernels)


if COMPILES and sys.argv[1] == "launches":
    launch_and_report()
elif COMPILES and sys.argv[1] == "table":
    kernels = compile_report("hot")["kernels"] | compile_report("rest")["kernels"]
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(made)}" for name, made in sorted(table(kernels).items()))
    TABLE.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{rows}\n }}\n}}\n')
elif COMPILES:
    print(json.dumps(compile_report(sys.argv[1])))

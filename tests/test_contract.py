"""The operators as torch sees them: schemas, fakes, torch.compile, import behaviour, layers and packaging."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import entropy_po
from entropy_po import linear_token_stats, token_stats

ROOT = Path(__file__).parent.parent
N, D, V = 13, 8, 101


def options(rows=False, softcap=None):
    temperature = torch.rand(N) + 0.5 if rows else None
    keep = (torch.rand(N, V) < 0.9) if rows else None
    return temperature, keep, 0.9, 1.1, softcap, -100, ["logps", "entropy"], ""


def inputs(trained=(True, True, True)):
    values = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    labels = torch.randint(V, (N,))
    labels[2] = -100
    return *(x.requires_grad_(t) for x, t in zip(values, trained, strict=True)), labels


@pytest.mark.parametrize("rows, softcap", [(False, None), (True, 3.0)])
def test_opcheck(rows, softcap):
    opts = options(rows, softcap)
    ops = torch.ops.entropy_po
    for trained in ((True, True, True), (True, False, False), (False, False, False)):
        torch.library.opcheck(ops.linear_token_stats, (*inputs(trained), *opts, 1 << 20))
    logits, labels = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    torch.library.opcheck(ops.token_stats, (logits, labels, *opts, False))
    plain = [x.detach() for x in inputs()]
    state = ops.linear_token_stats(*plain, *opts, 1 << 20)[-1]
    torch.library.opcheck(
        ops.linear_token_stats_backward, (torch.randn(N), None, *plain, state, *opts, 1 << 20, [True, True, False])
    )
    state = ops.token_stats(logits.detach(), labels, *opts, False)[-1]
    torch.library.opcheck(
        ops.token_stats_backward, (torch.randn(N), torch.randn(N), logits.detach(), labels, state, *opts)
    )
    torch.library.opcheck(ops.token_stats_backward_, (torch.randn(N), None, logits.detach(), labels, state, *opts))


def hidden_loss(hidden, weight, labels):
    stats = linear_token_stats(hidden, weight, labels, temperature=0.7)
    return (-stats.logps - 0.1 * stats.entropy).sum()


def logits_loss(hidden, weight, labels):
    stats = token_stats(hidden @ weight.t(), labels, softcap=5.0)
    return (-stats.logps - 0.1 * stats.entropy).sum()


def inplace_loss(hidden, weight, labels):
    return -token_stats(hidden @ weight.t(), labels, inplace_backward=True).logps.sum()


@pytest.mark.parametrize("loss", [hidden_loss, logits_loss, inplace_loss])
def test_compiles_whole_and_once_for_every_length(loss):
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (13, 17, 29):
        hidden, weight, _, _ = inputs()
        hidden, labels = torch.randn(n, D, requires_grad=True), torch.randint(V, (n,))
        expected = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        got = torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        counted(hidden, weight, labels)
    assert counter.frame_count == 1


def test_no_grad_and_checkpointing():
    hidden, weight, _, labels = inputs()
    with torch.no_grad():
        assert not linear_token_stats(hidden, weight, labels).logps.requires_grad
    expected = torch.autograd.grad(hidden_loss(hidden, weight, labels), hidden)[0]
    loss = torch.utils.checkpoint.checkpoint(hidden_loss, hidden, weight, labels, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected)


def in_fresh_process(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_import_needs_torch_alone():
    code = (
        "import sys, entropy_po\n"
        "print([m for m in ('triton', 'transformers', 'trl', 'datasets', 'entropy_po._C') if m in sys.modules])"
    )
    assert in_fresh_process(code).stdout.strip() == "[]"


def test_without_the_compiled_core_it_warns_once_and_is_right():
    code = (
        "import sys; sys.modules['entropy_po._C'] = None\n"
        "import torch, warnings, entropy_po\n"
        "warnings.simplefilter('always')\n"
        "x, y = torch.randn(3, 50), torch.tensor([1, 2, 3])\n"
        "for _ in range(2): s = entropy_po.token_stats(x, y)\n"
        "assert torch.allclose(s.logps, torch.log_softmax(x, -1)[range(3), y], atol=1e-5)\n"
        "print(entropy_po.describe()['backends']['cpu'], entropy_po.describe()['unavailable']['cpp'][:26])"
    )
    done = in_fresh_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['torch'] the C++ core was not built"
    assert done.stderr.count("plain torch") == 1


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


LAYERS = {
    "entropy_po/types.py": (),
    "entropy_po/plan.py": (),
    "entropy_po/objective.py": (),
    "entropy_po/reference.py": ("entropy_po.types",),
    "entropy_po/tiles.py": ("entropy_po.types", "entropy_po.reference", "entropy_po"),
}


def test_layers_import_downwards_only():
    for file, allowed in LAYERS.items():
        found = {m for m in imported_by(ROOT / file) if m.startswith("entropy_po")}
        assert found <= set(allowed), file
    heavy = ("transformers", "datasets", "trl", "peft", "accelerate")
    for path in (ROOT / "entropy_po" / "ops").glob("*.py"):
        modules = set(imported_by(path))
        assert not any(m.split(".")[0] in heavy for m in modules), path
        assert not any(m.startswith(("entropy_po.trainer", "entropy_po.heads", "entropy_po.cli")) for m in modules), (
            path
        )
    for path in (ROOT / "kernels").glob("*.py"):
        assert not any(
            m.startswith(("entropy_po.ops", "entropy_po.trainer", "torch.autograd")) for m in imported_by(path)
        )
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text, path
        assert ("pybind11" in text) == (path.name == "bindings.cpp"), path


def test_the_public_names():
    for name in entropy_po.__all__:
        assert getattr(entropy_po, name).__doc__


def build_wheel(folder, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():  # a copy: building in the tree would touch the installed core
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(command, cwd=source, check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
def test_the_wheel_holds_entropy_po_alone_and_no_top_level_kernels(tmp_path):
    wheel = build_wheel(tmp_path)
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"entropy_po"}
    assert any(name.startswith("entropy_po/_C.") for name in names)
    assert "entropy_po/kernels/fold.py" in names and "entropy_po/demo/pairs.jsonl" in names
    wheel.extractall(tmp_path / "site")
    code = (
        "import importlib.util, entropy_po, torch\n"
        "assert 'site' in entropy_po.__file__\n"
        "print(importlib.util.find_spec('kernels'), entropy_po.describe()['backends']['cpu'][0])\n"
        "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.stdout.split() == ["None", "cpp", "False"], done.stderr


def test_transformers_is_unaffected_with_the_repository_on_the_path():
    done = in_fresh_process("from transformers.utils import is_kernels_available; print(is_kernels_available())")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
def test_an_install_without_a_compiler_succeeds(tmp_path):
    wheel = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert not any("/_C." in name for name in wheel.namelist())

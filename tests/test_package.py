"""The wheel: what it puts on the path, what it must not, and that it builds where there is no compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "entropy_po", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")

needs_build = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("pybind11", "setuptools", "wheel")),
    reason="a build without isolation needs pybind11, setuptools and wheel here (pip install -e '.[dev]')",
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def run(*command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder, **env):
    """The wheel of a fresh copy of the tree: neither build/ nor a core built in place may help it."""
    source = folder / "source"
    source.mkdir(parents=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "-w", str(folder / "dist"), ".", cwd=source, **env)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def install(wheel, target):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    run(*pip, str(target), str(wheel), cwd=target.parent)
    return target


# An editable install of the tree would answer for a module that the wheel lacks.
ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@needs_build
@pytest.mark.slow
def test_the_wheel_holds_entropy_po_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = (n for n in names if n.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["entropy_po"]
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"entropy_po"}
    assert any(n.startswith("entropy_po/_C.") and n.endswith((".so", ".pyd")) for n in names)
    assert {"entropy_po/py.typed", "entropy_po/_C.pyi"} <= set(names)
    assert not any("test" in n.split("/") or "tests" in n.split("/") for n in names)
    # every module of the tree is in it: an explicit list of packages forgets one easily
    for folder, prefix in (("entropy_po", "entropy_po"), ("kernels", "entropy_po/kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in names


@needs_build
@pytest.mark.slow
def test_the_installed_package_runs_from_its_own_files(wheel, tmp_path):
    target = install(wheel, tmp_path / "site")
    code = """
import importlib.util
import torch, entropy_po
from pathlib import Path
assert Path(entropy_po.__file__).is_relative_to(sys.argv[1]), entropy_po.__file__
import entropy_po._C
assert Path(entropy_po._C.__file__).is_relative_to(sys.argv[1])
found = importlib.util.find_spec("kernels")
assert found is None or not str(found.origin or list(found.submodule_search_locations)[0]).startswith(sys.argv[1])
x = torch.randn(3, 40, requires_grad=True)
entropy_po.token_stats(x, torch.tensor([1, 2, 3]), backend="cpp").logps.sum().backward()
"""
    run(sys.executable, "-c", ALONE + code, str(target), cwd=tmp_path, PYTHONPATH=str(target))


IS_KERNELS = "from transformers.utils import is_kernels_available as f; print(f())"


@needs_build
@needs_transformers
@pytest.mark.slow
def test_transformers_sees_no_kernels_package_of_ours(wheel, tmp_path):
    target = install(wheel, tmp_path / "site")
    elsewhere = run(sys.executable, "-c", IS_KERNELS, cwd=tmp_path, PYTHONPATH="")
    installed = run(sys.executable, "-c", IS_KERNELS, cwd=tmp_path, PYTHONPATH=str(target))
    at_root = run(sys.executable, "-c", IS_KERNELS, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert elsewhere == installed == at_root


@needs_build
@pytest.mark.slow
def test_it_installs_without_a_compiler(tmp_path):
    wheel = build_wheel(tmp_path / "bare", CC="/bin/false", CXX="/bin/false", ENTROPY_PO_CUDA="0")
    with zipfile.ZipFile(wheel) as archive:
        assert not any(n.endswith((".so", ".pyd")) for n in archive.namelist())
    target = install(wheel, tmp_path / "site")
    code = """
import torch, entropy_po
assert entropy_po.__file__.startswith(sys.argv[1])
assert entropy_po.available_backends()["cpu"] == ["torch"]
x = torch.randn(3, 40, requires_grad=True)
entropy_po.token_stats(x, torch.tensor([1, 2, 3])).logps.sum().backward()
"""
    run(sys.executable, "-c", ALONE + code, str(target), cwd=tmp_path, PYTHONPATH=str(target))


@needs_build
@pytest.mark.slow
def test_cuda_is_left_out_with_a_reason_or_demanded_with_an_error(tmp_path):
    wheel = build_wheel(tmp_path / "without", CUDA_HOME=str(tmp_path))
    target = install(wheel, tmp_path / "site")
    code = """
from entropy_po import tiles
assert tiles.compiled_core() is not None
assert "nvcc was not found" in tiles.unavailable_reason(tiles.Backend.CUDA)
"""
    run(sys.executable, "-c", ALONE + code, str(target), cwd=tmp_path, PYTHONPATH=str(target))
    with pytest.raises(AssertionError, match="ENTROPY_PO_CUDA=1, but nvcc was not found"):
        build_wheel(tmp_path / "demanded", CUDA_HOME=str(tmp_path), ENTROPY_PO_CUDA="1")

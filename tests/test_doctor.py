"""The doctor's report: what a maintainer needs is in it, it names what is broken, and a broken installation cannot stop it."""

import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import entropy_po
from entropy_po import doctor, tiles

ROOT = Path(__file__).resolve().parent.parent


def broken(code, **env):
    """Run the doctor in a fresh interpreter after `code`, which breaks something; (exit status, output)."""
    code = "import sys\n" + textwrap.dedent(code) + "\nfrom entropy_po import doctor; sys.exit(doctor.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_sound_installation_passes(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert f"entropy_po {entropy_po.__version__}" in out and f"torch {torch.__version__}" in out
    assert "PROBLEM" not in out and "FAILED" not in out and "WRONG" not in out
    for backend in entropy_po.available_backends()["cpu"]:
        for operator in ("token_stats", "linear_token_stats"):
            assert f"check cpu {backend} {operator}: ok" in out
    assert len(out.splitlines()) < 50  # one screen


def test_json_is_the_same_report(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("UNRELATED_TOKEN", "not for an issue")
    assert doctor.main(["--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert report["environment"]["OMP_NUM_THREADS"] == "2" and "UNRELATED_TOKEN" not in out
    assert Path(report["install"]["path"]) == Path(entropy_po.__file__).parent
    assert report["problems"] == [] and all(check["ok"] for check in report["self_check"])
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report.keys() == {*entropy_po.describe(), "self_check"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is loaded")
def test_one_openmp_runtime_serves_torch_and_the_core(capsys):
    if tiles.compiled_core() is None:
        pytest.skip("the core is not built")
    code, out = broken("")  # a fresh process: others of this one's libraries (scikit-learn's, say) may bring their own
    (line,) = (line for line in out.splitlines() if "OpenMP runtime" in line)
    assert code == 0 and "more than one" not in line and "torch" in line, line


def test_an_unknown_override_is_a_problem():
    code, out = broken("", ENTROPY_PO_BACKEND="cude")
    assert code == 1 and "PROBLEM ValueError: ENTROPY_PO_BACKEND='cude' is not one of" in out
    assert "  ENTROPY_PO_BACKEND=cude" in out.splitlines()


IMPORT_FAILS = """
class Fails:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ImportError("libgomp.so.1: cannot open\\nshared object file")
sys.meta_path.insert(0, Fails())
"""


@pytest.mark.parametrize("name", ["entropy_po._C", "entropy_po.kernels.launch"])
def test_a_library_that_does_not_load_is_a_problem(name):
    code, out = broken(IMPORT_FAILS.format(name=name))
    assert code == 1 and "PROBLEM ImportError: libgomp.so.1: cannot open shared object file" in out
    assert f"{'cpp' if name == 'entropy_po._C' else 'triton'}: not available: see problems" in out


def test_torch_alone_is_no_problem():
    code, out = broken(
        "for name in ('entropy_po._C', 'triton', 'transformers', 'numpy'):\n    sys.modules[name] = None",
    )
    assert (
        code == 0
        and "check cpu torch token_stats: ok" in out
        and "cpp: not available: the C++ core was not built" in out
    )


@pytest.mark.parametrize("wrong_by", [1e-2, torch.nan])
def test_a_wrong_result_shows(wrong_by, monkeypatch, capsys):
    sound = tiles.grad_

    def wrong(tile, *args, out=None, **kwargs):
        sound(tile, *args, out=out, **kwargs)
        (tile if out is None else out)[:, -1] += wrong_by

    monkeypatch.setattr(tiles, "grad_", wrong)
    assert doctor.main([]) == 1
    assert "token_stats: WRONG: log-probs" in capsys.readouterr().out


def test_an_error_in_a_check_shows(monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(tiles, "fold_", fails)
    assert doctor.main([]) == 1
    assert "token_stats: FAILED: RuntimeError: no kernel image is available" in capsys.readouterr().out


class Found:
    """A distribution that has the package at `site`."""

    def __init__(self, site, **files):
        self.site, self.files = site, files

    def read_text(self, name):
        return self.files.get(name.split(".")[0])

    def locate_file(self, name):
        return self.site / name


@pytest.mark.parametrize(
    ("found", "kind", "tag"),
    [
        (None, "source tree", None),
        (Found(ROOT / "elsewhere", WHEEL="Tag: cp311-cp311-linux_x86_64"), "source tree", None),
        (
            Found(ROOT / "elsewhere", direct_url=json.dumps({"url": ROOT.as_uri(), "dir_info": {"editable": True}})),
            "editable",
            None,
        ),
        (Found(Path(entropy_po.__file__).parent.parent, WHEEL="Tag: cp311-cp311-any\n"), "wheel", "cp311-cp311-any"),
    ],
    ids=["none", "another copy", "editable", "wheel"],
)
def test_how_it_was_installed(found, kind, tag, monkeypatch):
    def distribution(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("importlib.metadata.distribution", distribution)
    install = doctor._install()
    assert install["kind"] == kind and install.get("tag") == tag
    if kind != "wheel" and (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert head.startswith(install["commit"].removesuffix("-dirty"))

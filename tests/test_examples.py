"""The examples run as they are, and do what their first lines say."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, capfd, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capfd.readouterr().out


def numbers(text, word):
    return [float(x) for x in re.findall(rf"{word}\s+(-?[\d.]+)", text)]


def lines(name):
    return (EXAMPLES / name).read_text(encoding="utf-8").splitlines()


def test_hdpo_is_dpo_with_three_lines_changed(capfd, monkeypatch):
    changed = [
        line for line in lines("hdpo.py")[1:] if line not in lines("dpo.py") and "import cross_entropy" not in line
    ]
    assert len(changed) == 3 and len(lines("dpo.py")) <= 32, changed
    dpo, hdpo = (numbers(run(name, capfd, monkeypatch), "loss") for name in ("dpo.py", "hdpo.py"))
    assert dpo[0] == pytest.approx(0.6931, abs=1e-4) and dpo[-1] < dpo[0]
    assert hdpo[0] != pytest.approx(dpo[0], abs=1e-3) and hdpo[-1] < hdpo[0]
    source = (EXAMPLES / "hdpo.py").read_text(encoding="utf-8").replace("alpha=0.9", "alpha=1.0")
    exec(compile(source, "hdpo.py at alpha 1", "exec"), {})
    assert numbers(capfd.readouterr().out, "loss") == pytest.approx(dpo, abs=2e-4)


def test_grpo(capfd, monkeypatch):
    rewards = numbers(run("grpo.py", capfd, monkeypatch), "reward")
    assert len(rewards) == 8 and rewards[-1] > rewards[0]


def test_long_context_prints_both_peaks(capfd, monkeypatch):
    out = run("long_context.py", capfd, monkeypatch, "--tokens", "4096", "--dim", "64", "--vocab", "16384")
    (with_logits, without), losses = numbers(out, "peak"), numbers(out, "loss")
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert with_logits > 256 and without < with_logits / 2  # the logits alone are 256 MiB


def test_lightning(capfd, monkeypatch):
    pytest.importorskip("lightning")
    losses = numbers(run("lightning_hdpo.py", capfd, monkeypatch), "loss")
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_tour(tmp_path):
    """The four things it shows: less memory, less error, the formula's loss, and alpha moving entropy as it should."""
    pytest.importorskip("matplotlib")
    # A process of its own: what earlier tests left free in this one would be used, and not show as growth.
    command = [sys.executable, EXAMPLES / "tour.py", "--quick", "--output", tmp_path]
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(EXAMPLES.parent)}
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    *_, eager, ours = re.search(r"1,024 +(\d+) +(\d+) +(\d+)", out).groups()
    assert int(ours) < int(eager) / 2
    assert max(float(e) for e in re.findall(r"entropy_po .* error (\S+) nat in log-probs, (\S+) nat", out)[0]) < 1e-5
    loss, exact = re.search(r"loss (\S+), by the formula in fp64 (\S+);", out).groups()
    assert float(loss) == pytest.approx(float(exact), abs=2e-6)
    assert all(float(error) < 1e-5 for error in re.findall(r"relative error (\S+)", out))
    (sharp, _), (dpo, _), (flat, _) = found = [
        (float(learnt), float(exact)) for learnt, exact in re.findall(r"-> (\S+) nat, closed form (\S+);", out)
    ]
    assert sharp < dpo < flat and all(learnt == pytest.approx(exact, abs=0.6) for learnt, exact in found)
    assert {path.name for path in tmp_path.iterdir()} == {"memory.png", "operator.png", "alpha.png"}


def test_tour_needs_no_matplotlib(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert "seconds in all" in run("tour.py", capfd, monkeypatch, "--quick")


def test_the_notebook_is_the_tour():
    jupytext = pytest.importorskip("jupytext")
    cells = jupytext.read(EXAMPLES / "tour.py").cells
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert ["".join(cell["source"]) for cell in notebook["cells"]] == [cell.source for cell in cells], "make notebook"
    errors = [o for cell in notebook["cells"] for o in cell.get("outputs", ()) if o["output_type"] == "error"]
    pictures = [o for cell in notebook["cells"] for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert not errors and len(pictures) == 3

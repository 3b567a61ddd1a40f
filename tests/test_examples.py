"""The examples run as they are, and do what their first lines say."""

import re
import runpy
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

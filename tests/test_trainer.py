"""The trainer against plain torch on full logits, and what it leaves on disk."""

import copy
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer_data import WORDS, make_tokenizer  # noqa: E402

from entropy_po import linear_preference_loss  # noqa: E402
from entropy_po.trainer import EntropyPOConfig, PairCollator, PreferenceTrainer, preference, tokenize_pairs  # noqa: E402
from entropy_po.trainer.checkpoints import checkpoint_fault, last_checkpoint  # noqa: E402

VOCAB = 32
# transformers' name of it, and its older one
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(EntropyPOConfig, n))
METHODS = {  # method, its arguments, and (a, b) by hand
    "hdpo": ({"beta": 0.5, "alpha": 0.8}, 0.4, 0.5),
    "dpo": ({"beta": 0.5}, 0.5, 0.5),
    "spl": ({"alpha_s": 0.6, "beta_s": 0.3}, 0.6, 0.3),
    "qempo": ({"lam": 4.0}, 0.25, 0.0),
    "qempo_kl": ({"lam": 2.0, "mu": 1.0}, 1.0, 0.5),
}


def make_rows(n: int = 8) -> list[dict]:
    """Pairs whose prompts and answers have lengths of their own."""
    words = WORDS.split()[6:]

    def text(start: int, length: int) -> str:
        return " ".join(words[(start + j) % len(words)] for j in range(length))

    return [
        {"prompt": text(i, 2 + i % 3), "chosen": " " + text(2 * i + 1, 1 + i % 4), "rejected": " " + text(i + 5, 3)}
        for i in range(n)
    ]


def make_model(seed: int = 0, family: str = "Llama", **kwargs):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        **kwargs,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # std 0.02 gives flat distributions, in which a wrong token would not show
    return model


def make_trainer(folder, rows=None, model=None, eval_rows=None, peft_config=None, **kwargs) -> PreferenceTrainer:
    defaults = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2, "seed": 3}
    if "method" not in kwargs:
        defaults |= {"method": "hdpo", "beta": 0.5, "alpha": 0.8}
    args = EntropyPOConfig(output_dir=str(folder), **{**defaults, **kwargs})
    rows = make_rows() if rows is None else rows
    return PreferenceTrainer(model or make_model(), args, rows, eval_rows, make_tokenizer(), peft_config=peft_config)


def plain_logps(model, pair_batch) -> torch.Tensor:
    """[2B] summed log-probs of the answers, from whole logits, one sequence at a time and without padding."""
    sums = []
    for ids, mask, labels in zip(*(pair_batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        length = int(mask.sum())
        logps = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        sums.append(sum(logps[t - 1, labels[t]] for t in range(1, length) if labels[t] != -100))
    return torch.stack(sums)


def plain_loss(model, reference, batch, a: float, b: float) -> torch.Tensor:
    logps = plain_logps(model, batch)
    with torch.no_grad():
        ref = plain_logps(reference, batch) if b else torch.zeros_like(logps)
    z = a * (logps[0::2] - logps[1::2]) - b * (ref[0::2] - ref[1::2])
    return torch.log1p(torch.exp(-z)).mean()


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.norm(ours - expected) / torch.linalg.norm(expected)).item()


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_equal_plain_torch(method, tmp_path):
    options, a, b = METHODS[method]
    trainer = make_trainer(tmp_path, method=method, **options)
    reference = make_model()
    with torch.no_grad():  # policy and reference differ, or b would not show
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    twin = copy.deepcopy(trainer.model)
    batch = trainer.data_collator(trainer.train_dataset.pairs)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    expected = plain_loss(twin, reference, batch, a, b)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 2e-5, name
    assert not (tmp_path / "reference_logps").exists() or b > 0


def test_the_strategy_reaches_the_operator_and_changes_rounding_only(tmp_path, monkeypatch):
    from entropy_po.trainer import preference

    seen, gradients = [], []

    def watched(*args, **kwargs):
        output = linear_preference_loss(*args, **kwargs)
        seen.append(output.strategy)
        return output

    monkeypatch.setattr(preference, "linear_preference_loss", watched)
    for strategy in ("auto", "resident", "deferred", "recompute"):
        trainer = make_trainer(tmp_path, strategy=strategy)
        trainer.compute_loss(trainer.model.train(), trainer.data_collator(trainer.train_dataset.pairs)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert seen == ["resident", "resident", "deferred", "recompute"]
    for gradient in gradients[1:]:
        assert relative_error(gradient, gradients[0]) < 1e-5


def test_reference_logps_equal_plain_torch_and_follow_the_pairs(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=1)
    for pair in trainer.train_dataset.pairs:
        batch = PairCollator()([pair])
        expected = plain_logps(make_model(), batch)
        assert relative_error(batch["ref_logps"][0], expected) < 1e-5


@pytest.mark.parametrize("loss", ["robust", "ipo", "hinge"])
def test_other_losses_and_the_nll_anchor(loss, tmp_path):
    smoothing = 0.1 if loss == "robust" else 0.0
    trainer = make_trainer(tmp_path, loss=loss, label_smoothing=smoothing, nll_coef=0.7)
    batch = trainer.data_collator(trainer.train_dataset.pairs)
    logps = plain_logps(trainer.model, batch)
    ref = batch["ref_logps"]
    z = 0.4 * (logps[0::2] - logps[1::2]) - 0.5 * (ref[:, 0] - ref[:, 1])
    sigmoid = torch.nn.functional.logsigmoid
    pair_loss = {
        "robust": -(0.9 * sigmoid(z) - 0.1 * sigmoid(-z)) / 0.8,
        "ipo": ((z - 0.5) / 0.4) ** 2,
        "hinge": (1 - z).clamp_min(0),
    }[loss]
    lengths = (batch["labels"][0::2] != -100).sum(1)
    expected = (pair_loss - 0.7 * logps[0::2] / lengths).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_temperature_reaches_policy_and_reference(tmp_path):
    trainer = make_trainer(tmp_path, temperature=2.0)
    batch = trainer.data_collator(trainer.train_dataset.pairs)
    model = make_model()
    model.lm_head.weight.data /= 2.0
    assert relative_error(batch["ref_logps"].flatten(), plain_logps(model, batch)) < 1e-5
    expected = plain_loss(model, model, batch, 0.4, 0.5)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixed_precision(tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, bf16=bf16, use_cpu=True, max_steps=2)
        assert trainer.model.lm_head.weight.dtype == torch.float32
        losses.append(trainer.train().training_loss)
    assert len(cache_files(tmp_path / "reference_logps")) == 2  # another precision is another reference
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def final_weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("num_pairs", [8, 7], ids=["even", "last-batch-short"])
def test_gradient_accumulation_equals_one_batch(num_pairs, tmp_path):
    """The mean is over the pairs of the step: a short last batch must not weigh more. SGD, as Adam hides a scale."""
    options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "rows": make_rows(num_pairs), "logging_steps": 1}
    whole = make_trainer(tmp_path / "a", per_device_train_batch_size=8, **options)
    split = make_trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    start = final_weights(whole).clone()
    losses = [trainer.train().training_loss for trainer in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert relative_error(final_weights(split) - start, final_weights(whole) - start) < 1e-4
    rows = [trainer.state.log_history[0] for trainer in (whole, split)]
    for name in rows[0]:
        if name not in ("tokens_per_second", "peak_memory_mib"):
            assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4), name


def test_logged_metrics_equal_plain_torch(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=8, logging_steps=1)
    model = make_model()
    trainer.train()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    batch = trainer.data_collator(trainer.train_dataset.pairs)
    with torch.no_grad():
        logps = plain_logps(model, batch)
        probs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    entropy = -(probs * probs.log()).sum(-1)[:, :-1][batch["labels"][:, 1:] != -100].mean()
    lengths = (batch["labels"] != -100).sum(1).float()
    rewards = -0.1 * logps  # policy = reference at the first step: a - b = -0.1
    expected = {
        "logps/chosen": logps[0::2].mean(),
        "logps/rejected": logps[1::2].mean(),
        "length/chosen": lengths[0::2].mean(),
        "length/rejected": lengths[1::2].mean(),
        "rewards/chosen": rewards[0::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/margins": (rewards[0::2] - rewards[1::2]).mean(),
        "rewards/accuracies": (rewards[0::2] > rewards[1::2]).float().mean(),
        "entropy": entropy,
        "loss": plain_loss(model, model, batch, 0.4, 0.5).detach(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-4), name
    assert row["step"] == 1 and row["tokens_per_second"] > 0 and row["peak_memory_mib"] > 0


def test_training_lowers_the_loss_and_evaluates(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_rows=make_rows(5), max_steps=6, eval_strategy="steps", eval_steps=3, logging_steps=2
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert after["eval_rewards/accuracies"] == 1.0 and "eval_entropy" in after
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 6]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]


def test_evaluation_loss_is_the_mean_over_pairs(tmp_path):
    trainer = make_trainer(tmp_path, rows=make_rows(2), eval_rows=make_rows(5), per_device_eval_batch_size=2)
    batch = PairCollator()(trainer.eval_dataset.pairs)
    expected = plain_loss(make_model(), make_model(), batch, 0.4, 0.5).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_several_evaluation_sets(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows={"first": make_rows(2), "second": make_rows(3)})
    metrics = trainer.evaluate()
    assert {"eval_first_loss", "eval_second_rewards/margins"} <= set(metrics)


def test_a_named_evaluation_set_has_its_split_test(tmp_path, monkeypatch):
    """Whatever its label is."""
    asked = []
    monkeypatch.setattr(preference, "load_rows", lambda source, split: asked.append((source, split)) or make_rows(2))
    make_trainer(tmp_path, "a", eval_rows="b")
    make_trainer(tmp_path, "a", eval_rows={"first": "b", "second": "c"})
    assert asked == [("a", "train"), ("b", "test"), ("a", "train"), ("b", "test"), ("c", "test")]


def test_late_evaluation_set_without_reference_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    late = tokenize_pairs(make_rows(2), make_tokenizer())
    with pytest.raises(ValueError, match="eval_dataset: it has no reference"):
        trainer.evaluate(late)


def test_rows_that_are_no_tokens_are_refused_with_the_way_to_give_them(tmp_path):
    with pytest.raises(
        ValueError, match=r"has dict where tokenised pairs are expected; give rows to PreferenceTrainer"
    ):
        make_trainer(tmp_path).evaluate(make_rows(2))


def test_reference_logps_are_not_rounded_to_the_models_type(tmp_path, monkeypatch):
    """As the Trainer does it to all floats under DeepSpeed, in bf16."""
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator(trainer.train_dataset.pairs[:2])
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    assert trainer._prepare_input(torch.ones(1)).dtype == torch.bfloat16  # so the test sees it
    assert torch.equal(trainer._prepare_inputs(batch)["ref_logps"], batch["ref_logps"])


def test_an_adapter_begins_as_the_seed_says(tmp_path):
    def start(seed):
        torch.manual_seed(time.time_ns())
        model = make_trainer(tmp_path, lora_r=2, seed=seed).model
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    one, again, other = start(1), start(1), start(2)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_dropout_that_is_no_module_is_off_too(tmp_path):
    model = make_model(attention_dropout=0.5)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    make_trainer(tmp_path, model=model)
    assert model.model.layers[0].self_attn.attention_dropout == 0.0


def test_lora_trains_the_adapter_alone_and_the_adapter_free_model_is_the_reference(tmp_path):
    trainer = make_trainer(tmp_path, lora_r=4, max_steps=4, logging_steps=1)
    plain = make_trainer(tmp_path / "plain")
    for ours, theirs in zip(trainer.train_dataset.pairs, plain.train_dataset.pairs, strict=True):
        assert ours.ref_logps == pytest.approx(theirs.ref_logps, rel=1e-5)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").exists()


def test_adapter_that_is_not_new_is_no_reference(tmp_path):
    """With a trained adapter the reference is the base model, not the policy as it comes in."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config)
    pairs = make_trainer(tmp_path, model=model).train_dataset.pairs
    for ours, theirs in zip(pairs, make_trainer(tmp_path / "plain").train_dataset.pairs, strict=True):
        assert ours.ref_logps == pytest.approx(theirs.ref_logps, rel=1e-5)


def test_peft_config_and_its_errors(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=config)
    with pytest.raises(ValueError, match="carries an adapter already"):
        make_trainer(tmp_path, model=trainer.model, peft_config=config)
    with pytest.raises(ValueError, match="lora_target_modules"):
        make_trainer(tmp_path, lora_r=2, lora_target_modules=["no_such_layer"])
    with pytest.raises(ValueError, match="head carries an adapter"):
        make_trainer(tmp_path, lora_r=2, lora_target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lora_r: the model carries an adapter already"):
        make_trainer(tmp_path, model=trainer.model, lora_r=2)
    with pytest.raises(ValueError, match="no parameter requires a gradient; unfreeze some, or set lora_r"):
        make_trainer(tmp_path, model=make_model().requires_grad_(False))
    with pytest.raises(ValueError, match="its adapter is frozen; merge it, or load it by peft with is_trainable=True"):
        make_trainer(tmp_path, model=trainer.model.requires_grad_(False))


@pytest.mark.parametrize("comes", ["config", "model", "asked for", "rate given", "whole"])
def test_an_adapter_has_its_own_default_rate(comes, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config) if comes == "model" else None
    options = {"learning_rate": 3e-4 if comes == "rate given" else None, "lora_r": 2 if comes == "asked for" else None}
    trainer = make_trainer(
        tmp_path, model=model, peft_config=config if comes in ("config", "rate given") else None, **options
    )
    assert trainer.args.learning_rate == {"rate given": 3e-4, "whole": 1e-6}.get(comes, 2e-5)


def test_what_cannot_be_found_or_called_is_said_at_the_start(tmp_path):
    args = EntropyPOConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="processing_class must be given: the model has no name"):
        PreferenceTrainer(make_model(), args, make_rows())
    with pytest.raises(ValueError, match="compute_metrics: it reads logits"):
        PreferenceTrainer(
            make_model(), args, make_rows(), processing_class=make_tokenizer(), compute_metrics=lambda _: {}
        )


def test_activation_checkpointing_changes_nothing(tmp_path):
    losses = []
    for name, kwargs in {"plain": {}, "checkpointed": {CHECKPOINTING: True}}.items():
        trainer = make_trainer(tmp_path / name, lora_r=4, max_steps=2, **kwargs)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_torch_compile_changes_nothing(tmp_path):
    """The hook that catches what the head would read is another in every call; a graph must not remember the first one's."""
    plain = make_trainer(tmp_path / "plain", max_steps=3)
    compiled = make_trainer(tmp_path / "compiled", max_steps=3, torch_compile=True, torch_compile_backend="aot_eager")
    losses = [trainer.train().training_loss for trainer in (plain, compiled)]
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_router_loss_of_a_mixture_of_experts_is_added(tmp_path):
    model = make_model(family="Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = make_trainer(tmp_path, model=model)
    batch = trainer.data_collator(trainer.train_dataset.pairs)
    with_aux = trainer.compute_loss(model, batch).item()
    model.config.output_router_logits = False
    aux = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).aux_loss
    assert with_aux - trainer.compute_loss(model, batch).item() == pytest.approx(0.5 * aux.item(), rel=1e-4)


# ---- reference cache ----


def cache_files(folder) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def test_reference_cache_is_read_again(tmp_path, monkeypatch):
    options = {"ref_cache_dir": str(tmp_path / "cache")}
    first = make_trainer(tmp_path, **options)
    assert len(cache_files(tmp_path / "cache")) == 1 and not list((tmp_path / "cache").glob("*.tmp"))
    monkeypatch.setattr("entropy_po.trainer.reference_cache._compute", None)  # would fail if it were called
    model = make_model()
    model.config.pad_token_id, model.config.use_cache, model.config._name_or_path = 3, False, "elsewhere"
    second = make_trainer(tmp_path, model=model, **options)
    assert [p.ref_logps for p in first.train_dataset.pairs] == [p.ref_logps for p in second.train_dataset.pairs]


@pytest.mark.parametrize("change", ["model", "one_weight", "config", "data", "boundary", "temperature", "transform"])
def test_reference_cache_of_something_else_is_not_read(change, tmp_path):
    options = {"ref_cache_dir": str(tmp_path / "cache")}
    make_trainer(tmp_path, **options)
    model, rows = make_model(), make_rows()
    if change == "model":
        model = make_model(seed=1)
    elif change == "one_weight":
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    elif change == "config":
        model = make_model(rms_norm_eps=0.1)
    elif change == "data":
        rows[3]["chosen"] += " hot"
    elif change == "boundary":
        first, rest = rows[0]["chosen"], rows[0]["rejected"].split()
        rows[0] = {"prompt": rows[0]["prompt"] + " hot", "chosen": first, "rejected": " " + " ".join(rest)}
    elif change == "temperature":
        options["temperature"] = 0.5
    else:
        model.config.logit_scale = 2.0
        options["check_head"] = False
    make_trainer(tmp_path, model=model, rows=rows, **options)
    assert len(cache_files(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_damaged_reference_cache_is_computed_again_with_one_warning(damage, tmp_path):
    options = {"ref_cache_dir": str(tmp_path / "cache")}
    expected = [pair.ref_logps for pair in make_trainer(tmp_path, **options).train_dataset.pairs]
    (path,) = cache_files(tmp_path / "cache")
    if damage == "foreign":
        make_trainer(tmp_path / "other", model=make_model(seed=1))
        shutil.copy(cache_files(tmp_path / "other" / "reference_logps")[0], path)
    else:
        path.write_bytes(path.read_bytes()[: 40 if damage == "cut" else 0])
    with pytest.warns(UserWarning, match="belongs to another" if damage == "foreign" else "is damaged") as record:
        trainer = make_trainer(tmp_path, **options)
    assert len(record) == 1
    assert [pair.ref_logps for pair in trainer.train_dataset.pairs] == expected
    make_trainer(tmp_path, **options)  # repaired: no warning, which would be an error here


def test_reference_that_is_not_finite_is_named(tmp_path):
    model = make_model()
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="row 0: the reference log-prob is not finite"):
        make_trainer(tmp_path, model=model, check_head=False)


# ---- resume ----


def run_steps(folder, steps: int, resume=None, **kwargs):
    trainer = make_trainer(
        folder,
        max_steps=6,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=2,
        lr_scheduler_type="linear",
        **kwargs,
    )
    trainer.add_callback(StopAt(steps))
    trainer.train(resume)
    return trainer


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_resume_gives_the_losses_of_an_uninterrupted_run(lora, tmp_path):
    whole = run_steps(tmp_path / "whole", 6, lora_r=lora)
    run_steps(tmp_path / "split", 3, lora_r=lora)
    with open(tmp_path / "split" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = run_steps(tmp_path / "split", 6, resume=True, lora_r=lora)
    expected = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert [row["loss"] for row in resumed.state.log_history if "loss" in row] == pytest.approx(expected, rel=1e-6)
    assert torch.equal(final_weights(whole), final_weights(resumed))
    rows = [json.loads(line) for line in (tmp_path / "split" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fault", ["state_missing", "state_cut", "weights_missing", "weights_cut"])
def test_half_written_checkpoint_is_skipped_or_refused(fault, tmp_path):
    run_steps(tmp_path, 6)
    newest = tmp_path / "checkpoint-6"
    state, weights = newest / "trainer_state.json", newest / "model.safetensors"
    sentence = {
        "state_missing": "trainer_state.json is missing",
        "state_cut": "trainer_state.json is cut off",
        "weights_missing": "its weights are missing",
        "weights_cut": "model.safetensors is cut off",
    }[fault]
    target = state if fault.startswith("state") else weights
    if fault.endswith("missing"):
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"checkpoint-6 is incomplete .{sentence}"):
        make_trainer(tmp_path).train(str(newest))
    with pytest.warns(UserWarning, match=sentence):
        assert last_checkpoint(tmp_path).endswith("checkpoint-4")


def test_a_mixture_of_two_runs_is_no_checkpoint(tmp_path, monkeypatch):
    """A run that is killed while it writes to a folder that holds another one's checkpoint of the same step."""
    run_steps(tmp_path, 6)
    with pytest.warns(UserWarning, match=r"checkpoint-6 is of an earlier run.*move it away"):
        run_steps(tmp_path, 2)
    assert checkpoint_fault(tmp_path / "checkpoint-2") is None
    monkeypatch.setattr(PreferenceTrainer, "_save_optimizer_and_scheduler", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="move it away"):
        run_steps(tmp_path, 6)
    assert checkpoint_fault(tmp_path / "checkpoint-2") == "trainer_state.json is missing"


def test_no_checkpoint_to_resume_from(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="has no complete checkpoint; start without it"):
        trainer.train(True)
    with pytest.raises(ValueError, match="no such folder"):
        trainer.train(str(tmp_path / "checkpoint-9"))


def test_fresh_run_keeps_the_rows_of_the_old_one_apart(tmp_path):
    for _ in range(2):
        make_trainer(tmp_path, max_steps=1, logging_steps=1).train()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2  # the step, and the end of training
    assert len((tmp_path / "metrics.jsonl.old").read_text().splitlines()) == 2


def test_tensorboard_when_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    make_trainer(tmp_path, max_steps=1, logging_steps=1, report_to=None).train()
    assert list((tmp_path / "runs").glob("**/events.out.tfevents*"))


def test_progress_bar_is_quiet(tmp_path, capfd):
    make_trainer(tmp_path, max_steps=2, logging_steps=1, disable_tqdm=False).train()
    out, err = capfd.readouterr()
    assert out == "" and "loss=" in err and "{" not in err


# ---- configuration ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fast"}, "strategy='fast' is unknown; choose one of auto, resident, deferred, recompute"),
        ({"method": "kto"}, "method='kto' is unknown; choose one of hdpo, dpo"),
        ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0"),
        ({"beta": -0.1}, "beta must be a finite number > 0, got -0.1"),
        ({"method": "dpo", "alpha": 0.9}, "alpha=0.9 is not read by method='dpo'"),
        ({"method": "qempo"}, "lam must be given for method='qempo'; for example lam=10"),
        ({"method": "qempo_kl", "lam": 10.0}, "mu must be given"),
        ({"method": "qempo_kl", "lam": 10.0, "mu": -1.0}, "mu must be"),
        ({"method": "spl", "beta_s": 0.1}, "alpha_s must be given"),
        ({"loss": "kl"}, "loss='kl' is unknown"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 smooths token labels"),
        ({"nll_coef": -1.0}, "nll_coef=-1.0 must be finite and >= 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number > 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"max_length": 1}, "max_length=1 must be"),
        ({"max_prompt_length": 2000}, "max_prompt_length=2000 leaves no room"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle' is unknown"),
        ({"on_overlong": "skip"}, "on_overlong='skip' is unknown"),
        ({"lora_r": 0}, "lora_r=0 must be"),
        ({"lora_alpha": 32.0}, "lora_alpha=32.0 is read with lora_r alone"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 is read with lora_r alone"),
        ({"lora_target_modules": ["q_proj"]}, r"lora_target_modules=\['q_proj'\] is read with lora_r alone"),
    ],
)
def test_bad_argument_is_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EntropyPOConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("method", METHODS)
def test_config_names_the_objective(method, tmp_path):
    options, a, b = METHODS[method]
    objective = EntropyPOConfig(output_dir=str(tmp_path), method=method, **options).entropy_objective
    assert (objective.policy_coef, objective.ref_coef) == pytest.approx((a, b))


def test_config_defaults(tmp_path):
    args = EntropyPOConfig(output_dir=str(tmp_path))
    assert (args.method, args.beta, args.alpha, args.learning_rate) == ("hdpo", 0.1, 0.9, 1e-6)
    assert EntropyPOConfig(output_dir=str(tmp_path), lora_r=8).learning_rate == 2e-5
    assert args.use_cpu == (not torch.cuda.is_available())


def test_dropped_pairs_are_counted(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_length=3, on_overlong="drop")  # prompts have 2, 3 and 4 words
    assert len(trainer.train_dataset) == 3
    assert "train: dropped 5 pairs longer than max_length=3" in capsys.readouterr().err

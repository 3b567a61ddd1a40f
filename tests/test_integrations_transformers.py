"""`fuse_lm_head` against the models' own logits in fp64, family by family."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).parent))
from test_heads import COMMON, FAMILIES, make_model, padded_batch  # noqa: E402

from entropy_po.integrations.transformers import FusedOutput, fuse_lm_head, unfuse_lm_head  # noqa: E402


def labelled_batch():
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def eager(model, batch):
    """(loss, logps [B, L - 1], entropy [B, L - 1]) from the model's own logits and loss."""
    output = model(**batch)
    log_p = output.logits[:, :-1].log_softmax(-1)
    labels, live = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    logps = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return output.loss, logps * live, -(log_p.exp() * log_p).sum(-1) * live


def assert_close(ours, truth, tolerance):
    assert torch.linalg.norm(ours.double() - truth) <= tolerance * torch.linalg.norm(truth).clamp_min(1e-6)


def assert_same_gradients(model, twin, tolerance):
    for (name, ours), truth in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (ours.grad is None) == (truth[1].grad is None), name
        if ours.grad is not None:
            assert torch.linalg.norm(ours.grad - truth[1].grad) <= tolerance * twin.norm, name


def backward_of(outputs):
    loss, logps, entropy = outputs
    (loss + 0.1 * logps.sum() - 0.2 * entropy.sum()).backward()


def assert_same_as_twin(model, output, twin, batch):
    """Values and gradients, against the eager model in fp64."""
    ours, truth = (output.loss, output.logps, output.entropy), eager(twin, batch)
    for mine, theirs in zip(ours, truth, strict=True):
        assert_close(mine, theirs, 2e-5)
    backward_of(ours)
    backward_of(truth)
    twin.norm = sum(p.grad.norm() ** 2 for p in twin.parameters() if p.grad is not None) ** 0.5
    assert_same_gradients(model, twin, 2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logps_entropy_and_gradients_equal_fp64_logits(family, operator_calls):
    model = make_model(family)
    twin = copy.deepcopy(model).double()
    if hasattr(model.config, "output_router_logits"):
        twin.set_experts_implementation("eager")  # the grouped product knows no fp64
    batch = labelled_batch()
    fuse_lm_head(model)
    operator_calls.clear()
    output = model(**batch)
    assert operator_calls == {"linear_token_stats": 1}
    assert isinstance(output, FusedOutput) and "logits" not in output
    assert_same_as_twin(model, output, twin, batch)
    assert (output.aux_loss is not None) == getattr(model.config, "output_router_logits", False)


@pytest.fixture
def llama():
    return make_model("llama_tied")


def test_without_labels_nothing_changes(llama):
    ids, mask = padded_batch((6, 6))
    before = llama(input_ids=ids, attention_mask=mask).logits
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    answers = llama.generate(ids, **options)
    seen = []
    fuse_lm_head(llama).lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    assert torch.equal(llama(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(llama.generate(ids, **options), answers)
    seen.clear()
    llama(input_ids=ids, labels=ids)
    assert seen == [0]  # the head got no tokens: no logits


def test_labels_shifted_by_the_caller_and_the_number_of_a_whole_step(llama):
    batch = labelled_batch()
    plain = copy.deepcopy(llama)
    fuse_lm_head(llama, outputs=("logps",), temperature=0.5)
    whole = llama(**batch, num_items_in_batch=20)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    output = llama(**inputs, shift_labels=shifted, num_items_in_batch=torch.tensor(20))
    assert whole.entropy is None and output.logps.shape == (2, 9) and whole.logps.shape == (2, 8)
    assert torch.equal(output.logps[:, :-1], whole.logps) and torch.equal(output.loss, whole.loss)
    logits = 2 * plain(**inputs).logits[:, :-1].double()
    truth = -(
        logits.log_softmax(-1).gather(-1, shifted[:, :-1].clamp_min(0)[..., None])[..., 0] * (shifted != -100)[:, :-1]
    )
    assert_close(output.loss, truth.sum() / 20, 1e-5)
    nothing = llama(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert nothing.loss == 0 and nothing.loss.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(llama, autocast):
    batch = labelled_batch()
    twin = copy.deepcopy(llama).double()
    if not autocast:
        llama.bfloat16()
    fuse_lm_head(llama)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = llama(**batch)
    truth = eager(twin, batch)
    for mine, theirs in zip((output.loss, output.logps, output.entropy), truth, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, 0.05)


@pytest.mark.parametrize("whole_head", [False, True])
def test_peft(whole_head, operator_calls):
    model, batch = make_model("llama"), labelled_batch()
    options = {"modules_to_save": ["lm_head"]} if whole_head else {}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config)
    twin = copy.deepcopy(model).double()
    fuse_lm_head(model)
    operator_calls.clear()
    output = model(**batch)
    assert operator_calls["linear_token_stats"] == 1
    assert_same_as_twin(model, output, twin, batch)
    with model.disable_adapter(), twin.disable_adapter():
        assert_close(model(**batch).loss, eager(twin, batch)[0], 2e-5)


def test_an_adapter_on_the_head_is_refused():
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="head carries an adapter"):
        fuse_lm_head(model)
    assert "labels" not in model(input_ids=torch.tensor([[3, 4]]))  # and the model is as it was


def test_a_family_that_multiplies_where_others_divide_is_refused_by_its_numbers():
    config = transformers.HyperCLOVAXConfig(**COMMON, logits_scaling=8.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"off by .* not supported"):
        fuse_lm_head(model)
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 61)


def test_a_model_that_adds_to_its_loss_is_refused(llama):
    loss_function = llama.loss_function
    llama.loss_function = lambda *args, **kwargs: loss_function(*args, **kwargs) + 0.1
    with pytest.raises(ValueError, match="adds something to its loss"):
        fuse_lm_head(llama)


def test_an_unknown_output_is_refused(llama):
    with pytest.raises(ValueError, match=r"outputs=.*'lse'.*must hold 'logps'"):
        fuse_lm_head(llama, outputs=("lse",))


def test_a_copy_has_weights_of_its_own_and_a_second_call_replaces_the_first(llama):
    batch = labelled_batch()
    fuse_lm_head(llama)
    twin = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
    ids = batch["input_ids"]
    uniform = pytest.approx(torch.tensor(61.0).log().item(), rel=1e-5)
    assert twin(**batch).loss.item() != llama(**batch).loss.item() == uniform
    assert twin(ids).logits.abs().sum() > 0 == llama(ids).logits.abs().sum()
    fuse_lm_head(llama, outputs=("logps",))
    assert llama(**batch).entropy is None and llama(ids).logits.shape == (2, 9, 61)
    for _ in range(2):
        assert unfuse_lm_head(llama)(**batch).logits.shape == (2, 9, 61)


def test_the_trainer_of_transformers_takes_the_same_steps(llama, tmp_path, operator_calls):
    """Losses and weights of three steps with accumulation, eager and fused."""
    rows = [{name: x[i] for name, x in labelled_batch().items()} for i in (0, 1)]
    twin = copy.deepcopy(llama)
    fuse_lm_head(llama, outputs=("logps",))
    operator_calls.clear()

    def losses(model, folder):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    ours, theirs = losses(llama, "fused"), losses(twin, "eager")
    assert operator_calls == {"linear_token_stats": 6, "linear_token_stats_backward": 6}
    assert ours == pytest.approx(theirs, rel=1e-4)
    for mine, other in zip(llama.parameters(), twin.parameters(), strict=True):
        assert torch.linalg.norm(mine - other) <= 1e-4 * torch.linalg.norm(other).clamp_min(1)

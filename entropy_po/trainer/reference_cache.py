"""Reference log-probs of every pair, computed once and kept in a file that knows what it was made from."""

import hashlib
import json
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from entropy_po.heads import evaluation_mode, head_of
from entropy_po.trainer.data import PairDataset, pad_rows
from entropy_po.trainer.safety import save_whole

_SAMPLES = 64  # elements of each weight that are hashed in place, beside the sum over all its bits
# Entries of a configuration that change no log-prob; all others might, as that of the rotary embedding does with the same weights.
_IMMATERIAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def attach_reference(
    dataset: PairDataset,
    model: nn.Module,
    logps_of,  # (model, batch of pad_rows) -> summed log-probs [rows], no gradient
    *,
    folder: Path,
    batch_size: int,  # sequences per forward
    pad_token_id: int,
    accelerator,
    settings: dict,  # what else changes the numbers: temperature, precision
    progress: bool,
) -> PairDataset:
    """The dataset with `ref_logps` on every pair, from `folder` where it is there, computed and written otherwise.

    Under PEFT the reference is the model with its adapter disabled; otherwise it is the model as it is now. Ranks
    share the work. The file's name and metadata hold the fingerprint, so a run with another model or other data never
    reads it; a file that cannot be read or does not fit is computed anew, with one warning.

    Raises:
        ValueError: a log-prob that is not finite; the row is named.
    """
    adapter = hasattr(model, "disable_adapter")
    home = next(model.parameters()).device
    if home.type == "meta":
        raise ValueError(
            "model: its weights are not loaded on this rank, and the reference log-probs need them; set "
            "fsdp_cpu_ram_efficient_loading to false, or give pairs that have ref_logps."
        )
    try:
        model.to(accelerator.device)  # before FSDP shards it, a model waits on the CPU
        disabled: Any = model.disable_adapter if adapter else None
        with evaluation_mode(model), torch.no_grad(), disabled() if adapter else nullcontext():
            fingerprint = _fingerprint(model, dataset, settings)
            path = folder / f"ref_logps-{fingerprint[:16]}.safetensors"
            logps = _load(path, fingerprint, len(dataset))
            # All ranks agree: a shared folder may show the file to one of them only.
            if accelerator.num_processes > 1 and bool(accelerator.reduce(_flag(logps is None, accelerator)) > 0):
                logps = None
            if logps is None:
                logps = _compute(dataset, model, logps_of, batch_size, pad_token_id, accelerator, progress)
                if accelerator.is_main_process:
                    save_whole(path, {"ref_logps": logps}, metadata={"fingerprint": fingerprint})
    finally:
        model.to(home)
    pairs = zip(dataset.pairs, logps.tolist(), strict=True)
    return PairDataset([replace(pair, ref_logps=tuple(values)) for pair, values in pairs], dataset.num_dropped)


def _flag(value: bool, accelerator) -> Tensor:
    return torch.tensor(float(value), device=accelerator.device)


def _compute(dataset, model, logps_of, batch_size, pad_token_id, accelerator, progress) -> Tensor:
    """[num_pairs, 2] fp32 on the CPU. Longest first: no padding is wasted, and what does not fit fails at once."""
    sequences = [sequence for pair in dataset.pairs for sequence in pair.sequences()]
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    logps = torch.zeros(len(sequences), dtype=torch.float32)
    for rows in tqdm(mine, desc="reference log-probs", disable=not progress, leave=False, delay=2):
        batch = pad_rows([sequences[i] for i in rows], pad_token_id)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        logps[rows] = logps_of(model, batch).float().cpu()
    if accelerator.num_processes > 1:
        logps = accelerator.reduce(logps.to(accelerator.device), reduction="sum").cpu()
    if not logps.isfinite().all():
        row = int((~logps.isfinite()).nonzero()[0, 0]) // 2
        raise ValueError(f"row {row}: the reference log-prob is not finite; check the model's weights and its dtype.")
    return logps.view(-1, 2)


def _load(path: Path, fingerprint: str, num_pairs: int) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, logps = file.metadata() or {}, file.get_tensor("ref_logps")
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} is damaged ({error}); computing the reference log-probs again.", stacklevel=2)
        return None
    if metadata.get("fingerprint") != fingerprint or logps.shape != (num_pairs, 2):
        warnings.warn(
            f"{path} belongs to another model or data; computing the reference log-probs again.", stacklevel=2
        )
        return None
    return logps


def _fingerprint(model: nn.Module, dataset: PairDataset, settings: dict) -> str:
    """sha256 over weights, configuration, head transform, data and settings; adapters are left out, as the reference has none."""
    digest = hashlib.sha256()
    head = head_of(model)
    config: Any = model.config
    matters = {k: v for k, v in config.to_dict().items() if k not in _IMMATERIAL and not k.endswith("_token_id")}
    transform = {"softcap": head.softcap, "logit_scale": head.logit_scale, "config": matters, **settings}
    digest.update(json.dumps(transform, sort_keys=True, default=str).encode())
    adapters = (
        getattr(getattr(model, "base_model", None), "prefix", None) if hasattr(model, "disable_adapter") else None
    )
    for name, weight in model.named_parameters():
        if adapters is not None and (adapters in name or ".modules_to_save." in name):
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_weight_digest(weight.detach()))
    for pair in dataset.pairs:
        digest.update(f"{pair.chosen_start} {len(pair.chosen_ids)} {pair.rejected_start}".encode())
        digest.update(pair.chosen_ids.tobytes() + pair.rejected_ids.tobytes())
    return digest.hexdigest()


def _weight_digest(weight: Tensor) -> bytes:
    """Sum of all bits as integers, the same on every device and thread count, and a strided sample for their order."""
    bits = weight.contiguous().flatten().view(_BITS[weight.element_size()])
    sample = bits[:: max(1, bits.numel() // _SAMPLES)]
    return bits.sum(dtype=torch.int64).cpu().numpy().tobytes() + sample.cpu().numpy().tobytes()

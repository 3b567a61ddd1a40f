"""Preference pairs and prompts: from the formats in use to token ids, and from those to padded batches.

A row is one pair, in any of these shapes (text stays as it is; messages go through the chat template):

    {"prompt": str,      "chosen": str,      "rejected": str}         text
    {"prompt": messages, "chosen": messages, "rejected": messages}    messages: [{"role": ..., "content": ...}, ...]
    {"prompt": str,      "chosen": messages, "rejected": messages}    whole transcripts, or answers to a user's prompt
    {"chosen": messages, "rejected": messages}                        whole transcripts; the common prefix is the prompt
    {"chosen": str,      "rejected": str}                             whole texts; the common tokens are the prompt
"""

import gzip
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from entropy_po.answers import IGNORE_INDEX
from entropy_po.arguments import choice, whole
from entropy_po.models import adds_end_token

_SURROGATE = re.compile("[\ud800-\udfff]")
TRUNCATION_MODES, ON_OVERLONG = ("keep_start", "keep_end"), ("error", "drop")


@dataclass(frozen=True, eq=False)
class Pair:
    """One tokenised pair: whole sequences (prompt and answer), and where the answer starts in each."""

    chosen_ids: np.ndarray  # [L] int32
    rejected_ids: np.ndarray  # [L'] int32
    chosen_start: int
    rejected_start: int
    ref_logps: tuple[float, float] | None = None

    def sequences(self) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
        """(ids, start) of the chosen, then of the rejected answer."""
        return (self.chosen_ids, self.chosen_start), (self.rejected_ids, self.rejected_start)


class PairDataset(torch.utils.data.Dataset):
    """Tokenised pairs, in memory: 4 bytes a token. `num_dropped` counts the overlong ones left out."""

    def __init__(self, pairs: Sequence[Pair], num_dropped: int = 0):
        self.pairs = list(pairs)
        self.num_dropped = num_dropped

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def load_rows(source, split: str = "train") -> Sequence[dict]:
    """Rows of preference data from a file, a folder, a dataset name, or an object.

    Args:
        source: path of a .jsonl or .jsonl.gz file, folder of `Dataset.save_to_disk`, any name or path that
            `datasets.load_dataset` takes, a datasets.Dataset, or a list of dicts.
        split: which one, where the source has several.
    Returns:
        A sequence of dicts, not yet checked for columns.
    Raises:
        FileNotFoundError: a path that does not exist; ValueError: a line that is not JSON, no such split, no rows.
    """
    name = str(source) if isinstance(source, str | Path) else "the dataset"
    rows = _open_source(source, split) if isinstance(source, str | Path) else source
    if isinstance(rows, bytes) or not hasattr(rows, "__len__"):
        raise ValueError(
            f"the dataset is {type(rows).__name__}; give a path, a dataset's name, a Dataset or a list of dicts."
        )
    if isinstance(rows, dict):
        if split not in rows:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, rows))}.")
        rows = rows[split]
    if len(rows) == 0:
        raise ValueError(f"{name} is empty; training needs at least one row.")
    return rows


def _open_source(source: str | Path, split: str):
    path = Path(source).expanduser()
    if path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".ndjson")):
        if not path.is_file():
            raise FileNotFoundError(
                f"{source}: no such file; give a .jsonl file, a datasets folder or a dataset's name."
            )
        return _read_jsonl(path)
    import datasets

    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        return datasets.load_from_disk(str(path))
    if path.suffix in (".json", ".parquet", ".csv") and path.is_file():
        return datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
    named = str(source).strip() not in ("", "/")
    if not named or (not path.is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source))):
        raise FileNotFoundError(f"{source}: no such file or folder, and no dataset's name.")  # do not ask a hub for it
    try:
        return datasets.load_dataset(str(source))
    except OSError as error:
        why = str(error).partition("\n")[0]
        raise FileNotFoundError(f"{source}: neither a file nor a dataset that could be loaded ({why}).") from error


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})."
                    ) from error
                except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets 1,000 deep
                    raise ValueError(f"{path}, line {number}: cannot be read as JSON ({error}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}.")
                rows.append(row)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 lines of JSON ({error}).") from error
    return rows


def tokenize_pairs(
    rows: Iterable[dict],
    tokenizer,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    on_overlong: str = "error",
    progress: bool = False,
) -> PairDataset:
    """Token ids of every pair, with the boundary between prompt and answer.

    The boundary is where the tokens of the prompt alone and of prompt plus answer part, as TRL has it: a token that
    spans the boundary counts as answer. Plain text gets an end-of-sequence token; templates bring their own.

    Args:
        rows: as `load_rows` gives them.
        tokenizer: a transformers tokenizer; with a chat template if there are messages.
        max_length: longest sequence. Over it `truncation_mode` "keep_start" cuts the answer's end, "keep_end" the
            prompt's start and then the answer's.
        max_prompt_length: of a longer prompt the end is kept, before `max_length` is looked at.
        on_overlong: "error", or "drop" for pairs of which no difference is left within `max_length`.
        progress: show a bar.
    Returns:
        PairDataset; never empty.
    Raises:
        ValueError: a row that is no pair, named by its number (from 0), or nothing left.
    """
    whole("max_length", max_length, 2, "it counts prompt and answer tokens")
    if max_prompt_length is not None:
        whole("max_prompt_length", max_prompt_length, 1, "leave it out for no limit of its own")
    choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    choice("on_overlong", on_overlong, ON_OVERLONG)
    pairs, dropped = [], 0
    for number, row in enumerate(tqdm(rows, desc="tokenizing", disable=not progress, leave=False, delay=2)):
        try:
            _check_row(row)
            prompt_length, chosen, rejected = _token_ids(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        shortened = [
            _truncate(ids, prompt_length, max_length, max_prompt_length, truncation_mode) for ids in (chosen, rejected)
        ]
        (chosen, chosen_start), (rejected, rejected_start) = shortened
        full = chosen_start >= len(chosen) or rejected_start >= len(rejected)
        if full or chosen[chosen_start:] == rejected[rejected_start:]:
            if on_overlong == "error":
                raise ValueError(
                    f"row {number}: the prompt has {prompt_length} tokens, and max_length={max_length} leaves no "
                    'difference between its answers; raise max_length, or set on_overlong="drop".'
                )
            dropped += 1
            continue
        arrays = np.array(chosen, np.int32), np.array(rejected, np.int32)
        pairs.append(Pair(*arrays, chosen_start, rejected_start))
    if not pairs:
        why = f": all {dropped} pairs are longer than max_length={max_length}" if dropped else ""
        raise ValueError(f"the dataset is empty{why}; training needs at least one pair.")
    return PairDataset(pairs, dropped)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt to answer: its row of the dataset, whose further columns the reward functions see, and its token ids."""

    row: dict
    ids: list[int]

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.row["prompt"], str)


def tokenize_prompts(rows: Iterable[dict], tokenizer, *, max_prompt_length: int | None = None) -> list[Prompt]:
    """Token ids of every row's `prompt`: text as it is, messages through the chat template, up to where the answer starts.

    Raises:
        ValueError: a row without a prompt, named by its number (from 0), or no rows.
    """
    prompts, end = [], int(adds_end_token(tokenizer))
    for number, row in enumerate(rows):
        try:
            _check_row(row)
            prompt = row.get("prompt")
            if not prompt or not isinstance(prompt, str | list):
                raise ValueError(f"prompt is {reprlib.repr(prompt)}; give text or a list of messages.")
            if isinstance(prompt, str):
                ids = tokenizer(prompt)["input_ids"]
                ids = ids[: len(ids) - end]
            else:
                _check_messages(prompt)
                ids = _template(tokenizer, prompt, add_generation_prompt=True)
            if not ids:
                raise ValueError("prompt has no tokens; give text that the tokenizer reads.")
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        prompts.append(Prompt(row, list(ids)[-max_prompt_length:] if max_prompt_length else list(ids)))
    if not prompts:
        raise ValueError("the dataset is empty; training needs at least one row.")
    return prompts


def _check_row(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"it is {type(row).__name__}, not an object with columns such as prompt.")
    for name in ("prompt", "chosen", "rejected"):
        _check_characters(name, row.get(name))


def _check_characters(name: str, text: Any) -> None:
    """JSON can hold half of a surrogate pair; no tokenizer takes it."""
    if isinstance(text, str) and _SURROGATE.search(text):
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character; repair the file.")


def _check_messages(messages: Iterable) -> None:
    for message in messages:
        if not (isinstance(message, dict) and "role" in message and "content" in message):
            raise ValueError(f'a message must have "role" and "content"; got {reprlib.repr(message)}.')
        _check_characters("a message", message["content"])


def _token_ids(row: dict, tokenizer) -> tuple[int, list[int], list[int]]:
    """(prompt tokens, ids of prompt + chosen, ids of prompt + rejected) of one row."""
    for name in ("chosen", "rejected"):
        if not row.get(name):
            state = (
                f"is {row[name]!r}" if name in row else f"is missing (columns: {', '.join(map(str, row)) or 'none'})"
            )
            raise ValueError(f"{name} {state}; a pair needs an answer in both chosen and rejected.")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(prompt, list) or isinstance(chosen, list) or isinstance(rejected, list):
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected)
        if chosen == rejected:
            raise ValueError("chosen and rejected are equal; a pair needs two different answers.")
        head = _template(tokenizer, prompt, add_generation_prompt=True)
        answers = [_template(tokenizer, prompt + answer) for answer in (chosen, rejected)]
    else:
        for name, value in (("prompt", prompt or ""), ("chosen", chosen), ("rejected", rejected)):
            if not isinstance(value, str):
                raise ValueError(f"{name} has type {type(value).__name__}; give text or a list of messages.")
        if chosen == rejected:
            raise ValueError("chosen and rejected are equal; a pair needs two different answers.")
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answers = [tokenizer((prompt or "") + answer)["input_ids"] for answer in (chosen, rejected)]
        answers = [ids if ids[-1:] == eos else ids + eos for ids in answers]
        # Without a prompt the shared tokens are one. They add the same to both log-probs, so the margin loses nothing.
        head = tokenizer(prompt)["input_ids"] if prompt is not None else answers[0]
    length = min(_common_prefix(head, ids) for ids in answers)
    if answers[0] == answers[1]:
        raise ValueError("chosen and rejected are equal once tokenised; a pair needs two different answers.")
    if length >= min(map(len, answers)):
        raise ValueError(
            "an answer has no tokens of its own; both chosen and rejected must add something to the prompt."
        )
    return length, answers[0], answers[1]


def _split_messages(prompt, chosen, rejected) -> tuple[list, list, list]:
    """Prompt and answers as message lists, from any mixture of text, messages and whole transcripts."""
    for name, value in (("prompt", prompt or ""), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
            raise ValueError(f"{name} has type {type(value).__name__}; give text or a list of messages.")
    answers = [
        [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        for answer in (chosen, rejected)
    ]
    _check_messages([*(prompt if isinstance(prompt, list) else ()), *answers[0], *answers[1]])
    transcripts = all(answer[0]["role"] in ("system", "user") for answer in answers)
    if prompt and not transcripts:
        return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}], answers[0], answers[1]
    shared = _common_prefix(*answers)
    if answers[0] == answers[1]:
        return [], answers[0], answers[1]
    if shared == 0:
        raise ValueError(
            "chosen and rejected share no first message, and there is no prompt; add the prompt to the row."
        )
    return answers[0][:shared], answers[0][shared:], answers[1][shared:]


def _template(tokenizer, messages: list[dict], **kwargs) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("it holds messages, and the tokenizer has no chat template; set one, or give text.")
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def _common_prefix(first: Sequence, second: Sequence) -> int:
    length = 0
    for one, other in zip(first, second):  # noqa: B905  # the shorter one ends it
        if one != other:
            break
        length += 1
    return length


def _truncate(ids: list[int], start: int, max_length: int, max_prompt: int | None, mode: str) -> tuple[list[int], int]:
    if max_prompt is not None and start > max_prompt:
        ids, start = ids[start - max_prompt :], max_prompt
    excess = len(ids) - max_length
    if excess <= 0:
        return ids, start
    return (ids[:max_length], start) if mode == "keep_start" else (ids[excess:], max(0, start - excess))


@dataclass(frozen=True)
class PairCollator:
    """Pads pairs to one batch of rows chosen_0, rejected_0, chosen_1, ...

    Returns a dict of input_ids, attention_mask and labels, each [2B, L] int64, right-padded, labels not shifted and
    -100 at prompt and padding; and ref_logps [B, 2] fp32 where the pairs have them.
    """

    pad_token_id: int = 0

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        if not isinstance(pairs[0], Pair):
            raise ValueError(
                f"the dataset has {type(pairs[0]).__name__} where tokenised pairs are expected; give rows to "
                "PreferenceTrainer(train_dataset=..., eval_dataset=...), or through tokenize_pairs."
            )
        rows = [sequence for pair in pairs for sequence in pair.sequences()]
        batch = pad_rows(rows, self.pad_token_id)
        if all(pair.ref_logps is not None for pair in pairs):
            batch["ref_logps"] = torch.tensor([pair.ref_logps for pair in pairs], dtype=torch.float32)
        return batch


def pad_rows(rows: Sequence[tuple[np.ndarray, int]], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [len(rows), L] from (ids, start of the answer)."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for i, (ids, start) in enumerate(rows):
        values = torch.from_numpy(ids.astype(np.int64))
        input_ids[i, : len(ids)] = values
        attention_mask[i, : len(ids)] = 1  # by length, never by token id: the pad token may be the end-of-sequence one
        labels[i, start : len(ids)] = values[start:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

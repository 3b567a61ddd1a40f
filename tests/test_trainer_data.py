"""Preference data: every format gives the right tokens and boundary, every bad input a sentence that names it."""

import gzip
import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from entropy_po.models import adds_end_token  # noqa: E402
from entropy_po.trainer.data import (  # noqa: E402
    Pair,
    PairCollator,
    PairDataset,
    load_rows,
    tokenize_pairs,
    tokenize_prompts,
)

WORDS = "<pad> <eos> <unk> <user> <assistant> <end> is sky the blue green what color why red sun hot cold"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT_PROMPT = [{"role": "user", "content": "what color is the sky"}]
BLUE, GREEN = ([{"role": "assistant", "content": word}] for word in ("blue", "green"))
TEXT_ROW = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}


def make_tokenizer(chat: bool = True):
    """One token per word: lengths can be counted by eye."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_tokenizer_that_ends_texts():
    """As some Llamas' do; without a chat template, which would end messages itself."""
    tokenizer = make_tokenizer(chat=False)
    end = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = end
    return tokenizer


def decoded(pair: Pair, tokenizer) -> list[tuple[str, str]]:
    """(prompt, answer) of the chosen and of the rejected sequence, as words."""
    words = [[tokenizer.convert_ids_to_tokens(int(i)) for i in ids] for ids, _ in pair.sequences()]
    starts = pair.chosen_start, pair.rejected_start
    return [(" ".join(w[:start]), " ".join(w[start:])) for w, start in zip(words, starts, strict=True)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_a_prompt_has_no_end_token_even_where_the_tokenizer_adds_one(tokenizer):
    ends = make_tokenizer_that_ends_texts()
    assert adds_end_token(ends) and not adds_end_token(tokenizer)
    rows = [{"prompt": "the sky is"}, {"prompt": "why"}]
    made = [[prompt.ids for prompt in tokenize_prompts(rows, one)] for one in (ends, make_tokenizer(chat=False))]
    assert made[0] == made[1] and len(made[0][0]) == 3
    (pair,) = tokenize_pairs([TEXT_ROW], ends).pairs
    assert decoded(pair, ends) == [TEXT[:2], (TEXT[0], TEXT[2])]


CHAT = ("<user> what color is the sky <end> <assistant>", "blue <end>", "green <end>")
TEXT = ("the sky is", "blue <eos>", "green <eos>")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(TEXT_ROW, TEXT, id="text"),
        pytest.param({"prompt": CHAT_PROMPT, "chosen": BLUE, "rejected": GREEN}, CHAT, id="messages"),
        pytest.param({"prompt": CHAT_PROMPT, "chosen": "blue", "rejected": "green"}, CHAT, id="text-answers"),
        pytest.param({"chosen": CHAT_PROMPT + BLUE, "rejected": CHAT_PROMPT + GREEN}, CHAT, id="transcripts"),
        pytest.param(
            {"prompt": "x", "chosen": CHAT_PROMPT + BLUE, "rejected": CHAT_PROMPT + GREEN}, CHAT, id="prompt-twice"
        ),
        pytest.param({"prompt": CHAT_PROMPT[0]["content"], "chosen": BLUE, "rejected": GREEN}, CHAT, id="text-prompt"),
        pytest.param({"chosen": "the sky is blue", "rejected": "the sky is green"}, TEXT, id="whole-texts"),
    ],
)
def test_every_format_gives_prompt_and_answers(row, expected, tokenizer):
    (pair,) = tokenize_pairs([row], tokenizer).pairs
    prompt, chosen, rejected = expected
    assert decoded(pair, tokenizer) == [(prompt, chosen), (prompt, rejected)]


def test_whole_texts_of_which_one_starts_the_other(tokenizer):
    (pair,) = tokenize_pairs([{"chosen": "the sky", "rejected": "the sky is blue"}], tokenizer).pairs
    assert decoded(pair, tokenizer) == [("the sky", "<eos>"), ("the sky", "is blue <eos>")]


def test_prompt_that_is_no_token_prefix_moves_the_boundary_back():
    """A token that spans the boundary is part of the answer: "ab" + "c" becomes a, bc."""
    vocab = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "ab": 5, "bc": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("b", "c"), ("a", "b")]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    (pair,) = tokenize_pairs([{"prompt": "ab", "chosen": "c", "rejected": "d"}], tokenizer).pairs
    assert pair.chosen_ids.tolist() == [1, 6, 0] and pair.rejected_ids.tolist() == [5, 4, 0]
    assert pair.chosen_start == pair.rejected_start == 0


@pytest.mark.parametrize("kind", ["jsonl", "gz", "folder", "dict_folder", "dataset", "list", "hub_path"])
def test_every_source_gives_the_same_rows(kind, tmp_path):
    rows = [TEXT_ROW, {**TEXT_ROW, "chosen": " red"}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    path = tmp_path / "data"
    if kind == "jsonl":
        path = tmp_path / "pairs.jsonl"
        path.write_text(lines)
    elif kind == "gz":
        path = tmp_path / "pairs.jsonl.gz"
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "hub_path":
        path.mkdir()
        (path / "train.jsonl").write_text(lines.strip())
    elif kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "dict_folder":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    else:
        path = rows if kind == "list" else datasets.Dataset.from_list(rows)
    assert list(load_rows(path)) == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "rejected": "b"}, r"row 1: chosen is missing \(columns: prompt, rejected\)"),
        ({"prompt": "a", "chosen": "b"}, "row 1: rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "row 1: rejected is ''"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "row 1: chosen is None"),
        ({"prompt": "a", "chosen": "sky", "rejected": "sky"}, "row 1: chosen and rejected are equal"),
        ({"prompt": "a", "chosen": " sky", "rejected": "  sky"}, "row 1: .* equal once tokenised"),
        ({"prompt": CHAT_PROMPT, "chosen": BLUE, "rejected": BLUE}, "row 1: chosen and rejected are equal"),
        ({"chosen": CHAT_PROMPT + BLUE, "rejected": CHAT_PROMPT + BLUE}, "row 1: chosen and rejected are equal"),
        ({"chosen": CHAT_PROMPT + BLUE, "rejected": CHAT_PROMPT}, "row 1: an answer has no tokens of its own"),
        ({"chosen": BLUE, "rejected": GREEN}, "row 1: .*share no first message"),
        ({"prompt": CHAT_PROMPT, "chosen": [{"text": "x"}], "rejected": BLUE}, 'row 1: a message must have "role"'),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "row 1: prompt has type int"),
    ],
)
def test_bad_row_is_named(row, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_pairs([TEXT_ROW, row], tokenizer)


def test_messages_without_a_chat_template():
    with pytest.raises(ValueError, match=r"row 0: .*no chat template"):
        tokenize_pairs([{"prompt": CHAT_PROMPT, "chosen": BLUE, "rejected": GREEN}], make_tokenizer(chat=False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: expected an object, got list"),
        (b"\n\n", "is empty"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_bad_jsonl_names_the_line(content, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_cut_off_gzip(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(path)


def test_missing_file_and_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no dataset's name"):
        load_rows(str(tmp_path / "none"))  # at once, without asking a hub
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list([TEXT_ROW])})
    with pytest.raises(ValueError, match="no split 'train'; it has test"):
        load_rows(splits)
    with pytest.raises(ValueError, match="is empty"):
        load_rows([])


LONG = {"prompt": "the sky is the sky is", "chosen": " blue hot hot", "rejected": " green hot hot"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_length": 8}, [("the sky is the sky is", "blue hot"), ("the sky is the sky is", "green hot")]),
        (
            {"max_length": 8, "truncation_mode": "keep_end"},
            [("is the sky is", "blue hot hot <eos>"), ("is the sky is", "green hot hot <eos>")],
        ),
        (
            {"max_length": 5, "max_prompt_length": 2},
            [("sky is", "blue hot hot"), ("sky is", "green hot hot")],
        ),
    ],
)
def test_truncation(options, expected, tokenizer):
    (pair,) = tokenize_pairs([LONG], tokenizer, **options).pairs
    assert decoded(pair, tokenizer) == expected


def test_overlong_prompt_is_an_error_or_dropped_and_counted(tokenizer):
    with pytest.raises(ValueError, match=r"row 1: the prompt has 6 tokens, and max_length=6 leaves .*on_overlong"):
        tokenize_pairs([TEXT_ROW, LONG], tokenizer, max_length=6)
    dataset = tokenize_pairs([TEXT_ROW, LONG, LONG], tokenizer, max_length=6, on_overlong="drop")
    assert len(dataset) == 1 and dataset.num_dropped == 2
    with pytest.raises(ValueError, match="all 1 pairs are longer than max_length=6"):
        tokenize_pairs([LONG], tokenizer, max_length=6, on_overlong="drop")


def test_answers_that_differ_only_past_max_length_are_overlong(tokenizer):
    row = {"prompt": "the", "chosen": " hot hot hot red", "rejected": " hot hot hot blue"}
    with pytest.raises(ValueError, match="leaves no difference"):
        tokenize_pairs([row], tokenizer, max_length=4)


def test_collator_packs_chosen_and_rejected_right_padded(tokenizer):
    dataset = tokenize_pairs([LONG, TEXT_ROW], tokenizer)
    batch = PairCollator(tokenizer.pad_token_id)([dataset[0], dataset[1]])
    lengths = [10, 10, 5, 5]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert "ref_logps" not in batch
    for row, (ids, start) in enumerate(s for pair in dataset.pairs for s in pair.sequences()):
        assert batch["input_ids"][row, : lengths[row]].tolist() == ids.tolist()
        assert batch["input_ids"][row, lengths[row] :].eq(tokenizer.pad_token_id).all()
        assert batch["labels"][row, :start].eq(-100).all() and batch["labels"][row, lengths[row] :].eq(-100).all()
        assert batch["labels"][row, start : lengths[row]].tolist() == ids[start:].tolist()


def test_collator_keeps_answer_tokens_equal_to_the_pad_token():
    ids = np.array([4, 5, 0], np.int32)
    pair = Pair(ids, ids[::-1].copy(), 1, 1, ref_logps=(-1.0, -2.0))
    batch = PairCollator(pad_token_id=0)([pair])
    assert batch["attention_mask"].all() and batch["labels"][0].tolist() == [-100, 5, 0]
    assert torch.equal(batch["ref_logps"], torch.tensor([[-1.0, -2.0]]))


def test_pair_dataset_is_a_torch_dataset(tokenizer):
    dataset = tokenize_pairs(datasets.Dataset.from_list([TEXT_ROW] * 3), tokenizer)
    assert isinstance(dataset, torch.utils.data.Dataset | PairDataset) and len(dataset) == 3

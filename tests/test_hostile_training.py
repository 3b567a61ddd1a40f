"""What tests/test_hostile.py does to the operators, done to what a training run is given: its arguments, rows and files."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
from hostile import NAN, STRANGE_NUMBERS, STRANGE_WORDS, complaints

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from test_trainer_data import BLUE, CHAT_PROMPT, GREEN, TEXT_ROW, make_tokenizer  # noqa: E402

from entropy_po import cli  # noqa: E402
from entropy_po.heads import check_head, head_of  # noqa: E402
from entropy_po.integrations.transformers import fuse_lm_head  # noqa: E402
from entropy_po.models import load_model, load_tokenizer  # noqa: E402
from entropy_po.trainer import EntropyPOConfig, OnlineConfig, PairCollator, load_rows, tokenize_pairs  # noqa: E402
from entropy_po.trainer.data import tokenize_prompts  # noqa: E402

CONFIGS = {
    EntropyPOConfig: {"method": "hdpo"},
    OnlineConfig: {"method": "qempo_kl", "lam": 2.0, "mu": 0.1, "min_reward": 0.5, "max_kl": 2.0},
}
INHERITED = {field.name for field in fields(transformers.TrainingArguments)}
ARGUMENTS = [
    pytest.param(config, field, id=f"{config.__name__}-{field.name}")
    for config in CONFIGS
    for field in fields(config)
    if field.name not in INHERITED
]
# What a number may be that means something: each argument's own range is in test_trainer.py and test_online.py.
SANE = {"zero", "negative", "tiny", "huge", "int", "numpy", "None", "3", "0.5"}
TEXT = {"a word", "''", "'nonsense'", "'torch'", "'cpp'", "'cuda'", "'triton'", "None"}

STRANGE_CONTENT = [
    None,
    "",
    3,
    1.5,
    NAN,
    True,
    b"blue",
    [],
    [3],
    [None],
    [{}],
    [{"role": "user"}],
    [{"content": "x"}],
    {},
    [[]],
]
STRANGE_CONTENT += [
    [{"role": 3, "content": 4}],
    [{"role": None, "content": None}],
    {"role": "user", "content": "x"},
    object(),
]
STRANGE_CONTENT += [
    "\0",
    "\ud800",
    " ",
    "is " * 5000,
    [{"role": "user", "content": ["x"]}],
    ["is", "sky"],
    [[{"role": "user", "content": "x"}]],
]
ROWS = {"text": TEXT_ROW, "chat": {"prompt": CHAT_PROMPT, "chosen": BLUE, "rejected": GREEN}}


@pytest.mark.parametrize("config, field", ARGUMENTS)
def test_an_argument_is_refused_by_name_or_kept(config, field, tmp_path):
    problems = []
    for what, value in [*STRANGE_NUMBERS, *((repr(word), word) for word in STRANGE_WORDS)]:
        try:
            args = config(**{"output_dir": str(tmp_path), **CONFIGS[config], field.name: value})
            if config is OnlineConfig:
                args.dual_ascent()
        except Exception as error:
            # a method of another name has other arguments, one of which is then the surplus one
            problems += complaints(what, error, [field.name] + ["method"] * (field.name in ("method", "lam", "mu")))
            continue
        hint = get_type_hints(config)[field.name]
        sane = TEXT if hint is str or str in get_args(hint) else SANE
        flag = hint is bool and value is True
        ratios = field.name in ("reward_weights", "reward_funcs", "lora_target_modules") and isinstance(value, list)
        if not (what in sane or value is None or flag or ratios):
            problems.append(f"{what}: accepted")
    assert not problems, "\n".join([f"{config.__name__}, {field.name}:", *problems])


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_refused_by_its_number_or_becomes_a_pair(kind, column):
    tokenizer, problems = make_tokenizer(), []
    for value in STRANGE_CONTENT:
        try:
            (pair,) = tokenize_pairs([{**ROWS[kind], column: value}], tokenizer).pairs
        except Exception as error:
            problems += complaints(repr(value)[:60], error, ["row 0"])
            continue
        batch = PairCollator()([pair])
        answered = (batch["labels"] != -100).sum(1)
        if not bool((answered > 0).all()) or bool((batch["input_ids"] < 0).any()):
            problems.append(f"{value!r}: a pair without an answer: {pair}")
    assert not problems, "\n".join(problems)


def test_a_prompt_is_refused_by_its_number_or_has_tokens():
    tokenizer, problems = make_tokenizer(), []
    for value in STRANGE_CONTENT:
        try:
            (prompt,) = tokenize_prompts([{"prompt": value}], tokenizer)
        except Exception as error:
            problems += complaints(repr(value)[:60], error, ["row 0"])
            continue
        if not prompt.ids:
            problems.append(f"{value!r}: a prompt without tokens")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("tokenize", [tokenize_pairs, tokenize_prompts])
@pytest.mark.parametrize("rows", [[None], ["text"], [3], [[]], [{}], [], [{"prompt": "x"}, None]])
def test_rows_that_are_none(tokenize, rows):
    with pytest.raises(ValueError, match=r"row [01]|empty"):
        tokenize(rows, make_tokenizer())


@pytest.mark.parametrize(
    "name, value", [(n, v) for n in ("max_length", "max_prompt_length") for v in (0, -1, 1.5, "12", NAN, True, [3])]
)
def test_a_length_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        tokenize_pairs([TEXT_ROW], make_tokenizer(), **{name: value})


@pytest.mark.parametrize("name", ["truncation_mode", "on_overlong"])
def test_a_choice_is_refused_by_name(name):
    for value in STRANGE_WORDS:
        with pytest.raises(ValueError, match=name):
            tokenize_pairs([TEXT_ROW], make_tokenizer(), **{name: value})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"a": 1}{"b": 2}',
        b"\x1f\x8b\x08",
        b"{" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_file_is_refused_by_its_name(content, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows"):
        load_rows(path)


@pytest.mark.parametrize(
    "source",
    [None, 3, 1.5, {}, [], "", "no such/file with blanks", "/", "~", "\0", b"rows.jsonl", object(), ".", "rows.jsonl"],
)
def test_a_source_is_refused(source):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_rows(source)
    assert 0 < len(str(error.value)) < 400


@pytest.mark.parametrize(
    "command, flags",
    [
        ("plan", ("tokens", "vocab", "hidden", "gpus", "vocab_ranks", "sequence_ranks", "workspace_bytes")),
        ("evaluate", ("samples", "max_new_tokens", "limit", "temperature")),
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400", "x", "", "1.5", "9" * 50, "\u0663"])
def test_a_flag_is_refused_by_name(command, flags, value, capsys):
    """Exit status 2 and a line that names the flag, from argparse or from here; or the command's own result."""
    given = {"plan": ["--tokens", "64"], "evaluate": ["--model", "no/such-model", "--prompts", "/no/such/file"]}[
        command
    ]
    for flag in flags:
        try:
            status = cli.main([command, *given, f"--{flag}={value}"])
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        if command == "plan" and status == 0:
            assert "nan" not in said.out, (flag, value)
            continue
        assert status == 2, (flag, value)
        assert flag in said.err or "/no/such/file" in said.err or "ranks must divide" in said.err, (
            flag,
            value,
            said.err,
        )


@pytest.mark.parametrize("function", [fuse_lm_head, check_head, head_of])
@pytest.mark.parametrize("model", [None, 3, "gpt2", b"gpt2", [], object(), torch.nn.Module(), torch.nn.Linear(2, 2)])
def test_what_is_no_language_model_is_refused_as_such(function, model):
    with pytest.raises(ValueError, match=r"^model: .* no output embeddings; give a causal language model"):
        function(model)


@pytest.mark.parametrize("function", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", [None, 3, "", b"gpt2", [], ["gpt2"], object(), torch.nn.Linear(2, 2)])
def test_what_names_no_model_is_refused_as_such(function, name):
    with pytest.raises(ValueError, match="name_or_path must be a hub id or a folder, got "):
        function(name)

"""The command line: what it runs, what it says about mistakes, and in how many lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("datasets")

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer import make_model, make_rows  # noqa: E402
from test_trainer_data import make_tokenizer  # noqa: E402

from entropy_po import cli  # noqa: E402


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return path


@pytest.fixture
def flags(model_folder, data, tmp_path):
    flags = f"--model {model_folder} --train_data {data} --output_dir {tmp_path / 'out'} --report_to none"
    return [*flags.split(), "--max_steps", "2", "--logging_steps", "1"]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def failure(capsys, argv: list[str]) -> str:
    """The one line that a failing command prints."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return err


def test_train_with_flags(flags, data, tmp_path, capfd):
    flags += ["--method", "hdpo", "--beta", "0.2", "--alpha", "0.8", "--eval_data", str(data)]
    assert cli.main(["train", *flags]) == 0
    out, err = capfd.readouterr()
    assert "method hdpo (a=0.16 on log pi, b=0.2 on log ref)" in out and "2 steps, loss" in out
    assert "eval accuracy" in out and "Warning" not in err and "Writing" not in err
    assert rows_of(tmp_path / "out")[0]["step"] == 1
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_train_from_yaml_with_overrides(model_folder, data, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {model_folder}\ntrain_data: {data}\noutput_dir: {tmp_path / 'out'}\nreport_to: none\n"
        "method: qempo\nlam: 5\nlearning_rate: 1e-3\nmax_steps: 3\nlogging_steps: 1\ndisable_tqdm: true\n"
        "lora_r: 2\nlora_target_modules: [q_proj, v_proj]\nsave_strategy: 'no'\n"
    )
    assert cli.main(["train", str(config), "--max_steps", "1", "--lam", "10"]) == 0
    assert "method qempo (a=0.1 on log pi, b=0 on log ref)" in capsys.readouterr().out
    (row, *_) = rows_of(tmp_path / "out")
    assert row["step"] == 1 and row["learning_rate"] == 1e-3
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}


def test_train_resumes(flags, tmp_path):
    assert cli.main(["train", *flags, "--save_steps", "1"]) == 0
    flags[flags.index("--max_steps") + 1] = "3"
    assert cli.main(["train", *flags, "--resume_from_checkpoint", "true"]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "out") if "loss" in row] == [1, 2, 3]


REWARD = (
    "def even(completion_ids, **_):\n    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]\n"
)


@pytest.fixture
def online_flags(model_folder, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the sky is"}\n{"prompt": "why"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags = (
        f"--model {model_folder} --train_data prompts.jsonl --output_dir out --report_to none --method qempo --lam 50"
    )
    flags += " --max_steps 2 --logging_steps 1 --max_completion_length 4 --num_generations 2"
    return flags.split()


def test_train_online_with_a_reward_of_the_users(online_flags, tmp_path, capfd):
    flags = ["--reward_funcs", "my_rewards:even", "--min_reward", "0.1", "--dual_tolerance", "1"]
    assert cli.main(["train-online", *online_flags, *flags, "--eval_data", "prompts.jsonl"]) == 0
    out, err = capfd.readouterr()
    assert "2 prompts, method qempo (a=0.02 on log pi, b=0 on log ref)" in out and "2 steps, eval reward" in out
    assert "constraints: mean reward" in out and "meets R=0.1" in out and "Warning" not in err
    assert "rewards/even" in rows_of(tmp_path / "out")[0]
    assert json.loads((tmp_path / "out" / "dual.json").read_text())["updates"] == 2
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "reward_funcs must be one function or more"),
        (["--reward_funcs", "my_rewards:odd"], "module my_rewards has no odd"),
        (["--reward_funcs", "my_rewards:even", "--generation", "vllm"], "needs the package vllm"),
        (["--reward_funcs", "my_rewards:even", "--beta", "1"], "beta=1 is not read by method='qempo'"),
    ],
)
def test_online_errors_are_one_line(extra, message, online_flags, capsys):
    assert cli.main(["train-online", *online_flags, *extra, "--disable_tqdm", "true"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("entropy-po train-online: ") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--alpha", "0"], "alpha must be a finite number > 0"),
        (["--alpha", "x"], "argument --alpha: invalid float value: 'x'"),
        (["--alhpa", "1"], "no option --alhpa; did you mean --alpha?"),
        (["--method", "qempo"], "lam must be given"),
        (["--train_data", "none.jsonl"], "none.jsonl: no such file"),
        (["--model", "/no/such/model"], "model: /no/such/model: no such folder"),
        (["--dtype", "float7"], "dtype: got 'float7'"),
        (["--max_length", "2"], "row 0: the prompt has 2 tokens"),
        (["--resume_from_checkpoint", "true"], "has no complete checkpoint"),
    ],
)
def test_user_errors_are_one_line(extra, message, flags, capsys):
    assert cli.main(["train", *flags, *extra, "--disable_tqdm", "true"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("entropy-po train: ") and message in err and err.count("\n") == 1, err
    assert out.count("\n") <= 1  # what it is about to do, at most


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: hdpo\n", "no option 'metod'; did you mean method?"),
        ("beta: [\n", "not YAML"),
        ("hdpo\n", "expected lines of"),
        ("beta: many\n", "beta='many' is no float"),
        ("method: hdpo\n", "the following arguments are required: --model, --train_data"),
    ],
)
def test_bad_yaml_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert message in failure(capsys, ["train", str(path)])


def test_missing_yaml(capsys):
    assert "none.yaml: no such file" in failure(capsys, ["train", "none.yaml"])


def test_unknown_command_names_the_nearest(capsys):
    assert "did you mean train?" in failure(capsys, ["trian"])
    assert "it has demo, train" in failure(capsys, ["fly"])


def test_traceback_on_request(flags, monkeypatch):
    with pytest.raises(ValueError, match="alpha"):
        cli.main(["train", *flags, "--alpha", "0", "--traceback"])
    monkeypatch.setenv("ENTROPY_PO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "none.yaml"])


def test_commands_are_handed_their_arguments_and_status(monkeypatch):
    import types

    seen = []
    for name, (module, _) in cli.COMMANDS.items():
        if name not in cli.TRAINING:
            stub = types.ModuleType(module)
            stub.main = lambda argv, name=name: seen.append((name, argv)) or 3
            monkeypatch.setitem(sys.modules, module, stub)
            assert cli.main([name, "--flag", "x"]) == 3
    assert seen == [(name, ["--flag", "x"]) for name in cli.COMMANDS if name not in cli.TRAINING]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from entropy_po import cli; assert cli.main(['--help']) == 0; "
        "print([m for m in ('transformers', 'datasets', 'peft', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in cli.COMMANDS) and result.stdout.strip().endswith("[]")

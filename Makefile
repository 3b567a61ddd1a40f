# Two commands on a fresh machine: `make demo` (the main job) and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/cuda/*)

.PHONY: demo test test-fast coverage lint bench gpu-check pairs clean

demo: $(VENV)/demo.stamp
	$(BIN)/entropy-po demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

# what a change is checked with while it is being made: no wheel builds, no training of the real model
test-fast: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "not slow"

# the share of entropy_po/'s lines that the tests run, processes that they start included; fails below pyproject.toml's 92 %
coverage: $(VENV)/dev.stamp
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

# what only a GPU can show, with the Python that has torch and triton (PYTHON=...); says so and passes where there is none
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

# samples the model again and rewrites the committed preference pairs
pairs: $(VENV)/demo.stamp
	$(BIN)/python -m entropy_po.demo.make_pairs --out entropy_po/demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info entropy_po/_C*.so runs

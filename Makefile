# Two commands on a fresh machine: `make demo` (the main job) and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/cuda/*)

.PHONY: demo test test-fast coverage lint docs bench gpu-check wheels notebook pairs clean

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
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.cu' '*.h')
	$(BIN)/mypy

# the documentation as a site, into site/; tests/test_docs.py builds it the same way
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

# what only a GPU can show, with the Python that has torch and triton (PYTHON=...) and options of benchmarks/gpu_check.py (ARGS=...);
# says so and passes where there is none
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

# A source distribution and, made from it, a wheel for each Python of PYTHONS that runs here, tagged by the C library that it
# needs. OpenMP's runtime is not put in: torch brings it, and a second one would have threads of its own.
wheels: $(VENV)/dev.stamp
	rm -rf dist build/wheels
	$(BIN)/python -m build --sdist > /dev/null
	mkdir -p build/wheels
	tar -xf dist/*.tar.gz -C build/wheels --strip-components=1
	for python in $(PYTHONS); do \
	  $$python -c "" 2> /dev/null || { echo "no $$python here"; continue; }; \
	  $$python -m pip wheel --quiet --no-deps --wheel-dir build/wheels/dist build/wheels || exit 1; \
	done
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheels/dist/*.whl

# runs examples/tour.py as a notebook and keeps what it prints and draws
notebook: $(VENV)/notebook.stamp
	$(BIN)/jupytext --quiet --to ipynb --set-kernel python3 --run-path . --output examples/tour.ipynb examples/tour.py

# samples the model again and rewrites the committed preference pairs
pairs: $(VENV)/demo.stamp
	$(BIN)/python -m entropy_po.demo.make_pairs --out entropy_po/demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info entropy_po/_C*.so runs site

# make setup creates .venv; every other target sets it up first.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/installed
EXTRAS := hf,plot,data,eval,dev

.PHONY: setup quickstart test test-quick test-slow lint types bench clean

setup: $(STAMP)

# A name on the path is not enough: pyenv's shims exist for versions that they refuse to run.
$(STAMP): setup.py constraints.txt
	@if ! $(PYTHON) -c 'import sys' 2>/dev/null; then \
	  found=; \
	  for python in python3.12 python3.13 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; \
	      then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make setup: no Python 3.12 or 3.13 with venv found: install python3.12 and python3.12-venv (Debian, Ubuntu) or run 'pyenv install 3.12'" >&2; \
	    exit 1; fi; \
	  echo "creating $(VENV) with $$found"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	$(PYTHON) -m pip install --quiet --constraint constraints.txt setuptools
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

quickstart: setup
	$(VENV)/bin/megatron-dmc quickstart --output runs/quickstart

test: setup
	$(PYTHON) -m pytest -m "not exhaustive"

test-quick: setup
	$(PYTHON) -m pytest -m "not slow"

test-slow: setup
	$(PYTHON) -m pytest -m slow

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

types: setup
	$(PYTHON) -m mypy

bench: setup
	for benchmark in training training_transformers convert; do \
	  $(PYTHON) -m examples.benchmarks.$$benchmark --json runs/benchmark_$$benchmark.json || exit; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

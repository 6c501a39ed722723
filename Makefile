# Works on a bare machine with Python >= 3.11, pip and make: everything else goes into .venv.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PY     := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo style quality test test-slow bench gpu-check clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A torch that is already in the environment is kept, whatever its build.
$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(PY)
	@$(PY) -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null \
		|| $(PY) -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.setup: pyproject.toml $(VENV)/.torch
	$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.setup-dev: pyproject.toml $(VENV)/.torch
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.setup

setup: $(VENV)/.setup  ## Make .venv and install the package

setup-dev: $(VENV)/.setup-dev  ## The same with what tests and checks need

demo: $(VENV)/.setup  ## Make small models, merge them, edit a picture, print the folder
	@test -f recipes/demo/sd15/target/model_index.json \
		|| $(PY) scripts/make_tiny.py recipes/demo --arch sd15
	$(BIN)/instruct-merge run demo --out outputs/demo --overwrite

style: $(VENV)/.setup-dev  ## Format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(VENV)/.setup-dev  ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(VENV)/.setup-dev  ## Everything that needs no GPU and no network
	$(BIN)/pytest

test-slow: $(VENV)/.setup-dev  ## The full-size tests, minutes and gigabytes
	$(BIN)/pytest -m slow

bench: $(VENV)/.setup-dev  ## Time a full-size merge and an edit against what one would write
	$(PY) scripts/bench/merge.py
	$(PY) scripts/bench/edit.py

# Runs with the python that has CUDA: make gpu-check PY=python3
gpu-check:  ## Every test and benchmark that needs a CUDA device
	$(PY) -m pytest -m gpu
	$(PY) scripts/bench/merge.py --device cuda
	$(PY) scripts/bench/edit.py --device cuda --dtype float16 --width 320 --size 512

clean:  ## Remove what the other targets made, .venv excepted
	rm -rf outputs recipes/demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

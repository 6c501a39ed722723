# Works on a bare machine with Python >= 3.11, pip and make: everything else goes into .venv.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PY     := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev dist demo demo-models style quality test test-slow bench gpu-check clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A torch that is already in the environment is kept, whatever its build.
$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(PY)
	@$(PY) -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null \
		|| $(PY) -m pip install --quiet $(TORCH)
	@touch $@

# Installing compiles FUSED where there is a C compiler.
FUSED := $(wildcard merge/engine/*.[ch]) scripts/build_fused.py

$(VENV)/.setup: pyproject.toml $(FUSED) $(VENV)/.torch
	$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.setup-dev: pyproject.toml $(FUSED) $(VENV)/.torch
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.setup

$(VENV)/.setup-dist: pyproject.toml $(FUSED) $(VENV)/.torch
	$(PY) -m pip install --quiet --editable '.[dist]'
	@touch $@ $(VENV)/.setup

setup: $(VENV)/.setup  ## Make .venv and install the package

setup-dev: $(VENV)/.setup-dev  ## The same with what tests and checks need

demo: $(VENV)/.setup  ## Merge the small models that come along, edit with them, print the folder
	@$(BIN)/instruct-merge run demo --out outputs/demo --overwrite --no-verify >/dev/null
	@$(BIN)/instruct-merge verify outputs/demo --edits recipes/demo/edits.yaml \
		--compare recipes/demo/target >/dev/null
	@TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error \
		$(PY) scripts/demo/evaluate.py --model outputs/demo --against recipes/demo/target \
		--timesteps 999,659,319,59 --at-least 0.94 --timesteps 999,199 --at-least 0.75
	@echo outputs/demo

# PRESET=large needs a GPU and ten minutes; `make demo-models PRESET=overnight PROCESSES=2` does not.
PRESET = large
PROCESSES = 1
demo-models: $(VENV)/.setup  ## Train the demo's models again, choose their settings, evaluate
	$(PY) -m pip install --quiet --editable '.[plot]'
	$(PY) scripts/demo/train.py --preset $(PRESET) --processes $(PROCESSES)
	$(PY) scripts/demo/export.py --preset $(PRESET)
	$(PY) scripts/demo/choose.py
	$(PY) scripts/demo/evaluate.py
	$(PY) scripts/demo/gallery.py

style: $(VENV)/.setup-dev  ## Format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(VENV)/.setup-dev  ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A process per core and one more, since tests wait for their children and for a Hub on loopback;
# torch's own threads would compete with them.
test: $(VENV)/.setup-dev  ## Everything that needs no GPU and no network
	OMP_NUM_THREADS=1 $(BIN)/pytest --dist loadfile \
		-n $$($(PY) -c 'import os; print(1 + (os.cpu_count() or 1))')

test-slow: $(VENV)/.setup-dev  ## The full-size tests, minutes and gigabytes
	$(BIN)/pytest -m slow

bench: $(VENV)/.setup-dev  ## Time a full-size merge and an edit against what one would write
	$(PY) scripts/bench/merge.py sd15 sd15-lora
	$(PY) scripts/bench/edit.py

# Runs with the python that has CUDA: make gpu-check PY=python3
gpu-check:  ## Every test and benchmark that needs a CUDA device, and one summary
	@$(PY) scripts/bench/gpu_check.py

# For a wheel of another machine, too: make dist CROSS=aarch64-linux-gnu-gcc
dist: $(VENV)/.setup-dist  ## Make the source archive and the wheels to publish, check them
	rm -rf dist
	$(PY) scripts/dist.py $(CROSS:%=--cross %)

clean:  ## Remove what the other targets made, .venv excepted
	rm -rf outputs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

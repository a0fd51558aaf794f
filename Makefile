# One place for every command. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := requirements/$(ACCELERATOR).txt
LOCK_HASH = $(shell $(PYTHON) -c "import hashlib; print(hashlib.sha256(open('$(LOCK)', 'rb').read()).hexdigest()[:16])" 2>/dev/null)
# Empty once the environment holds exactly this lock file.
STALE = $(if $(LOCK_HASH),$(shell test "$$(cat $(VENV)/.lock 2>/dev/null)" = "$(LOCK_HASH)" || echo stale),stale)

# A CPU torch wheel that the environment offers is taken first, PyTorch's own CPU index otherwise
# (docs/decisions/0002-locks.md).
WHEELS := $(wildcard $(addsuffix /torch-*+cpu*.whl,$(PIP_FIND_LINKS)))
ifeq ($(ACCELERATOR),cpu)
TORCH_SOURCE := $(if $(WHEELS),$(addprefix --find-links ,$(PIP_FIND_LINKS)),--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
endif

# One process for each core: unit tests share nothing.
# Apart from those with Ray, whose threads live on in the process.
UNIT = $(BIN)/python -m pytest tests/unit --numprocesses auto
.PHONY: help setup demo test test-real cluster-test unit check bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup:  ## install the locked environment into .venv (quick when nothing changed)
ifneq ($(STALE),)
	@echo "==> $(VENV): installing $(LOCK) ($$(grep -c '==' $(LOCK)) packages, $(ACCELERATOR)); this takes a few minutes once"
	@command -v $(PYTHON) >/dev/null || { echo "janus_ray needs Python 3.11: '$(PYTHON)' was not found (choose another with PYTHON=...)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps --quiet $(TORCH_SOURCE) -r $(LOCK)
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib/python3.11/site-packages >/dev/null 2>&1 || true
	@echo "$(LOCK_HASH)" > $(VENV)/.lock
	@echo "==> $(VENV): ready"
else
	@echo "==> $(VENV): up to date with $(LOCK)"
endif
	@echo "$(CURDIR)" > $(VENV)/lib/python3.11/site-packages/janus_ray.pth

demo: setup  ## the whole pipeline in miniature: collect, train, serve, evaluate (about 6 minutes on 2 cores)
	@PATH="$(abspath $(BIN)):$$PATH" bash jobs/miniature.sh

test: setup  ## every test that needs neither a GPU nor a pre-trained model
	@$(UNIT)
	@$(BIN)/python -m pytest tests --ignore=tests/real --ignore=tests/unit

test-real: setup  ## fine-tune, serve and question a real pre-trained model of 135 M parameters
	@$(BIN)/python -m pytest tests/real

cluster-test: setup  ## the jobs on a local cluster of three nodes, one of which dies in each stage (under 10 minutes)
	@$(BIN)/python -m tests.cluster --json benchmarks/results/cluster.json --pictures docs/pictures

unit: setup  ## the tests without Ray (under a minute)
	@$(UNIT)

check: setup  ## lint, format, types, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/ty check --python $(VENV)
	@$(BIN)/lint-imports --no-cache | tail -n 4

bench: setup  ## the benchmarks; each prints a ratio and writes JSON under benchmarks/results
	@$(BIN)/python benchmarks/collect.py
	@$(BIN)/python benchmarks/scale.py

lock: setup  ## resolve pyproject.toml again into requirements/{cpu,gpu}.txt
	@bash requirements/lock.sh "$(BIN)/uv" "$(PIP_FIND_LINKS)"

clean:  ## remove the runs and the caches, keep the environment
	rm -rf runs .pytest_cache .ruff_cache .hypothesis build *.egg-info

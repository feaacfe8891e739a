# Needs Python 3.11 or newer, git and make. Everything is installed into .venv, and only when something changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# An environment of its own, because vLLM wants its own versions of what we use too.
VLLM := .venv-vllm
export RLHF_IMG_VLLM_PYTHON ?= $(if $(wildcard $(VLLM)/.installed),$(CURDIR)/$(VLLM)/bin/python)
# Extra arguments: make grpo ARGS="--seed 1", make test ARGS="-k report"
ARGS ?=

.PHONY: help grpo recipe test soak check format wheel vllm clean
.DEFAULT_GOAL := help

help: ## Show these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

grpo: $(INSTALLED) ## Align the embedded model on this machine; prints where the report is
	$(BIN)/rlhf-img grpo --rewards rubric,artifact $(ARGS)

recipe: $(INSTALLED) ## Raw -> STPO -> GRPO -> TDM on the embedded model, portability and one report; hours on a CPU
	RLHF_IMG=$(BIN)/rlhf-img PYTHON=$(BIN)/python sh experiments/recipe-embedded/run.sh

test: check ## Lint, check types, run all tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 $(ARGS)

soak: $(INSTALLED) ## Kill runs of every algorithm 20 times each, resume them, and compare to the bit; ARGS="--kills 3"
	$(BIN)/python tests/soak.py $(ARGS)

check: $(INSTALLED) ## Lint and check types
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(INSTALLED) ## Mend what the linter can mend
	$(BIN)/ruff check --fix

wheel: $(INSTALLED) ## Build dist/*.whl
	$(PIP) wheel --no-deps --wheel-dir dist .

vllm: $(VLLM)/.installed ## Build the environment (2.4 GB) in which a test starts vLLM; without it that test is skipped

clean: ## Remove .venv and what tools left; runs/ stays
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch goes first and alone: whoever has set pip to a wheel without CUDA keeps it, and the rest builds on it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed, and "$(PYTHON)" is older or missing. Try: make PYTHON=python3.12' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(VLLM)/.installed: tests/vllm-requirements.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $<
	$(VLLM)/bin/python -c 'import vllm'
	@touch $@

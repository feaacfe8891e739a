# Needs Python 3.11 or newer, git and make. Everything is installed into .venv, and only when something changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Extra arguments: make grpo ARGS="--seed 1", make test ARGS="-k report"
ARGS ?=

.PHONY: help grpo test check format wheel clean
.DEFAULT_GOAL := help

help: ## Show these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

grpo: $(INSTALLED) ## Align the embedded model on this machine; prints where the report is
	$(BIN)/rlhf-img grpo --rewards rubric,artifact $(ARGS)

test: check ## Lint, check types, run all tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 $(ARGS)

check: $(INSTALLED) ## Lint and check types
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(INSTALLED) ## Mend what the linter can mend
	$(BIN)/ruff check --fix

wheel: $(INSTALLED) ## Build dist/*.whl
	$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## Remove .venv and what tools left; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch goes first and alone: whoever has set pip to a wheel without CUDA keeps it, and the rest builds on it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed, and "$(PYTHON)" is older or missing. Try: make PYTHON=python3.12' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

# Everything starts from Python and make alone: `make demo` and `make test` create .venv and install into it.
# Variables: PYTHON (interpreter for .venv), VENV (its folder), WORKERS (test processes), PIP_FLAGS, PYTEST_FLAGS.

VENV         ?= .venv
PYTHON       ?=
WORKERS      ?= 2
PIP_FLAGS    ?=
PYTEST_FLAGS ?=
CANDIDATES   := $(if $(PYTHON),$(PYTHON),python3.13 python3.12 python3.11 python3.10 python3 python)
BIN          := $(VENV)/bin
CODE         := src tests examples benchmarks
PIP          := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types bench clean

help: ## say what can be made
	@echo "make demo    train a small network on handwritten digits, quantize, export, verify, time it"
	@echo "make test    lint, format check, type check, tests"
	@echo "make lint    ruff check and format check only"
	@echo "make types   type check only"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make bench   the figures of README and docs (see benchmarks/README.md)"
	@echo "make clean   remove $(VENV), caches and build output"
	@echo "Variables: PYTHON=<interpreter>  VENV=<folder>  WORKERS=<test processes>  PIP_FLAGS=...  PYTEST_FLAGS=..."

# An interpreter counts when it is 3.10 or later and can make an environment with pip in it.
$(BIN)/python:
	@echo "== environment: creating $(VENV)"
	@set -e; bare=; \
	for python in $(CANDIDATES); do \
	  "$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue; \
	  if "$$python" -c 'import ensurepip' >/dev/null 2>&1; then \
	    echo "   $$("$$python" --version) ($$python)"; \
	    "$$python" -m venv --clear "$(VENV)"; exit 0; \
	  fi; \
	  bare="$$python"; \
	done; \
	if [ -n "$$bare" ]; then \
	  echo "make: $$bare cannot create an environment: its module ensurepip is missing." >&2; \
	  echo "      Install it (Debian, Ubuntu: apt install $$(basename $$bare)-venv) and run make again." >&2; \
	else \
	  echo "make: found no Python 3.10 or later among: $(CANDIDATES)." >&2; \
	  echo "      Install one, or name it: make PYTHON=/path/to/python ..." >&2; \
	fi; \
	exit 1

# The stamps hold until the interpreter, the requirements or the pins change.
$(VENV)/.installed-demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "== install: qdq with the extra 'demo' into $(VENV) (the first time this takes some minutes)"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "== install: qdq with the extra 'dev' into $(VENV) (the first time this takes some minutes)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo ## the main job on real data
	@echo "== demo: $(BIN)/qdq demo"
	@$(BIN)/qdq demo || { echo "make demo: FAILED"; exit 1; }
	@echo "make demo: PASSED"

# Every step runs, whatever the one before said, so that one run shows all there is to repair.
test: $(VENV)/.installed-dev ## lint, format check, type check, tests
	@failed=; \
	step() { name="$$1"; shift; printf '\n== %s: %s\n' "$$name" "$$*"; "$$@" || failed="$$failed $$name"; }; \
	step lint $(BIN)/ruff check $(CODE); \
	step format $(BIN)/ruff format --check $(CODE); \
	step types $(BIN)/basedpyright --pythonpath $(BIN)/python; \
	step tests env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --benchmark-disable $(PYTEST_FLAGS); \
	echo; \
	if [ -n "$$failed" ]; then echo "make test: FAILED in:$$failed"; exit 1; fi; \
	echo "make test: PASSED (lint, format, types, tests)"

lint: $(VENV)/.installed-dev ## ruff check and format check
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.installed-dev ## type check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# The peers need an environment of their own, see benchmarks/README.md.
bench: ## the figures that README and docs state
	@echo "== environment: benchmarks/setup_env.sh $(VENV)-bench (peers and data)"
	@benchmarks/setup_env.sh "$(VENV)-bench"
	@echo "== bench: $(VENV)-bench/bin/python benchmarks/deploy.py"
	@$(VENV)-bench/bin/python benchmarks/deploy.py

clean: ## remove what make created
	rm -rf "$(VENV)" "$(VENV)-bench" build dist demo-out .pytest_cache .ruff_cache .hypothesis .benchmarks
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

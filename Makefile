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
NATIVE       := CMakeLists.txt $(wildcard native/* native/*/*)
LIBRARY      := src/qdq/kernels/libqdq_kernels
CROSS        ?= aarch64-linux-gnu
# What runs a second time without the compiled kernels: arithmetic, quantizers, calibration, old names, one network from
# end to end.
REFERENCE    := $(addprefix tests/numerics/test_,symmetric.py affine.py functional.py quantizer.py calibrators.py) \
                tests/drop_in/test_tensor_quant.py \
                tests/pipeline/test_zoo.py::test_network_goes_the_whole_way[resnet_bottleneck]
# Python compiles what is imported when it is imported: all of the packages' modules would take a minute.
PIP          := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types cross bench clean

help: ## say what can be made
	@echo "make demo    train a small network on handwritten digits, quantize, export, verify, time it"
	@echo "make test    lint, format check, type check, tests, a selection of them without the compiled kernels"
	@echo "make lint    ruff check and format check only"
	@echo "make types   type check only"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make cross   compile the kernels for aarch64 and check them, where a compiler for it is installed"
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

# An older library beside the sources would be loaded instead of the one that an install has just compiled.
define installed
@rm -f $(LIBRARY).so $(LIBRARY).dylib
@$(BIN)/python -c "from qdq.kernels.native import library; print('   kernels:', library().reason)"
endef

# The stamps hold until the interpreter, the requirements, the pins or the C++ sources change.
$(VENV)/.installed-demo: $(BIN)/python pyproject.toml constraints.txt $(NATIVE)
	@echo "== install: qdq with the extra 'demo' into $(VENV) (the first time this takes some minutes)"
	@$(PIP) -e '.[demo]'
	$(installed)
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt $(NATIVE)
	@echo "== install: qdq with the extra 'dev' into $(VENV) (the first time this takes some minutes)"
	@$(PIP) -e '.[dev]'
	$(installed)
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo ## the main job on real data
	@echo "== demo: $(BIN)/qdq demo"
	@$(BIN)/qdq demo || { echo "make demo: FAILED"; exit 1; }
	@echo "make demo: PASSED"

# Every step runs, whatever the one before said, so that one run shows all there is to repair.
test: $(VENV)/.installed-dev ## lint, format check, type check, tests, a selection of them on the reference engine
	@failed=; \
	step() { name="$$1"; shift; printf '\n== %s: %s\n' "$$name" "$$*"; "$$@" || failed="$$failed $$name"; }; \
	step lint $(BIN)/ruff check $(CODE); \
	step format $(BIN)/ruff format --check $(CODE); \
	step types $(BIN)/basedpyright --pythonpath $(BIN)/python; \
	step tests env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable $(PYTEST_FLAGS); \
	step tests-without-compiled-kernels env QDQ_LIBRARY= OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q -n $(WORKERS) --benchmark-disable $(REFERENCE); \
	echo; \
	if [ -n "$$failed" ]; then echo "make test: FAILED in:$$failed"; exit 1; fi; \
	echo "make test: PASSED (lint, format, types, tests, tests without the compiled kernels)"

lint: $(VENV)/.installed-dev ## ruff check and format check
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.installed-dev ## type check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Warnings are errors here. The program runs in QEMU's user mode where that is installed.
cross: ## the kernels for aarch64
	@set -e; \
	for tool in $(CROSS)-g++ cmake; do command -v $$tool >/dev/null || { \
	  echo "make cross: SKIPPED, $$tool is not installed (Debian, Ubuntu: apt install g++-$(CROSS) cmake)"; exit 0; }; done; \
	echo "== cross: compiling the kernels with $(CROSS)-g++ into build/$(CROSS)"; \
	mkdir -p build/$(CROSS); log=build/$(CROSS)/log; \
	{ cmake -S . -B build/$(CROSS) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=$(CROSS)-g++ -DCMAKE_CXX_FLAGS=-Werror && cmake --build build/$(CROSS); \
	} >$$log 2>&1 || { cat $$log; echo "make cross: FAILED"; exit 1; }; \
	$(CROSS)-gcc -std=c99 -Wall -Wextra -Werror -Inative/include native/check/check.c -o build/$(CROSS)/check -ldl -lm; \
	if command -v qemu-aarch64 >/dev/null; then \
	  echo "== cross: build/$(CROSS)/check in qemu-aarch64"; \
	  qemu-aarch64 -L /usr/$(CROSS) build/$(CROSS)/check build/$(CROSS)/libqdq_kernels.so; \
	  echo "make cross: PASSED (compiled, results checked)"; \
	else \
	  echo "make cross: PASSED (compiled only: qemu-aarch64 is not installed, Debian, Ubuntu: apt install qemu-user)"; \
	fi

# The peers need an environment of their own, see benchmarks/README.md.
bench: ## the figures that README and docs state
	@echo "== environment: benchmarks/setup_env.sh $(VENV)-bench (peers and data)"
	@benchmarks/setup_env.sh "$(VENV)-bench"
	@echo "== bench: $(VENV)-bench/bin/python benchmarks/deploy.py"
	@$(VENV)-bench/bin/python benchmarks/deploy.py

clean: ## remove what make created
	rm -rf "$(VENV)" "$(VENV)-bench" build dist demo-out .pytest_cache .ruff_cache .hypothesis .benchmarks
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

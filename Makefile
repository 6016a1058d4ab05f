# Everything a new clone needs is python3 (3.11 to 3.13), make and a C compiler; all is installed into .venv.
# `make demo` and `make test` do the set-up by themselves. Options: PYTHON=..., PYTEST_ARGS="...", SPREAD= (tests in one process).

VENV := .venv
BIN := $(VENV)/bin
SOURCES := mini_vllm tests benchmarks scripts training $(wildcard examples)
PYTEST_ARGS ?=
SPREAD ?= -n auto --maxprocesses 8 --dist worksteal
MODEL ?=
SERVE_ARGS ?=
BENCH_ARGS ?=
export VENV PYTHON

.DEFAULT_GOAL := help
.PHONY: help env env-dev demo serve test lint format typecheck unit test-slow test-asan bench-step bench-serving bench-fidelity bench-cpu clean

help:  ## Show this list
	@echo "usage: make <target>"; echo
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  \1\t/' | expand -t 16

env:
	@scripts/setup_venv.sh run

env-dev:
	@scripts/setup_venv.sh dev

demo: env  ## Complete several prompts at once with the bundled model (installs what is missing)
	@$(BIN)/mini-vllm demo

serve: env  ## Serve the bundled model, or MODEL=..., on http://127.0.0.1:8000 (SERVE_ARGS="..." for flags)
	@$(BIN)/mini-vllm serve $(MODEL) $(SERVE_ARGS)

test: lint unit  ## Lint, type check, import contracts and the quick tests (installs what is missing)

lint: env-dev  ## ruff, mypy and the import contracts
	@echo "==> ruff check"; $(BIN)/ruff check $(SOURCES)
	@echo "==> ruff format --check"; $(BIN)/ruff format --check $(SOURCES)
	@echo "==> mypy"; $(BIN)/mypy
	@echo "==> lint-imports"; $(BIN)/lint-imports

format: env-dev  ## Format and apply the safe fixes of ruff
	@$(BIN)/ruff check --fix $(SOURCES); $(BIN)/ruff format $(SOURCES)

unit: env-dev
	@echo "==> pytest"; $(BIN)/python -m pytest -m "not slow and not gpu" $(SPREAD) $(PYTEST_ARGS)

test-slow: env-dev  ## The long tests: many random runs, large shapes, every level of kernels; then test-asan
	@$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)
	@scripts/test_sanitized.sh

test-asan: env-dev  ## The native kernels' tests under the address, undefined-behaviour and thread sanitizers (slow)
	@scripts/test_sanitized.sh

bench-step: env  ## Measure the cost of a step outside the model; writes benchmarks/results/
	@$(BIN)/python benchmarks/step_cost.py

bench-serving: env  ## Measure what serving costs beside the engine (BENCH_ARGS="..." for flags); writes benchmarks/results/
	@$(BIN)/python benchmarks/serving.py $(BENCH_ARGS)

bench-cpu: env-dev  ## Compare with other CPU engines, ten minutes (BENCH_ARGS="..." for peers and more); writes benchmarks/results/
	@$(BIN)/python benchmarks/cpu/compare.py $(BENCH_ARGS)

bench-fidelity: env  ## Serve requests in real time and simulate the same ones; writes benchmarks/results/
	@$(BIN)/python benchmarks/simulator_fidelity.py $(if $(MODEL),--model $(MODEL)) $(BENCH_ARGS)

clean:  ## Remove .venv, caches and build leftovers
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

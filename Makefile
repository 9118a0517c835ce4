# Every target sets up what it needs: a virtual environment, then the package and its pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test lint types imports pytest bench clean help

help:            ## list the targets
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

install: $(STAMP) ## virtual environment with the package and its pinned dependencies

demo: $(STAMP)   ## train a toy, break it, lock it through an MLflow stage transition
	$(BIN)/safelock demo

test: lint pytest ## everything: formatting, lint, types, import layers, all tests

lint: $(STAMP)   ## formatting, lint, types and import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Of the small models of the tests, threads that wait for one another take twice the time of one alone.
pytest: $(STAMP) ## all tests, on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(STAMP)  ## measure, side by side, and write benchmarks/results
	$(BIN)/python -m benchmarks

clean:           ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# make demo    train a random ER network on scikit-learn's digits, about a minute
# make quick   one test of each kind, about a minute on two cores: what tests/quick.txt names
# make test    lint and all tests
# make bench   speed and memory, as ratios measured in one run on this machine
# make lint    ruff, mypy and clang-format
# make sanitize   check the kernels for wrong addresses and undefined behaviour, a few minutes
# make torture   try each promise of docs/reliability.md with many inputs, hours
# VENV=DIR     use (or make) another environment

VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin

.PHONY: demo quick test bench lint sanitize torture
.DELETE_ON_ERROR:

demo: $(VENV)/.startsparse
	cd STR && $(BIN)/python main.py

quick: $(VENV)/.startsparse-dev
	$(BIN)/python -m pytest @tests/quick.txt

test: lint
	$(BIN)/python -m pytest

bench: $(VENV)/.startsparse
	$(BIN)/python -m benchmarks

lint: $(VENV)/.startsparse-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror startsparse/engine/*.cpp startsparse/engine/*.h benchmarks/*.cpp

torture: $(VENV)/.startsparse-dev
	cd tests && $(BIN)/python -m torture

sanitize: $(VENV)/.startsparse-dev
	$(BIN)/python tests/sanitize.py

$(VENV)/.startsparse: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(VENV)/.startsparse-dev: $(VENV)/.startsparse
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

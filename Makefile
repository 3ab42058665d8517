# Each target builds .venv first where there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench

demo: $(BIN)/ready
	$(BIN)/python -m experiments.lenet5 --flagfile=experiments/flagfiles/lenet5_digits.flags

test: $(BIN)/ready
	$(BIN)/python -m pytest

lint: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(BIN)/ready
	$(BIN)/python -m experiments.bench $(BENCH_FLAGS)

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

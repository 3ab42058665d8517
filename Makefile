# Each target builds .venv first where there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench results

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

# The runs behind the README's table, about half an hour on two cores; needs real MNIST.
results: $(BIN)/ready
	for seed in 0 1 2; do for network in lenet300 lenet5; do \
	  $(BIN)/python -m experiments.$$network --flagfile=experiments/flagfiles/$${network}_mnist.flags \
	    --seed=$$seed --workdir=runs/$$network-$$seed $(DATA_FLAGS) && \
	  cp runs/$$network-$$seed/summary.json results/$$network-$$seed.json || exit 1; done; done
	$(BIN)/python -m experiments.results

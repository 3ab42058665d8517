# Each target builds .venv first where there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench results

demo: $(BIN)/ready
	$(BIN)/python -m experiments.lenet5 --flagfile=experiments/flagfiles/lenet5_digits.flags

test: $(BIN)/ready
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

lint: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(BIN)/ready
	$(BIN)/python -m experiments.bench $(BENCH_FLAGS)

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The runs behind the README's table, about three quarters of an hour on two cores; needs MNIST.
results: $(BIN)/ready
	mkdir -p results
	for seed in 0 1 2; do for name in lenet300_mnist lenet300_paper lenet5_mnist lenet5_paper; do \
	  test -f results/$$name-$$seed.json || { \
	  $(BIN)/python -m experiments.$${name%_*} --flagfile=experiments/flagfiles/$$name.flags \
	    --seed=$$seed --workdir=runs/$$name-$$seed --resume $(DATA_FLAGS) && \
	  cp runs/$$name-$$seed/summary.json results/$$name-$$seed.json; } || exit 1; done; done
	$(BIN)/python -m experiments.results

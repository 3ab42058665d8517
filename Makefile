# Each target builds .venv first where there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-matrix coverage mutants lint docs links bench results

demo: $(BIN)/ready
	$(BIN)/python -m experiments.compare --flagfile=experiments/flagfiles/demo.flags
	@echo
	@echo 'Both networks keep 1 of 100 weights. Surgery should leave the error about where it was;'
	@echo 'one cut should not. Three seeds; one of the 360 test images is 0.28 points.'
	@echo 'Next, LeNet-5 and the report of one network:'
	@echo '  $(BIN)/python -m experiments.lenet5 --flagfile=experiments/flagfiles/lenet5_digits.flags'

# XLA compiles without most optimizations here, and what it compiled is kept: a second run takes a third.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS = 1
test: export JAX_COMPILATION_CACHE_DIR = $(abspath $(BIN:/bin=)/compiled)
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test: $(BIN)/ready
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# With those that take long, compiled as users do; writes the table of what works.
test-all: $(BIN)/ready
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile -m 'slow or not slow' \
	  --compat=results/compat.md

# Each Python that runs here, in a `.venv-3.12` of its own: 3.11 has jax 0.10, the others the newest.
MATRIX ?= 3.11 3.12 3.13
test-matrix:
	@failed=; for version in $(MATRIX); do \
	  for python in python$$version $(HOME)/.pyenv/versions/$$version.*/bin/python; do \
	    $$python -c '' 2>/dev/null && break || python=; done; \
	  test $$python || { echo "python$$version: not on this machine, skipped"; continue; }; \
	  echo "python$$version: $$($$python --version)"; \
	  $(MAKE) test PYTHON=$$python BIN=.venv-$$version/bin || failed="$$failed python$$version"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# The suite, and which lines of the library it runs in its own processes.
coverage: $(BIN)/ready
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --cov=dns_jax \
	  --cov-report=term-missing --cov-fail-under=98

# An hour or two on one core: changes operators and numbers of four modules, and asks if their tests
# notice. Prints the table of results/mutation.md and every change that went unnoticed.
mutants: $(BIN)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'cosmic-ray>=8.4'
	nice -n 10 $(BIN)/python tests/tools/mutation.py $(MUTANTS_FLAGS)

lint: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Into docs/_build/html, with the notebooks run; a warning, an error in one, or a link to nowhere within
# ends it.
docs: $(BIN)/ready
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -c docs . docs/_build/html
	@echo docs/_build/html/docs/index.html

# Links to other sites, for which it needs the network.
links: $(BIN)/ready
	$(BIN)/sphinx-build --quiet -b linkcheck -c docs . docs/_build/links

bench: $(BIN)/ready
	$(BIN)/python -m experiments.bench $(BENCH_FLAGS)

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv $(BIN:/bin=)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The runs behind the tables of docs/results.md, about three quarters of an hour on two cores; needs MNIST.
results: $(BIN)/ready
	mkdir -p results
	for seed in 0 1 2; do for name in lenet300_mnist lenet300_paper lenet5_mnist lenet5_paper; do \
	  test -f results/$$name-$$seed.json || { \
	  $(BIN)/python -m experiments.$${name%_*} --flagfile=experiments/flagfiles/$$name.flags \
	    --seed=$$seed --workdir=runs/$$name-$$seed --resume $(DATA_FLAGS) && \
	  cp runs/$$name-$$seed/summary.json results/$$name-$$seed.json; } || exit 1; done; done
	$(BIN)/python -m experiments.results

# Every target works alone in a clean clone: each needs Python 3.11 or later with pip, a C compiler for torch.compile, and no more.
# Another interpreter: make PYTHON=python3.13 VENV=.venv313 test

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv

STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: help demo test test-slow test-all lint format docs tutorials dist bench clean

help:
	@echo "make demo       eight schools: the terms, the verdict, NUTS, and compiled steps, in a minute"
	@echo "make test       run the tests that take seconds, in some minutes"
	@echo "make test-slow  run the others"
	@echo "make test-all   run all of them"
	@echo "make lint       ruff (rules and format) and mypy"
	@echo "make format     let ruff rewrite the code"
	@echo "make docs       build docs/_build/html; any warning fails"
	@echo "make tutorials  execute tutorials/*.ipynb; any error in a cell fails"
	@echo "make dist       build wheel and sdist, check them, and run README's example from the wheel"
	@echo "make bench      step times beside Pyro's"
	@echo "make clean      remove environments and caches"

# Made once, and again when the project's requirements change.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3.11 or python3 that runs; pass PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + sys.version.split()[0] + "; 3.11 or later is needed, pass PYTHON=/path/to/python")'
	@echo "Making $(VENV) and installing into it (the first time takes some minutes) ..."
	@# Debian's Python without python3-venv has no ensurepip: then the system's pip puts pip into the environment
	@$(PYTHON) -m venv --clear $(VENV) >/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV): $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m pyro_elbo_ext demo

# A process for each core, each with one thread; more than eight only wait for memory.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# -E: read every page anew, so that a warning is not forgotten by the next build
docs: $(STAMP)
	@rm -rf docs/reference/generated
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

tutorials: $(STAMP)
	$(BIN)/python tests/run_tutorials.py tutorials

dist: $(STAMP)
	$(BIN)/python tests/check_distributions.py dist

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.run
	$(BIN)/python -m tests.benchmarks.bounds
	$(BIN)/python -m tests.benchmarks.compiled
	$(BIN)/python -m tests.benchmarks.nuts
	$(BIN)/python -m tests.benchmarks.diagnosis
	$(BIN)/python -m tests.benchmarks.autoencoder
	$(BIN)/python -m tests.benchmarks.peers # says so and stops if PEERS_PYTHON is not set

clean:
	rm -rf .venv .venv-* .venv3* .python build dist docs/_build docs/reference/generated docs/tutorials/*.ipynb .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

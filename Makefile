# Each target sets up what it needs: the first call makes .venv from requirements.txt.
PYTHON ?= python3
VENV   ?= .venv
# Processes that share the tests.
WORKERS ?= 2
BIN    := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL := 3
# Packages are installed without byte code, so what is imported is compiled once, by the first process that needs it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo controls test test-all wheel-test lint types docs bench clean

demo: $(VENV)/.ready        ## make the playground, pretrain VATT on it, evaluate, report
	$(BIN)/python run.py --config=configs/demo.py --workdir=runs/demo

controls: $(VENV)/.ready    ## what must lose or fail to learn, and the second seed
	$(BIN)/python run.py --mode=eval --config=configs/demo.py:controls --workdir=runs/demo
	$(BIN)/python run.py --config=configs/demo.py:shuffled --workdir=runs/demo_shuffled
	$(BIN)/python run.py --config=configs/demo.py --config.seed=1 --workdir=runs/demo_seed1
	$(BIN)/python run.py --mode=report --workdir=runs/demo --compare=runs/demo_shuffled,runs/demo_seed1

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

wheel-test:                 ## the wheel in an environment of its own, with core dependencies alone
	$(PYTHON) tools/wheel_test.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

docs: $(VENV)/.docs-ready    ## the documentation site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

$(VENV)/.ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# What only the site and the notebooks need, without touching what is installed.
$(VENV)/.docs-ready: $(VENV)/.ready
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

clean:
	rm -rf runs site .jax_cache

# make demo   install, then run the whole way on the embedded digits example
# make test   install, then `make check` and every test
# make quick  the tests that take seconds: what to run while you work
# make check  lint, format, types, architecture
# make benchmark   ratios of speed, side by side (a few minutes; leave the machine alone)
# make docs   write the pages of docs/ that are made from the code
# make site   build the documentation as a site into build/site
# make release  build source distribution and wheel, and try the wheel in a fresh environment
# make clean  remove what these made
#
# Everything lives in $(VENV); a second call installs nothing. Without a word, torch is held at the
# version that constraints-dev.txt names; `make demo CONSTRAINTS=` takes the newest instead.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-dev.txt
JOBS ?= 2
OUT ?= build/demo
PIP_FLAGS ?= -qq

BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
DEMO_EXTRAS := cpu,rtx,demo
DEV_EXTRAS := $(DEMO_EXTRAS),dev
ASKED_FOR := pyproject.toml $(CONSTRAINTS)
INSTALL := $(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check \
	$(addprefix -c ,$(CONSTRAINTS)) -e

.PHONY: demo test quick check benchmark docs site release clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python -m reptrt.demo -o $(OUT)

# Each worker gets its share of the cores, or the workers' threads fight each other.
test quick: export OMP_NUM_THREADS := $(shell cores=$$(($$(getconf _NPROCESSORS_ONLN) / $(JOBS))); \
	echo $$((cores > 0 ? cores : 1)))
test: check
	$(BIN)/python -m pytest -n $(JOBS)

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

benchmark: $(VENV)/.dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/benchmarks \
		-o python_files='bench_*.py' -o addopts= --benchmark-only --benchmark-group-by=group \
		--benchmark-columns=min,median,rounds --benchmark-sort=name

docs: $(VENV)/.demo
	$(BIN)/python tools/make_docs.py

site: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs/site docs build/site

release: $(VENV)/.dev
	$(BIN)/python tools/check_release.py -o build/release

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The tests need what the demo needs, so whoever has the first has both.
$(VENV)/.dev: $(ASKED_FOR) | $(BIN)/python
	@echo "Installing reptrt and its tools into $(VENV); the first time takes minutes and 2 GB or more."
	@$(INSTALL) ".[$(DEV_EXTRAS)]"
	@touch $(VENV)/.demo $@

$(VENV)/.demo: $(ASKED_FOR) | $(BIN)/python
	@echo "Installing reptrt into $(VENV); the first time takes minutes and 2 GB or more."
	@$(INSTALL) ".[$(DEMO_EXTRAS)]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"$(PYTHON) is %d.%d, reptrt needs 3.10 or newer: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

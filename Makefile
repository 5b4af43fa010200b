# Two commands do everything: make demo, make test.  Each makes what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check fuzz bench slow faults docs house format clean help

help:
	@echo "make demo    tune a real language model over 24 simulated clients, with a report (about 8 minutes)"
	@echo "make test    the test suite"
	@echo "make check   lint, format and types"
	@echo "make fuzz    the property tests, with new random examples"
	@echo "make slow    tests that need a downloaded model or minutes"
	@echo "make faults  kills, cuts, forgeries, full disks, damaged files: counted in docs/faults.json; lines of the source broken (hours)"
	@echo "make bench   ours against the papers' way, as ratios"
	@echo "make house   the size of the project in figures"
	@echo "make docs    the documentation site; open site/index.html"

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fleetune needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/fleetune demo

test: $(VENV)/ready
	$(BIN)/pytest -n 3 --dist worksteal  # of two cores: some tests wait for devices and servers

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/ready
	$(BIN)/pytest --hypothesis-profile=fuzz -m hypothesis

slow: $(VENV)/ready
	$(BIN)/pytest -m slow

faults: $(VENV)/ready
	$(BIN)/pytest -m "faults or injects" --faults-json docs/faults.json
	$(BIN)/python docs/build.py
	$(BIN)/python tests/mutants.py

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks --json benchmarks/results/latest.json

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: $(VENV)/docs-ready
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

house: $(VENV)/ready
	$(BIN)/python -m benchmarks.house

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The verbs of this project. Needs python3 (3.11 or newer), make and a network the first time; nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-cluster test check format bench clean

demo: .venv/ready  ## the router on the memory broker with the demo page at http://127.0.0.1:8000/
	$(BIN)/router dev

demo-cluster: .venv/ready  ## two nodes, at ports 8000 and 8001, and a Redis or Valkey between them: one that is here, or the wheel's
	$(BIN)/router dev --nodes 2

test: .venv/ready  ## all tests; what is not on this machine is skipped and named
	$(BIN)/python -m pytest

check: .venv/ready  ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/ready  ## ratios against the kernel's own limit; needs gcc and two cores
	$(BIN)/python -m tests.benchmarks

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Event Router needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "the standard library's venv is missing: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info

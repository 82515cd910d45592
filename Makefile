# make demo: the main job on a real model.    make test: the tests.    make quick: those for every commit, in a minute.
# make faults: every call of the system fails once, and signals at random moments; an hour.
# make cluster: the tests that need Ray (500 MB more), which the others pass over.
# make check: style and types.    make docs: writes docs/commands.md.
# make fuzz: damages what Griffin reads, CASES times, with JOBS processes.    (README: "Try it", CONTRIBUTING.md)
# SYSTEM_SITE=1: use the packages of PYTHON where they are new enough, so that its CUDA build of torch is not fetched twice.
PYTHON ?= python3
SYSTEM_SITE ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PROMPT ?= The Library of Alexandria was one of the largest libraries of the ancient world. Explain in a few sentences why people still talk about it today.

CASES ?= 1000000
JOBS ?= 2

.PHONY: demo test quick cluster check faults docs fuzz clean setup

demo: setup
	$(BIN)/griffin generate --sparsity 0.25 --greedy --max-new-tokens 80 --prompt "$(PROMPT)"
	$(BIN)/griffin mem-report --last

test: setup
	$(if $(SYSTEM_SITE),,$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[interpreter]')
	$(BIN)/griffin pull smollm2-135m
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone
	GRIFFIN_EMULATE_CUDA=2 $(BIN)/python -m pytest -n 2 --dist worksteal -m gpu

quick: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m quick

cluster: setup
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/many

faults: setup
	$(BIN)/python tests/faults/every_call.py
	$(BIN)/python tests/faults/every_signal.py

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	rm -rf build/types && mkdir -p build/types && cp -r griffin_offload build/types/ && cp -r cli build/types/griffin_offload/cli
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml -p griffin_offload
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml ../../scripts/*.py

docs: setup
	$(BIN)/python -m griffin_offload.cli._docs > docs/commands.md

fuzz: setup
	$(BIN)/python tests/fuzz/run.py --cases $(CASES) --jobs $(JOBS)

setup: $(READY)

$(READY): pyproject.toml constraints.txt setup.py $(wildcard griffin_offload/native/src/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Griffin needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(if $(SYSTEM_SITE),--system-site-packages) $(VENV)
	grep $(if $(SYSTEM_SITE),-v '^torch==','') constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0

.PHONY: train test lint docs bench gpu prove integrity clean

## train: everything from nothing to a trained, gated, recorded model
train: $(VENV)/.train
	$(BIN)/stack train

## test: everything from nothing to the whole test suite
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(TORCH) -c constraints.txt
	$(PIP) install --quiet -e '.[train]' -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_layers.py
	$(BIN)/python tools/check_integrity.py

integrity:
	$(BIN)/python tools/check_integrity.py

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

prove: $(VENV)/.train
	$(BIN)/stack gates prove

## bench: rates next to those of installed peers, in the same run; peers that are not installed are left out
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/gate_overhead.py --device cpu
	$(BIN)/python benchmarks/reader.py
	$(BIN)/python benchmarks/tokenizer_speed.py
	$(BIN)/python benchmarks/build.py

## gpu: GPU tests, then benchmarks; each part writes its record and is skipped when it is done
gpu:
	bash benchmarks/gpu.sh

clean:
	rm -rf site runs build dist

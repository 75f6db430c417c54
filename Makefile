PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0

.PHONY: train test stress lint docs bench bench-fresh gpu prove integrity clean

## train: everything from nothing to a trained, gated, recorded model
train: $(VENV)/.train
	$(BIN)/stack train

## test: everything from nothing to the whole test suite
# Compiled code is kept, also where the environment forbids it: hundreds of these processes import all.
test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(TORCH) -c constraints.txt
	$(PIP) install --quiet -e '.[train]' -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

## stress: the long rounds of fault injection, hours; SEED=n repeats a round, ONLY=name selects tests
stress: $(VENV)/.dev
	STRESS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/fault_injection tests/contracts/callbacks/test_failures.py $(if $(ONLY),-k $(ONLY))

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

## bench: rates next to those of installed peers, in the same run, about an hour; peers that are not installed are left out
# Each part leaves a record in BENCH_DIR and is skipped while it is there; FRESH=1 begins anew. BENCH_PYTHON names an interpreter with
# the peers (stackproof need not be installed there), see docs/benchmarks-guide.md; BENCH_TEXT a text for time-to-quality.
BENCH_DIR ?= runs/bench
BENCH_PYTHON ?= $(BIN)/python
BENCH_TEXT ?=
BENCH_PARTS := startup checkpoint cpu-kernels memory rank-memory generation training-a training-b training-b-heap-kept time-to-quality gate-overhead \
	ranks-training ranks-gate-overhead ranks-checkpoint foreign-overhead trace-overhead trace-every trace-plants reader tokenizer build
BENCH := PYTHONPATH=$(CURDIR)/tools/checkout $(BENCH_PYTHON)

bench: $(if $(FRESH),bench-fresh) $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/.dev)
	$(foreach part,$(BENCH_PARTS),$(MAKE) --no-print-directory $(BENCH_DIR)/$(part)/metadata.json &&) true
	$(BENCH) benchmarks/tables.py $(BENCH_DIR)

bench-fresh:
	rm -rf $(BENCH_PARTS:%=$(BENCH_DIR)/%)

$(BENCH_DIR)/startup/metadata.json:
	$(BENCH) benchmarks/startup.py --run-dir $(@D)
$(BENCH_DIR)/checkpoint/metadata.json:
	$(BENCH) benchmarks/checkpoint.py --run-dir $(@D)
$(BENCH_DIR)/cpu-kernels/metadata.json:
	$(BENCH) benchmarks/cpu_kernels.py --run-dir $(@D)
$(BENCH_DIR)/memory/metadata.json:
	$(BENCH) benchmarks/memory.py --run-dir $(@D)
$(BENCH_DIR)/rank-memory/metadata.json:
	$(BENCH) benchmarks/rank_memory.py --run-dir $(@D)
$(BENCH_DIR)/generation/metadata.json:
	$(BENCH) benchmarks/generation.py --run-dir $(@D)
$(BENCH_DIR)/training-a/metadata.json:
	$(BENCH) benchmarks/training.py --shape a --run-dir $(@D)
$(BENCH_DIR)/training-b/metadata.json:
	$(BENCH) benchmarks/training.py --shape b --rounds 3 --run-dir $(@D)
$(BENCH_DIR)/training-b-heap-kept/metadata.json:
	$(BENCH) benchmarks/training.py --shape b --rounds 3 --allocator heap-kept --run-dir $(@D)
$(BENCH_DIR)/time-to-quality/metadata.json:
	$(BENCH) benchmarks/time_to_quality.py $(if $(BENCH_TEXT),--text $(BENCH_TEXT)) --set checkpoint.every=20 --run-dir $(@D)
$(BENCH_DIR)/gate-overhead/metadata.json:
	$(BENCH) benchmarks/gate_overhead.py --device cpu --run-dir $(@D)
$(BENCH_DIR)/ranks-training/metadata.json:
	$(BENCH) benchmarks/ranks_training.py --run-dir $(@D)
$(BENCH_DIR)/ranks-gate-overhead/metadata.json:
	$(BENCH) benchmarks/ranks_gate_overhead.py --run-dir $(@D)
$(BENCH_DIR)/ranks-checkpoint/metadata.json:
	$(BENCH) benchmarks/ranks_checkpoint.py --run-dir $(@D)
$(BENCH_DIR)/foreign-overhead/metadata.json:
	$(BENCH) benchmarks/foreign_overhead.py --device cpu --run-dir $(@D)
$(BENCH_DIR)/trace-every/metadata.json:
	$(BENCH) benchmarks/trace_every.py --run-dir $(@D)
$(BENCH_DIR)/trace-overhead/metadata.json:
	$(BENCH) benchmarks/trace_overhead.py --run-dir $(@D)
$(BENCH_DIR)/trace-plants/metadata.json:
	$(BENCH) benchmarks/trace_plants.py --run-dir $(@D)
$(BENCH_DIR)/reader/metadata.json:
	$(BENCH) benchmarks/reader.py --run-dir $(@D)
$(BENCH_DIR)/tokenizer/metadata.json:
	$(BENCH) benchmarks/tokenizer_speed.py --run-dir $(@D)
$(BENCH_DIR)/build/metadata.json:
	$(BENCH) benchmarks/build.py --run-dir $(@D)

## gpu: GPU tests, then benchmarks; each part writes its record and is skipped when it is done
gpu:
	bash benchmarks/gpu.sh

clean:
	rm -rf site runs build dist

#!/usr/bin/env bash
# GPU tests, then gated pocket runs, the cost of the gates, the kernels next to torch's on the GPU, and
# the same on two GPUs where there are two.
# Each part is skipped once OUT_DIR holds its mark, so that the whole can be spread over short
# stretches of GPU time. Needs only a python with the packages of the [train] extra and pytest,
# PYTHON=python3; stackproof itself need not be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
OUT_DIR="${OUT_DIR:-runs/gpu}"
export PYTHONPATH="$PWD/tools/checkout${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT_DIR"

"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 7)' || {
    echo "error: there is no CUDA device, so nothing was run and nothing is recorded" >&2
    exit 7
}

part() {
    local name="$1"
    shift
    if [ -f "$OUT_DIR/$name.done" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    "$@" && touch "$OUT_DIR/$name.done"
}

part doctor "$PYTHON" -m stackproof doctor
part compare "$PYTHON" -m stackproof doctor --kernels
part tests "$PYTHON" -m pytest -m gpu -q tests
part train "$PYTHON" -m stackproof train pocket --device cuda --run-dir "$OUT_DIR/pocket-cuda"
part train-bf16 "$PYTHON" -m stackproof train pocket --device cuda --set train.dtype=bfloat16 --run-dir "$OUT_DIR/pocket-cuda-bf16"
part overhead "$PYTHON" benchmarks/gate_overhead.py --device cuda --run-dir "$OUT_DIR/gate-overhead"
# needs transformers besides; left out where it is not installed
"$PYTHON" -c 'import transformers' 2>/dev/null && part foreign-overhead "$PYTHON" benchmarks/foreign_overhead.py --device cuda --run-dir "$OUT_DIR/foreign-overhead"
for name in attention-64 attention-128 forward-64 forward-128 naive-64 rms-norm swiglu cross-entropy; do
    part "kernels-$name" "$PYTHON" benchmarks/kernels.py --part "$name" --run-dir "$OUT_DIR/kernels-$name"
done
part training "$PYTHON" benchmarks/training.py --shape llama-370m --device cuda --rounds 3 --run-dir "$OUT_DIR/training-llama-370m"

n_devices="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$n_devices" -lt 2 ]; then
    # A run reduces tensors on a GPU by NCCL alone, which refuses two ranks on one device.
    echo "== ranks: skipped, NCCL needs a CUDA device for each of two ranks and there is $n_devices"
    exit 0
fi
for mesh in shard replicate tensor; do
    part "ranks-$mesh" "$PYTHON" -m stackproof train pocket --device cuda --nproc 2 --set "parallel.$mesh=2" --run-dir "$OUT_DIR/ranks-$mesh"
done
part ranks-tensor-bf16 "$PYTHON" -m stackproof train pocket --device cuda --nproc 2 --set parallel.tensor=2 --set train.dtype=bfloat16 --run-dir "$OUT_DIR/ranks-tensor-bf16"
part ranks-overhead "$PYTHON" benchmarks/ranks_gate_overhead.py --device cuda --run-dir "$OUT_DIR/ranks-gate-overhead"
part ranks-training "$PYTHON" benchmarks/ranks_training.py --shape llama-370m --device cuda --rounds 5 --run-dir "$OUT_DIR/ranks-training"
part ranks-training-compiled "$PYTHON" benchmarks/ranks_training.py --shape llama-370m --device cuda --compiled --rounds 5 --run-dir "$OUT_DIR/ranks-training-compiled"

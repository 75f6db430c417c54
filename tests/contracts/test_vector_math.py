"""MKL's functions are selected by one thread, before anything is computed."""

import math
import subprocess
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stackproof.contracts import vector_math
from stackproof.contracts.callbacks import run, session
from stackproof.contracts.callbacks.plain import gated
from stackproof.contracts.callbacks.session import judge_model, preflight_gates

# The functions that torch 2.13 computes by MKL (aten/src/ATen/cpu/vml.h).
BY_MKL = "acos asin atan cos erf erfc erfinv exp expm1 log log10 sin sqrt tan tanh trunc".split()

SELECT = ("model.build", "train.start", "trace.trace", "export.parity", "replay.replay")


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen[func.overloadpacket.__name__, result.dtype, result.numel()] += 1
        return result


def test_each_function_is_called_on_one_element_in_both_types():
    with Calls() as calls:
        vector_math.select_vector_functions.__wrapped__()
    wanted = {(name, dtype, 1) for name in BY_MKL for dtype in (torch.float32, torch.float64)}
    assert wanted <= set(calls.seen)
    assert {numel for _, _, numel in calls.seen} == {1}


def test_the_argument_lies_in_every_domain():
    one = torch.full((1,), vector_math.ARGUMENT, dtype=torch.float64)
    assert all(math.isfinite(float(f(one))) for f in vector_math.FUNCTIONS)


# Each module is imported by a fork of a process that has imported torch and nothing of ours.
IMPORTS = f"""
import importlib, os
import torch, torch._dynamo

for module in {SELECT!r}:
    if not os.fork():
        importlib.import_module("stackproof." + module)
        from stackproof.contracts import vector_math
        print(module, vector_math.select_vector_functions.cache_info().currsize, flush=True)
        os._exit(0)
    os.wait()
"""


def test_what_computes_selects_at_import():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{module} 1" for module in SELECT], done.stderr


def test_gates_of_another_trainer_select_first(monkeypatch):
    """When training begins, and before a live model is judged."""
    called = []
    for module in (run, session):
        monkeypatch.setattr(module, "select_vector_functions", lambda: called.append(1))
    model = torch.nn.Linear(2, 2)
    with gated(model, torch.optim.SGD(model.parameters()), mode="log", only=("runtime.finite",)):
        assert called[0] == 1
    called.clear()
    judge_model(model, gates=preflight_gates()[:1])
    assert called == [1]

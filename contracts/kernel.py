"""Gates of kernels and compilers: what runs fast computes what the slow original computes."""

import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from contracts.gate import Verdict, decide, decides, failed
from contracts.loss import gradient_errors

Step = Callable[[int], tuple[float, Mapping[str, Tensor]]]


@decides("kernel.compiled-graph")
def compiled_graph(limits: SimpleNamespace, *, model: nn.Module, compiled_step: Step, eager_step: Step, half_precision: bool) -> Verdict:
    """The compiled graph is what runs, and gives the loss and every parameter's gradient that eager gives.

    `compiled_step(i)` and `eager_step(i)` make forward and backward of batch `i` (0 or 1) in training mode from the same random state
    and return (loss in nats, gradient by name). The graph is built on batch 0 and judged on both, so that nothing of a batch may be
    built in. `model` only tells which Python code must not run.
    """
    first = compiled_step(0)
    second, ran = _watched(model, lambda: compiled_step(1))
    expected, of_eager = _watched(model, lambda: eager_step(1))
    if not of_eager:
        return failed("eager shows no module at work either, so this check sees nothing", eager_modules=0)
    if ran:
        return failed(f"{ran} modules ran as Python code: eager is at work where the graph should be", modules_in_python=ran)
    limit = limits.half_rel_error_max if half_precision else limits.rel_error_max
    errors = {}
    for got, wanted in ((first, eager_step(0)), (second, expected)):
        if odd := sorted(got[1].keys() ^ wanted[1].keys()):
            return failed(f"a gradient is there on one side only: {odd[0]}", one_sided=len(odd))
        of_loss = gradient_errors({"the loss": torch.tensor(got[0])}, {"the loss": torch.tensor(wanted[0])})
        found = of_loss | gradient_errors(got[1], wanted[1])
        errors = {name: max(error, errors.get(name, 0.0)) for name, error in found.items()}
    worst = max(errors, key=errors.__getitem__)
    return decide(
        errors[worst] <= limit,
        f"compiled and eager differ by {errors[worst]:.2g} in {worst}",
        rel_error=errors[worst],
        loss_rel_error=errors["the loss"],
        worst=worst,
        gradients=len(errors) - 1,
        modules_in_python=ran,
    )


def _watched(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and how often the forward code of a module inside `model` began to run in Python during it."""
    codes = {type(m).forward.__code__ for m in model.modules() if m is not model}
    count = 0

    def watch(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code in codes

    former = sys.getprofile()
    sys.setprofile(watch)
    try:
        return call(), count
    finally:
        sys.setprofile(former)

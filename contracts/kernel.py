"""Gates of kernels and compilers: what runs fast computes what the slow original computes."""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.gate import Verdict, decide, decides, failed
from stackproof.contracts.loss import IGNORE, gradient_errors
from stackproof.contracts.subject import KernelCall, Kernels, Subject


@decides("kernel.parity")
def parity(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Every kernel that the run has chosen gives the outputs and gradients of its reference at the
    run's own shapes, and the head those of float64 around the borders of its chunks.

    Calls of torch's own kernels are counted and not compared: `model.gradient` compares what they
    compute with float64, as parts of the whole model.
    """
    calls, chunk_rows = subject.kernels.calls(), subject.kernels.head_chunk_rows
    if not calls:
        return failed(
            "the model has called no operation, so this check has seen no kernel", calls=0
        )
    chosen = [call for call in calls if not call.is_reference]
    head, borders = _head_errors(subject.kernels)
    found = {
        False: head | _call_errors([c for c in chosen if not c.half]),
        True: _call_errors([c for c in chosen if c.half]),
    }
    limit = {False: limits.rel_error_max, True: limits.half_rel_error_max}
    where = {
        half: max(errors, key=errors.__getitem__, default="") for half, errors in found.items()
    }
    worst = {half: errors.get(where[half], 0.0) for half, errors in found.items()}
    half = max(worst, key=lambda half: worst[half] / limit[half])
    return decide(
        all(worst[half] <= limit[half] for half in worst),
        f"{where[half]} differs from the reference by {worst[half]:.2g}",
        rel_error=worst[False],
        half_rel_error=worst[True],
        head_rel_error=max(head.values()),
        worst=where[half],
        compared_calls=len(chosen),
        reference_calls=len(calls) - len(chosen),
        borders=borders,
        chunk_rows=chunk_rows,
    )


def _call_errors(calls: Sequence[KernelCall]) -> dict[str, float]:
    """Relative error of every output and gradient."""
    return {
        f"{name} of {call.title}": error
        for call in calls
        for name, error in gradient_errors(*call.compared()).items()
    }


def _head_errors(kernels: Kernels) -> tuple[dict[str, float], int]:
    """(relative errors of the head's loss and gradients, borders of chunks that were crossed).

    The head is given as many rows as one chunk holds, and some more and some fewer. Some labels do
    not count, the first and the last of a chunk among them.
    """
    n, errors, borders = kernels.head_chunk_rows, {}, 0
    for rows in (n - 1, n, n + 1, 2 * n, 2 * n + 1, 3 * n + n // 2):
        draw = torch.Generator().manual_seed(rows)
        x, head = torch.randn(rows, 6, generator=draw), torch.randn(11, 6, generator=draw)
        labels = torch.randint(0, 11, (rows,), generator=draw)
        labels[:: max(2, n // 2)] = IGNORE
        got = [torch.as_tensor(part).cpu() for part in kernels.head_in_chunks(x, head, labels)]
        wanted = _head_in_float64(x.double(), head.double(), labels)
        parts = ("the loss", "the gradient of x", "the gradient of the head")
        names = [f"{part} of the head on {rows} rows, {n} at a time" for part in parts]
        errors |= gradient_errors(dict(zip(names, got)), dict(zip(names, wanted)))
        borders += -(-rows // n) - 1
    return errors, borders


def _head_in_float64(
    x_RD: Tensor, head_VD: Tensor, labels_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of −log p(label), and its gradients written out: p minus one at the label,
    and 0 for a row without a label.
    """
    kept_R = labels_R != IGNORE
    log_p_RV = (x_RD @ head_VD.T).log_softmax(1)
    at_label_RV = torch.zeros_like(log_p_RV).scatter(1, labels_R.where(kept_R, 0)[:, None], 1.0)
    slope_RV = (log_p_RV.exp() - at_label_RV) * kept_R[:, None]
    return -(log_p_RV * at_label_RV)[kept_R].sum(), slope_RV @ head_VD, slope_RV.T @ x_RD


@decides("kernel.compiled-graph")
def compiled_graph(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The compiled graph is what runs, and gives the loss and every parameter's
    gradient that eager gives.

    The graph is built on batch 0 and judged on both, so that nothing of a batch may be built in.
    """
    model, kernels = subject.model.module, subject.kernels
    compiled_step, eager_step = kernels.compiled_step, kernels.eager_step
    first = compiled_step(0)
    second, ran = _watched(model, lambda: compiled_step(1))
    expected, of_eager = _watched(model, lambda: eager_step(1))
    if not of_eager:
        return failed(
            "eager shows no module at work either, so this check sees nothing", eager_modules=0
        )
    if ran:
        return failed(
            f"{ran} modules ran as Python code: eager is at work where the graph should be",
            modules_in_python=ran,
        )
    half = subject.declared.dtype != "float32"
    limit = limits.half_rel_error_max if half else limits.rel_error_max
    errors = {}
    for got, wanted in ((first, eager_step(0)), (second, expected)):
        if odd := sorted(got[1].keys() ^ wanted[1].keys()):
            return failed(f"a gradient is there on one side only: {odd[0]}", one_sided=len(odd))
        of_loss = gradient_errors(
            {"the loss": torch.tensor(got[0])}, {"the loss": torch.tensor(wanted[0])}
        )
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
    """What a call returns, and how often the forward code of a module inside `model` began
    to run in Python during it.
    """
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

"""Gates of kernels and compilers: what runs fast computes what the slow original computes."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stackproof.contracts.gate import Verdict, decide, decides, failed
from stackproof.contracts.loss import IGNORE, gradient_errors

Step = Callable[[int], tuple[float, Mapping[str, Tensor]]]


class KernelCall(Protocol):
    """One call of an operation, at the run's own shapes, by the kernel that
    the run has chosen for it.
    """

    title: str
    half: bool

    def compared(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Outputs and gradients by name: of the kernel, and of its reference on
        the same numbers in float64.
        """


@decides("kernel.reference")
def reference(
    limits: SimpleNamespace, *, kernel_calls: Callable[[], Sequence[KernelCall]]
) -> Verdict:
    """Every kernel that the run has chosen gives the outputs and gradients of its reference,
    at the run's own shapes.

    `kernel_calls()` are the distinct calls that one micro-batch of the run makes.
    """
    worst, where = {False: 0.0, True: 0.0}, {False: "", True: ""}
    calls = kernel_calls()
    for call in calls:
        errors = gradient_errors(*call.compared())
        name = max(errors, key=errors.__getitem__)
        if errors[name] >= worst[call.half]:
            worst[call.half], where[call.half] = errors[name], f"{name} of {call.title}"
    if not calls:
        return failed(
            "the model has called no operation, so this check has seen no kernel", calls=0
        )
    limit = {False: limits.rel_error_max, True: limits.half_rel_error_max}
    half = max(worst, key=lambda kind: worst[kind] / limit[kind])
    return decide(
        all(worst[kind] <= limit[kind] for kind in worst),
        f"{where[half]} differs from the reference by {worst[half]:.2g}",
        rel_error=worst[False],
        half_rel_error=worst[True],
        worst=where[half],
        calls=len(calls),
    )


@decides("kernel.compiled-graph")
def compiled_graph(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    compiled_step: Step,
    eager_step: Step,
    half_precision: bool,
) -> Verdict:
    """The compiled graph is what runs, and gives the loss and every parameter's
    gradient that eager gives.

    `compiled_step(i)` and `eager_step(i)` make forward and backward of batch `i` (0 or 1) in
    training mode from the same random state and return (loss in nats, gradient by name). The graph
    is built on batch 0 and judged on both, so that nothing of a batch may be built in. `model` only
    tells which Python code must not run.
    """
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
    limit = limits.half_rel_error_max if half_precision else limits.rel_error_max
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


@decides("kernel.head-borders")
def head_borders(
    limits: SimpleNamespace,
    *,
    head_in_chunks: Callable[[Tensor, Tensor, Tensor], tuple],
    head_chunk_rows: int,
) -> Verdict:
    """The head gives the loss and both gradients of float64 for as many rows as one chunk holds,
    and for some more and some fewer.

    `head_in_chunks(x_RD, head_VD, labels_R)` is the run's own head on its device, taking
    `head_chunk_rows` rows at a time: it returns (sum of nats, gradient of x, gradient of the head).
    Some labels do not count, the first and the last of a chunk among them.
    """
    n, errors, borders = head_chunk_rows, {}, 0
    for rows in (n - 1, n, n + 1, 2 * n, 2 * n + 1, 3 * n + n // 2):
        draw = torch.Generator().manual_seed(rows)
        x, head = torch.randn(rows, 6, generator=draw), torch.randn(11, 6, generator=draw)
        labels = torch.randint(0, 11, (rows,), generator=draw)
        labels[:: max(2, n // 2)] = IGNORE
        got = [torch.as_tensor(part).cpu() for part in head_in_chunks(x, head, labels)]
        wanted = _head_in_float64(x.double(), head.double(), labels)
        names = (
            f"the loss of {rows} rows",
            f"the features' gradient of {rows} rows",
            f"the head's gradient of {rows} rows",
        )
        errors |= gradient_errors(dict(zip(names, got)), dict(zip(names, wanted)))
        borders += -(-rows // n) - 1
    worst = max(errors, key=errors.__getitem__)
    text = f"the head differs from float64 by {errors[worst]:.2g} in {worst}, taken {n} at a time"
    return decide(
        errors[worst] <= limits.rel_error_max,
        text,
        rel_error=errors[worst],
        worst=worst,
        borders=borders,
        chunk_rows=n,
    )


def _head_in_float64(
    x_RD: Tensor, head_VD: Tensor, labels_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of −log p(label), and its gradients written out: p minus one at the label,
    zero where there is none.
    """
    kept_R = labels_R != IGNORE
    log_p_RV = (x_RD @ head_VD.T).log_softmax(1)
    at_label_RV = torch.zeros_like(log_p_RV).scatter(1, labels_R.where(kept_R, 0)[:, None], 1.0)
    slope_RV = (log_p_RV.exp() - at_label_RV) * kept_R[:, None]
    return -(log_p_RV * at_label_RV)[kept_R].sum(), slope_RV @ head_VD, slope_RV.T @ x_RD

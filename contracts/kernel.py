"""Gates of kernels and compilers: what runs fast computes what the slow original computes."""

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stackproof.contracts.gate import Verdict, decide, decides, failed
from stackproof.contracts.kernel_call import DistinctCalls, KernelCall
from stackproof.contracts.loss import IGNORE, gradient_errors, in_float64
from stackproof.contracts.subject import Kernels, Subject

# The head on few rows: as many features and labels that a matrix of logits is known by its shape.
HEAD, HEAD_D, HEAD_V = "linear_cross_entropy", 31, 97
CHUNK_ROWS, HEAD_ROWS = 8, range(1, 26)


@decides("kernel.parity")
def parity(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Every call of an operation gives the outputs and gradients of float64 at the run's own
    shapes, and the head also at the borders of its chunks.
    """
    calls = DistinctCalls()
    subject.kernels.observe_calls(calls.observe)
    calls = list(calls)
    if not calls:
        return failed(
            "the model has called no operation, so this check has seen no kernel", compared_calls=0
        )
    head, chunk_rows, borders = _head_errors(subject.kernels)
    if chunk_rows and not borders:
        return failed(
            f"the head computes up to {HEAD_ROWS[-1]} rows in one chunk, so this check has seen "
            "no border",
            borders=0,
        )
    if not chunk_rows and all(call.case.operation != HEAD for call in calls):
        return failed(
            "the model has not called the head, so this check has seen no border", borders=0
        )
    errors = {"rel_error": head, "half_rel_error": {}, "half_scale_error": {}}
    parts = [p for call in calls for p in ([call] if chunk_rows else _every_row(call, limits))]
    for number, call in enumerate(parts, 1):
        got, wanted = call.compared()
        found = {"half_rel_error" if call.case.half else "rel_error": gradient_errors(got, wanted)}
        if call.case.half:
            found["half_scale_error"] = {n: scale_error(got[n], x) for n, x in wanted.items()}
        for kind, named in found.items():
            errors[kind] |= {f"{n} of {call.title} (call {number})": e for n, e in named.items()}
    errors = {kind: named for kind, named in errors.items() if named}
    where = {kind: max(named, key=named.__getitem__) for kind, named in errors.items()}
    worst = {kind: named[where[kind]] for kind, named in errors.items()}
    limit = {kind: getattr(limits, f"{kind}_max") for kind in errors}
    kind = max(worst, key=lambda kind: worst[kind] / limit[kind])
    return decide(
        all(worst[kind] <= limit[kind] for kind in worst),
        f"{where[kind]} differs from the reference by {worst[kind]:.2g}",
        **worst,
        head_rel_error=max(head.values()),
        worst=where[kind],
        compared_calls=len(calls),
        torch_calls=sum(call.kernel == "torch" for call in calls),
        compared_rows=sum(call.case.part.compared for call in parts),
        rows=sum(call.case.part.total for call in calls),
        precisions=", ".join(sorted({str(c.case.dtype).removeprefix("torch.") for c in calls})),
        borders=borders,
        chunk_rows=chunk_rows,
    )


def _every_row(call: KernelCall, limits: SimpleNamespace) -> list[KernelCall]:
    """A call of a head whose borders were not observed, with all of its rows compared, so few at a
    time that one lost row changes a gradient, by 1/√n of its norm, by twice the limit.
    """
    if call.case.operation != HEAD:
        return [call]
    limit = limits.half_rel_error_max if call.case.half else limits.rel_error_max
    return call.on_every_row(int((2 * limit) ** -2))


def scale_error(got: Tensor, expected: Tensor) -> float:
    """|⟨got, expected⟩ / ⟨expected, expected⟩ − 1|. Rounding errors mostly cancel in it; a factor
    does not.
    """
    sums = [(float((a * b).sum()), float(b.square().sum())) for a, b in in_float64(got, expected)]
    product, norm = map(sum, zip(*sums))
    error = abs(product / norm - 1) if norm else 0.0
    return error if error == error else math.inf


class _ChunksOfLogits(TorchDispatchMode):
    """Notes the rows of each product that makes logits (rows, HEAD_V) from (rows, HEAD_D)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[1:] == (HEAD_V,):
            features = (len(out), HEAD_D)
            if any(isinstance(x, Tensor) and x.shape == features for x in args):
                self.rows.append(len(out))
        return out


def _head_errors(kernels: Kernels) -> tuple[dict[str, float], int, int]:
    """(relative errors of the head's loss and gradients, most rows of a chunk, borders of chunks
    that were crossed).

    Every number of rows is tried, so that each border of a chunk lies at, before and behind the
    last row once. Chunks are those whose products were observed. Where these are fewer rows
    than given, as for a library or a head that drops rows before its product, chunk and borders
    are 0. Some labels do not count.
    """
    errors, chunk_rows, borders, observed = {}, 0, 0, True
    for rows in HEAD_ROWS:
        draw = torch.Generator().manual_seed(rows)
        x, head = (torch.randn(n, HEAD_D, generator=draw).requires_grad_() for n in (rows, HEAD_V))
        labels = torch.randint(0, HEAD_V, (rows,), generator=draw)
        labels[2::3] = IGNORE
        with kernels.small_head_chunks(CHUNK_ROWS, HEAD_V):
            with _ChunksOfLogits() as chunks:
                nats = kernels.head_loss(x, head, labels)
            nats.backward()
        chunk_rows = max(chunk_rows, *chunks.rows, 0)
        borders += max(0, len(chunks.rows) - 1)
        observed &= sum(chunks.rows) >= rows
        got = (nats.detach().cpu(), x.grad, head.grad)
        wanted = _head_in_float64(x.detach().double(), head.detach().double(), labels)
        parts = ("the loss", "the gradient of x", "the gradient of the head")
        names = [f"{part} of the head on {rows} rows, {chunks.rows} at a time" for part in parts]
        errors |= gradient_errors(dict(zip(names, got)), dict(zip(names, wanted)))
    return (errors, chunk_rows, borders) if observed else (errors, 0, 0)


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
            "eager runs no module as Python code either, so nothing was observed", eager_modules=0
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

"""Derivatives of two computations of the same ids: the error that arrives in a gradient, and the error that its own derivative adds.

The loss is the mean next-token loss. The first side runs forward and backward once and leaves values and gradients in a file. The second
runs freely, and then once more with the value of every point put right, and its gradient after it was compared: what still differs was
made by the derivative of what reads that point.
"""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spec.errors import UsageError
from stack.trace.compare import Compared, Difference, Spill, coarsest, common_points, difference, widest
from stack.trace.points import Point, select, sites
from stack.trace.tap import Handler, tap
from stack.trace.trace import backward_of, run
from stack.trace.ways import Side
from stack.trace.weights import point_of

BOUND, PARAMETER_BOUND = 4.0, 1.0
FLOOR = 1e-2
PARAMETER, VALUE = "parameter ", "value "


@dataclass(frozen=True)
class Gradients:
    """Gradients at the common points in the order of the backward, then those of parameters that both sides have by one name.

    `first` is the first whose derivative adds more than its bound; `suspects` rank all of these. An added error of a parameter is held
    against at least FLOOR of the largest norm of any parameter's gradient.
    """

    points: tuple[Compared, ...]
    parameters: tuple[Compared, ...]
    first: Compared | None
    suspects: tuple[Compared, ...]
    bound: str
    runs: int = 3


def compare_gradients(a: Side, b: Side, input_ids: Tensor, names: Iterable[str] | None = None) -> Gradients:
    """Compare the gradients of both sides for the same ids (B, T), `a` taken as right: where errors arrive, and where they are made.

    Raises UsageError if no point is common, for fewer than two tokens, or where no parameter of a side wants a gradient.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise UsageError("these ids have no next-token loss", value=tuple(input_ids.shape), allowed="(B, T) with at least 2 tokens")
    common, _, _ = common_points(a, b, names)
    points = [x.point for x in reversed(select(sites(b.model, b.where), common, b.where))]
    epsilon = coarsest(a, b) * math.sqrt(widest(a, b))
    with tempfile.TemporaryDirectory(prefix="stackproof-gradients-") as folder:
        right = _Right(Spill(Path(folder)))
        right.keep(a, common, input_ids)
        free, _ = right.against(b, common, input_ids, forced=False)
        added, parameters = right.against(b, common, input_ids, forced=True)
    rows = tuple(Compared(p, free[p.name], added[p.name].rel_err, BOUND * epsilon) for p in points if p.name in free and p.name in added)
    own = [point_of(n, order) for order, n in enumerate(n for n, _ in b.model.named_parameters())]
    theirs = tuple(Compared(p, None, parameters[p.name], PARAMETER_BOUND * epsilon) for p in own if p.name in parameters)
    suspects = tuple(sorted((r for r in (*rows, *theirs) if r.excess > 1), key=lambda r: -r.excess))
    first = next((r for r in (*rows, *theirs) if r.excess > 1), None)
    said = f"{BOUND:g} · ε · √width at points and {PARAMETER_BOUND:g} at parameters, ε · √width = {epsilon:.3g}"
    return Gradients(rows, theirs, first, suspects, said)


@dataclass
class _Right:
    """Gradients of the side that is taken as right."""

    spill: Spill
    largest: float = 0.0

    def keep(self, a: Side, names: list[str], input_ids: Tensor) -> None:
        def value(point: Point, x: Tensor) -> None:
            self.spill.write(VALUE + point.name, x)

        def gradient(point: Point, grad: Tensor) -> None:
            self.spill.write(point.name, grad)

        for name, grad in _backward(a, names, input_ids, value, gradient).items():
            self.spill.write(PARAMETER + name, grad)
            self.largest = max(self.largest, float(grad.double().norm()))

    def against(self, b: Side, names: list[str], input_ids: Tensor, *, forced: bool) -> tuple[dict[str, Difference], dict[str, float]]:
        """One forward and backward of a side: differences at points, and errors at parameters; if `forced`, gradients are put right."""
        found: dict[str, Difference] = {}

        def value(point: Point, x: Tensor) -> Tensor | None:
            # a sum of right values is right, and writing over it would break graphs in which it is a view
            theirs = self._like(VALUE + point.name, x) if forced and point.flows and point.slot != "resid_mid" else None
            return None if theirs is None else _PutRight.apply(x, theirs)

        def gradient(point: Point, grad: Tensor) -> Tensor | None:
            theirs = self._like(point.name, grad)
            if theirs is not None:
                found[point.name] = difference(grad, theirs)
            return theirs if forced else None

        parameters = _backward(b, names, input_ids, value, gradient)
        return found, {name: e for name, grad in parameters.items() if (e := self._error(name, grad)) is not None}

    def _like(self, name: str, x: Tensor) -> Tensor | None:
        """What was kept by a name, as a tensor has it; None where it was not, or in another size."""
        theirs = self.spill.read(name) if name in self.spill.places else None
        return theirs.to(x.device, x.dtype).reshape(x.shape) if theirs is not None and theirs.numel() == x.numel() else None

    def _error(self, name: str, grad: Tensor) -> float | None:
        """The error of a parameter's gradient; None where the other side has no such parameter."""
        if PARAMETER + name not in self.spill.places:
            return None
        theirs = self.spill.read(PARAMETER + name)
        if theirs.shape != grad.shape:
            return None
        norm = max(float(theirs.double().norm()), FLOOR * self.largest)
        apart = float((grad.detach().double().cpu() - theirs.double()).norm())
        return apart / norm if norm else 0.0 if apart == 0 else math.inf


class _PutRight(torch.autograd.Function):
    """Another value in the place of one; gradients pass."""

    @staticmethod
    def forward(ctx, x: Tensor, right: Tensor) -> Tensor:
        return right.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _backward(one: Side, names: list[str], input_ids: Tensor, value: Handler, gradient: Handler) -> dict[str, Tensor]:
    """Gradients of a side's parameters, while values and gradients of its points are shown and may be replaced."""
    with torch.enable_grad(), one.around():
        inputs = one.inputs()
        with tap(one.model, names, value, where=one.where, on_grad=gradient):
            return backward_of(one.model, run(one.model, input_ids, inputs), input_ids)[1]

"""Derivatives of two computations of the same ids: the error that arrives in a gradient, and the
error that its own derivative adds.

The loss is the mean next-token loss. The first side runs forward and backward once and leaves
values and gradients in a file. The second runs freely, and then once more with the value of every
point put right, and its gradient after it was compared: what still differs was made by the
derivative of what reads that point. A gradient that arrives on one side only is infinitely wrong.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stackproof.spec.errors import UsageError
from stackproof.trace.compare import Difference, Spill, coarsest, common_points, difference, widest
from stackproof.trace.points import Point, read_by, select, sites
from stackproof.trace.tap import Handler, tap
from stackproof.trace.trace import backward_of, run
from stackproof.trace.ways import Side
from stackproof.trace.weights import point_of

# What rounding adds is at most FACTOR times ε·√width at a point, four times that where the gradient
# comes out of a softmax and cancels, and at most ε·√width at a parameter, held against at least
# FLOOR of the largest norm of any: a key's bias has a gradient of rounding alone. No derivative
# that is off by more than CAP of itself passes for rounding, however coarse the numbers are.
FACTOR, SOFTMAX_FACTOR, PARAMETER_FACTOR, FLOOR, CAP = 1.0, 4.0, 1.0, 1e-2, 0.1
CANCELLING = ("q", "k", "v", "q_norm", "k_norm", "q_rotated", "k_rotated", "router", "routing")
GRADIENT, PARAMETER, VALUE = "gradient ", "parameter ", "value "


@dataclass(frozen=True)
class Gradient:
    """The gradient at one point, or of one parameter. `arrived` is its error in a free run,
    `added_err` what its own derivative adds to right values and gradients; `excess` is the latter
    over its bound. `read_by` says what has that derivative, for a point; `note` what is missing.
    """

    point: Point
    arrived: Difference | None
    added_err: float
    bound: float
    read_by: str = ""
    note: str = ""

    @property
    def excess(self) -> float:
        return self.added_err / self.bound


@dataclass(frozen=True)
class Gradients:
    """Gradients at the common points in the order of the backward, then those of parameters that
    both sides have by one name.

    `first` is the first whose derivative adds more than its bound; `suspects` rank all of these.
    """

    points: tuple[Gradient, ...]
    parameters: tuple[Gradient, ...]
    first: Gradient | None
    suspects: tuple[Gradient, ...]
    bound: str
    runs: int = 3


def compare_gradients(
    a: Side, b: Side, input_ids: Tensor, names: Iterable[str] | None = None
) -> Gradients:
    """Compare the gradients of both sides for the same ids (B, T), `a` taken as right: where errors
    arrive, and where they are made.

    Raises UsageError if no point is common, for fewer than two tokens,
    or where no parameter of a side wants a gradient.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise UsageError(
            "these ids have no next-token loss",
            value=tuple(input_ids.shape),
            allowed="(B, T) with at least 2 tokens",
        )
    common, _, _ = common_points(a, b, names)
    every = [s.point for s in sites(b.model, b.where)]
    looked_at = [s.point for s in select(sites(b.model, b.where), common, b.where)]
    with tempfile.TemporaryDirectory(prefix="stackproof-gradients-") as folder:
        right = _Right(Spill(Path(folder)))
        right.keep(a, common, input_ids)
        free = right.against(b, common, input_ids, forced=False)
        forced = right.against(b, common, input_ids, forced=True)
        epsilon = coarsest(a, b) * math.sqrt(widest(a, b))
        points = [
            Gradient(
                p,
                free.points.get(p.name),
                error,
                _bound(p, epsilon),
                read_by(p, looked_at, every),
                note,
            )
            for p in reversed(looked_at)
            if (error := right.error_at(p, forced)) is not None
            for note in [_note(error)]
        ]
        theirs = {n for n, _ in a.model.named_parameters()}
        own = [
            point_of(n, order)
            for order, (n, _) in enumerate(b.model.named_parameters())
            if n in theirs
        ]
        parameters = [
            Gradient(p, None, error, min(CAP, PARAMETER_FACTOR * epsilon), note=_note(error))
            for p in own
            if (error := right.error_of(p.name, forced)) is not None
        ]
    judged = (*points, *parameters)
    suspects = tuple(sorted((g for g in judged if g.excess > 1), key=lambda g: -g.excess))
    said = (
        f"{FACTOR:g} · ε · √width, {SOFTMAX_FACTOR:g} times that before a softmax, at most "
        f"{CAP:g}, with ε · √width = {epsilon:.3g}"
    )
    return Gradients(
        tuple(points),
        tuple(parameters),
        next((g for g in judged if g.excess > 1), None),
        suspects,
        said,
    )


def _bound(point: Point, epsilon: float) -> float:
    return min(CAP, (SOFTMAX_FACTOR if point.slot in CANCELLING else FACTOR) * epsilon)


def _note(error: float) -> str:
    return "a gradient on one side only" if math.isinf(error) else ""


@dataclass
class _Seen:
    """Gradients of one run against those that are right: differences at points,
    and the gradients of parameters.
    """

    points: dict[str, Difference] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Right:
    """Values and gradients of the side that is taken as right."""

    spill: Spill
    largest: float = 0.0

    def keep(self, a: Side, names: Sequence[str], input_ids: Tensor) -> None:
        def value(point: Point, x: Tensor) -> None:
            self.spill.write(VALUE + point.name, x)

        def gradient(point: Point, grad: Tensor) -> None:
            self.spill.write(GRADIENT + point.name, grad)

        for name, grad in _backward(a, names, input_ids, value, gradient).items():
            self.spill.write(PARAMETER + name, grad)
            self.largest = max(self.largest, float(grad.double().norm()))

    def against(self, b: Side, names: Sequence[str], input_ids: Tensor, *, forced: bool) -> _Seen:
        """One forward and backward of a side; if `forced`, values are put right, and gradients
        after they were compared.
        """
        seen = _Seen()

        def value(point: Point, x: Tensor) -> Tensor | None:
            theirs = self._like(VALUE + point.name, x) if forced and point.flows else None
            return None if theirs is None else _PutRight.apply(x, theirs)

        def gradient(point: Point, grad: Tensor) -> Tensor | None:
            seen.arrived.add(point.name)
            theirs = self._like(GRADIENT + point.name, grad)
            if theirs is not None:
                seen.points[point.name] = difference(grad, theirs)
            return theirs if forced else None

        seen.parameters = _backward(b, names, input_ids, value, gradient)
        return seen

    def error_at(self, point: Point, seen: _Seen) -> float | None:
        """The error of a gradient at a point; infinite where it is there on one side only, None
        where on none, or of other tokens.
        """
        here, there = point.name in seen.arrived, GRADIENT + point.name in self.spill.places
        if here != there:
            return math.inf
        return seen.points[point.name].rel_err if point.name in seen.points else None

    def error_of(self, name: str, seen: _Seen) -> float | None:
        """The same of a parameter that both sides have."""
        here, there = name in seen.parameters, PARAMETER + name in self.spill.places
        if here != there:
            return math.inf
        if not here:
            return None
        own, theirs = (
            seen.parameters[name].detach().double().cpu(),
            self.spill.read(PARAMETER + name).double(),
        )
        if own.shape != theirs.shape:
            return math.inf
        norm, apart = max(float(theirs.norm()), FLOOR * self.largest), float((own - theirs).norm())
        return apart / norm if norm and not math.isnan(apart) else 0.0 if apart == 0 else math.inf

    def _like(self, name: str, x: Tensor) -> Tensor | None:
        """What was kept by a name, as a tensor has it; None where it was not,
        or in another size.
        """
        theirs = self.spill.read(name) if name in self.spill.places else None
        return (
            theirs.to(x.device, x.dtype).reshape(x.shape)
            if theirs is not None and theirs.numel() == x.numel()
            else None
        )


class _PutRight(torch.autograd.Function):
    """Another value in the place of one; gradients pass."""

    @staticmethod
    def forward(ctx, x: Tensor, right: Tensor) -> Tensor:
        return right.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _backward(
    one: Side, names: Sequence[str], input_ids: Tensor, value: Handler, gradient: Handler
) -> dict[str, Tensor]:
    """Gradients of a side's parameters, while values and gradients of its points are
    shown and may be replaced.
    """
    with torch.enable_grad(), one.around():
        inputs = one.inputs()
        with tap(one.model, names, value, where=one.where, on_grad=gradient):
            return backward_of(one.model, run(one.model, input_ids, inputs), input_ids)[1]

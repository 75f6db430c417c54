"""Compare gradients of two computations of the same ids: the error that arrives,
and the error that is added.

The loss is the mean next-token loss. The reference `a` runs forward and backward once and writes
values and gradients to a file. `b` runs freely, and then once more with the value of every point
replaced by that of `a`, and its gradient too after it was compared: an error in this run was added
by the derivative of the operation that reads the point. A gradient in one variant only is an
infinite error.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stackproof.spec.errors import UsageError
from stackproof.trace.compare import (
    Difference,
    Spill,
    coarsest,
    common_points,
    difference,
    fitted,
    widest,
)
from stackproof.trace.hooks import Handler
from stackproof.trace.model_variant import ModelVariant
from stackproof.trace.points import Point, read_by, sites
from stackproof.trace.trace import backward_of
from stackproof.trace.weights import point_of

# Bounds of what rounding adds: FACTOR times ε·√width at a point, four times that if the gradient
# comes out of a softmax and cancels, and PARAMETER_FACTOR times ε·√width at a parameter, four times
# that for the weight of a difference of two softmaxes, relative to at least FLOOR of the largest
# norm of all: the gradient of a key's bias is rounding alone. CAP limits every bound.
FACTOR, SOFTMAX_FACTOR, PARAMETER_FACTOR, FLOOR, CAP = 1.0, 4.0, 1.0, 1e-2, 0.1
CANCELLING = ("q", "k", "v", "q_norm", "k_norm", "q_rotated", "k_rotated", "router", "routing")
CANCELLING_PARAMETER = "attention.lambda_weight"
GRADIENT, PARAMETER, VALUE = "gradient ", "parameter ", "value "


@dataclass(frozen=True)
class Gradient:
    """The gradient at one point, or of one parameter.

    `arrived` is the error in a free run, `added_err` the error that the derivative adds to correct
    values and gradients, `excess` the latter over its bound. `read_by` names the operation with
    that derivative.
    """

    point: Point
    arrived: Difference | None
    added_err: float
    bound: float
    read_by: str = ""

    @property
    def note(self) -> str:
        return "a gradient on one side only" if math.isinf(self.added_err) else ""

    @property
    def excess(self) -> float:
        return self.added_err / self.bound


@dataclass(frozen=True)
class Gradients:
    """Gradients at the common points in the order of the backward,
    then of parameters with the same name.

    `first` is the first gradient above its bound, `suspects` all of them by excess.
    """

    points: tuple[Gradient, ...]
    parameters: tuple[Gradient, ...]
    first: Gradient | None
    suspects: tuple[Gradient, ...]
    bound: str
    runs: int = 3


def compare_gradients(
    a: ModelVariant, b: ModelVariant, input_ids: Tensor, names: Iterable[str] | None = None
) -> Gradients:
    """Compare gradients of `b` with those of the reference `a` on the same ids (B, T).

    Raises UsageError if no point is common, for fewer than two tokens,
    or if no parameter requires a gradient.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise UsageError(
            "the next-token loss needs two tokens",
            value=tuple(input_ids.shape),
            allowed="(B, T) with at least 2 tokens",
        )
    common, _, _ = common_points(a, b, names)
    every = [s.point for s in sites(b.model, b.where)]
    looked_at = [s.point for s in sites(b.model, b.where, common)]
    with tempfile.TemporaryFile() as file:
        right = _Right(Spill(file))
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
            )
            for p in reversed(looked_at)
            if (error := right.error_at(p, forced)) is not None
        ]
        theirs = {n for n, _ in a.model.named_parameters()}
        own = [
            point_of(n, order)
            for order, (n, _) in enumerate(b.model.named_parameters())
            if n in theirs
        ]
        parameters = [
            Gradient(p, None, error, _parameter_bound(p, epsilon))
            for p in own
            if (error := right.error_of(p.name, forced)) is not None
        ]
    judged = (*points, *parameters)
    suspects = tuple(sorted((g for g in judged if g.excess > 1), key=lambda g: -g.excess))
    bound = (
        f"{FACTOR:g} · ε · √width, {SOFTMAX_FACTOR:g} times that before a softmax, at most "
        f"{CAP:g}, with ε · √width = {epsilon:.3g}"
    )
    return Gradients(
        tuple(points),
        tuple(parameters),
        next((g for g in judged if g.excess > 1), None),
        suspects,
        bound,
    )


def _bound(point: Point, epsilon: float) -> float:
    return min(CAP, (SOFTMAX_FACTOR if point.slot in CANCELLING else FACTOR) * epsilon)


def _parameter_bound(parameter: Point, epsilon: float) -> float:
    factor = SOFTMAX_FACTOR if parameter.slot == CANCELLING_PARAMETER else 1
    return min(CAP, factor * PARAMETER_FACTOR * epsilon)


@dataclass
class _Seen:
    """Gradients of one run: differences from the reference at points,
    and the gradients of parameters.
    """

    points: dict[str, Difference] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Right:
    """Values and gradients of the reference."""

    spill: Spill
    largest: float = 0.0

    def keep(self, a: ModelVariant, names: Sequence[str], input_ids: Tensor) -> None:
        gradients = _backward(
            a,
            names,
            input_ids,
            lambda point, x: self.spill.write(VALUE + point.name, x),
            lambda point, grad: self.spill.write(GRADIENT + point.name, grad),
        )
        for name, grad in gradients.items():
            self.spill.write(PARAMETER + name, grad)
            self.largest = max(self.largest, float(grad.double().norm()))

    def against(
        self, b: ModelVariant, names: Sequence[str], input_ids: Tensor, *, forced: bool
    ) -> _Seen:
        """One forward and backward of `b`; if `forced`, values are replaced,
        and gradients after the comparison.
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
        """The error of the gradient at a point; infinite in one variant only,
        None in neither or of other tokens.
        """
        here, there = point.name in seen.arrived, GRADIENT + point.name in self.spill.places
        if here != there:
            return math.inf
        return seen.points[point.name].rel_err if point.name in seen.points else None

    def error_of(self, name: str, seen: _Seen) -> float | None:
        """The same of a parameter."""
        here, there = name in seen.parameters, PARAMETER + name in self.spill.places
        if here != there:
            return math.inf
        if not here:
            return None
        own = seen.parameters[name].detach().double().cpu()
        theirs = self.spill.read(PARAMETER + name).double()
        if own.shape != theirs.shape:
            return math.inf
        norm, apart = max(float(theirs.norm()), FLOOR * self.largest), float((own - theirs).norm())
        return apart / norm if norm and not math.isnan(apart) else 0.0 if apart == 0 else math.inf

    def _like(self, name: str, x: Tensor) -> Tensor | None:
        return fitted(self.spill.read(name) if name in self.spill.places else None, x)


class _PutRight(torch.autograd.Function):
    """Replace a value; its gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, right: Tensor) -> Tensor:
        return right.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _backward(
    one: ModelVariant, names: Sequence[str], input_ids: Tensor, value: Handler, gradient: Handler
) -> dict[str, Tensor]:
    """Gradients of the parameters; handlers get values and gradients of the points."""
    with torch.enable_grad(), one.running(input_ids, names, value, on_grad=gradient) as logits:
        return backward_of(one.model, logits, input_ids)[1]

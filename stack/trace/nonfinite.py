"""Find the first operation that creates a NaN or an infinity, forward or backward, in any code that
runs in torch.

A dispatch mode checks every operation below autograd. Non-finite values are marked with their
origin, and results inherit the mark, so the operation named is the one whose value reaches the
result. Infinities of masks, and values that a later selection discards, are reported separately. A
compiled graph or a Triton kernel counts as one operation, or is not visible.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from stackproof.spec.errors import UsageError
from stackproof.trace.call_site import CallSite, CallSites, track_call_sites
from stackproof.trace.hooks import hook_points
from stackproof.trace.maps import map_of
from stackproof.trace.points import Point, sites

EVENTS_MAX = 64  # kept for one report
SHOWN_MAX = 4  # tensors shown of a list
UNWRITTEN = frozenset(
    f"aten::{n}"
    for n in "empty empty_like empty_strided empty_permuted new_empty new_empty_strided".split()
)
OVERWRITING = frozenset(
    f"aten::{n}_"
    for n in "copy fill zero normal uniform bernoulli random exponential log_normal".split()
)
CONSTANT, HOST_READ, INTO_GRADIENT = (
    "aten::lift_fresh",
    "aten::_local_scalar_dense",
    "torch::autograd::AccumulateGrad",
)


@dataclass(frozen=True)
class Values:
    """Contents of a tensor. Statistics are of its finite values, in float64; None without any.

    `held` is the name of the parameter or buffer, if the tensor is one; `first_bad` is the index of
    the first non-finite value.
    """

    name: str
    held: str
    shape: tuple[int, ...]
    dtype: str
    n: int
    n_nan: int
    n_posinf: int
    n_neginf: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    first_bad: tuple[int, ...] | None


@dataclass(frozen=True)
class Event:
    """An operation with a non-finite result that no earlier operation explains.

    `made`: from finite inputs, or a NaN from infinities that were put in. `came in`: an input
    (`carrier`, if named) held it before the trace began. `put in`: a constant of the code, such as
    a mask value. `number` counts operations from 1. `inputs` are the values before the operation.
    """

    kind: Literal["made", "came in", "put in"]
    what: Literal["NaN", "Inf"]
    op: str
    where: CallSite
    number: int
    inputs: tuple[Values, ...]
    outputs: tuple[Values, ...]
    scalars: tuple[tuple[str, Any], ...]
    carrier: str = ""

    @property
    def strong(self) -> bool:
        """Whether non-finite values computed from this one are attributed to it."""
        return self.kind == "made" or (
            self.kind == "came in" and (self.what == "NaN" or self.carrier.startswith("parameter"))
        )


@dataclass(frozen=True)
class Report:
    """`first` is the origin of the result's non-finite values; None if it is finite.
    `others` came later or had no effect.

    `point` is the first point of the name map that held the value (in a backward, its gradient), ""
    if none did. `already` names parameters and buffers that were non-finite before, `ended_by` the
    error that ended the call.
    """

    first: Event | None
    others: tuple[Event, ...]
    already: tuple[str, ...]
    operations: int
    seconds: float
    point: str = ""
    ended_by: str = ""


@dataclass(frozen=True)
class _Read:
    """An input of an operation; `values` is a copy if the operation writes to `tensor` in place."""

    name: str
    index: int | None
    tensor: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Operation:
    """One call of an operation: arguments by name, and the tensors it reads."""

    func: Any
    given: dict[str, Any]
    where: CallSite
    read: list[_Read]

    @property
    def name(self) -> str:
        return self.func._schema.name


_Result = tuple[str, int | None, Tensor]


class Watch(TorchDispatchMode):
    """Dispatch mode that checks every operation.
    `held` names storages of parameters and buffers.
    """

    def __init__(self, here: CallSites, held: Mapping[int, str]):
        super().__init__()
        self.here, self.held = here, held
        self.events: list[Event] = []
        self.landed: list[Event] = []  # reached a gradient, or a number read out of a tensor
        self.passed: list[tuple[str, Event]] = []  # points with a non-finite value
        self.operations, self.started = 0, time.perf_counter()
        # the weak reference keeps the address from being reused
        self._marks: dict[int, tuple[StorageWeakRef, Event]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        given = _given(func, args, kwargs)
        operation = _Operation(func, given, self.here.current(str(func)), _read(func, given))
        result = func(*args, **kwargs)
        if operation.name == HOST_READ or operation.where.node == INTO_GRADIENT:
            self.landed += [
                mark
                for r in operation.read
                if not is_finite(r.values) and (mark := self.mark(r.tensor))
            ]
        if operation.name not in UNWRITTEN:
            self._look(operation, _results(operation, result))
        return result

    def mark(self, tensor: Tensor) -> Event | None:
        """The origin of the non-finite values of a tensor, if known."""
        _, event = self._marks.get(storage_of(tensor)._cdata, (None, None))
        return event

    def pass_by(self, point: Point, tensor: Tensor) -> None:
        """Note a point with a non-finite value.
        A handler of `hook_points`, for values and gradients.
        """
        with _disable_current_modes():
            if not is_finite(tensor) and (mark := self.mark(tensor)):
                self.passed.append((point.name, mark))

    def _look(self, operation: _Operation, results: list[_Result]) -> None:
        bad = [(name, i, t) for name, i, t in results if not is_finite(t)]
        event = self._explain(operation, bad) if bad else None
        for _, _, tensor in results:
            storage = storage_of(tensor)
            if tensor.numel() * tensor.element_size() >= storage.nbytes():
                self._marks.pop(storage._cdata, None)
        for _, _, tensor in bad:
            storage = storage_of(tensor)
            self._marks[storage._cdata] = (StorageWeakRef(storage), event)

    def _explain(self, operation: _Operation, bad: list[_Result]) -> Event:
        """The origin of a non-finite result: an earlier event, or a new one."""
        guilty = [r for r in operation.read if not is_finite(r.values)]
        marks = {id(r): self.mark(r.tensor) for r in guilty}
        if strong := [m for m in marks.values() if m is not None and m.strong]:
            return min(strong, key=lambda e: e.number)
        what = "NaN" if any(bool(t.isnan().any()) for _, _, t in bad) else "Inf"
        alike = [r for r in guilty if bool(r.values.isnan().any())] if what == "NaN" else guilty
        if operation.name == CONSTANT or (not alike and _has(operation.given, what)):
            return self._enter("put in", what, operation, bad)
        if unmarked := [r for r in alike if marks[id(r)] is None]:
            carrier = next(
                (c for r in unmarked if (c := self.held.get(storage_of(r.tensor)._cdata, ""))), ""
            )
            return self._enter(
                "came in", what, operation, bad, carrier or f"argument {unmarked[0].name}"
            )
        if alike:
            return min((marks[id(r)] for r in alike), key=lambda e: e.number)
        return self._enter("made", what, operation, bad)

    def _enter(
        self, kind: str, what: str, operation: _Operation, bad: list[_Result], carrier: str = ""
    ) -> Event:
        at, given = bad[0][1], operation.given
        shown = [r for r in operation.read if r.index is None or r.index == at or at is None][
            : 2 * SHOWN_MAX
        ]
        event = Event(
            kind=kind,
            what=what,
            op=str(operation.func),
            where=operation.where,
            number=self.operations,
            inputs=tuple(
                self._values(_numbered(r.name, r.index), r.tensor, r.values) for r in shown
            ),
            outputs=tuple(self._values(_numbered(name, i), t, t) for name, i, t in bad[:SHOWN_MAX]),
            scalars=tuple(
                (k, v if isinstance(v, int | float | None) else str(v))
                for k, v in given.items()
                if not _tensors(v)
            ),
            carrier=carrier,
        )
        if len(self.events) < EVENTS_MAX:
            self.events.append(event)
        return event

    def _values(self, name: str, tensor: Tensor, values: Tensor) -> Values:
        return summary(values, name, self.held.get(storage_of(tensor)._cdata, ""))


def summary(tensor: Tensor, name: str, held: str = "") -> Values:
    """Counts and statistics of a tensor; integers and booleans count as numbers."""
    wide = _plain(tensor).double()
    bad, n = ~wide.isfinite(), wide.numel()
    good = wide[~bad]
    some = good.numel() > 0
    first = tuple(int(i) for i in bad.nonzero()[0]) if bool(bad.any()) else None
    return Values(
        name=name,
        held=held,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        n=n,
        n_nan=int(wide.isnan().sum()),
        n_posinf=int(wide.isposinf().sum()),
        n_neginf=int(wide.isneginf().sum()),
        min=float(good.min()) if some else None,
        max=float(good.max()) if some else None,
        mean=float(good.mean()) if some else None,
        std=float(good.std(correction=0)) if some else None,
        first_bad=first,
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite: one pass, and a second if the sum overflows.
    True for integers and empty tensors.
    """
    if tensor.device.type == "meta" or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = _plain(tensor)
    wide = torch.promote_types(values.dtype, torch.float32)
    return math.isfinite(values.sum(dtype=wide).item()) or bool(values.isfinite().all())


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """The storage of a tensor; for a sparse one, of its values."""
    return (tensor if tensor.layout == torch.strided else tensor._values()).untyped_storage()


def _plain(tensor: Tensor) -> Tensor:
    """A dense real tensor: values of a sparse one, parts of a complex one,
    eight-bit floats as float32.
    """
    if tensor.layout != torch.strided:
        tensor = tensor._values()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _given(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names in the schema of the operation."""
    return dict(zip((a.name for a in func._schema.arguments), args)) | dict(kwargs)


def _tensors(value: Any) -> list[tuple[int | None, Tensor]]:
    """The tensors of an argument or result, with their index if it is a list."""
    if isinstance(value, Tensor):
        return [(None, value)]
    items = value if isinstance(value, list | tuple) else ()
    return [(i, t) for i, t in enumerate(items) if isinstance(t, Tensor)]


def _written(func: Any) -> set[str]:
    """Names of the arguments that the operation writes to."""
    return {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }


def _read(func: Any, given: dict[str, Any]) -> list[_Read]:
    """The tensors that the operation reads; those it also writes to are copied."""
    written, outs = _written(func), {a.name for a in func._schema.arguments if a.is_out}
    if func._schema.name in OVERWRITING:
        outs = outs | {"self"}
    return [
        _Read(name, i, t, t.clone() if name in written else t)
        for name, value in given.items()
        if name not in outs
        for i, t in _tensors(value)
    ]


def _results(operation: _Operation, result: Any) -> list[_Result]:
    """Values that the operation creates: arguments it wrote to, and results that are not views of
    its inputs.
    """
    written = [
        (name, i, t)
        for name in sorted(_written(operation.func))
        for i, t in _tensors(operation.given.get(name))
    ]
    known = {storage_of(t)._cdata for _, _, t in written} | {
        storage_of(r.tensor)._cdata for r in operation.read
    }
    fresh = [
        ("result", i, t)
        for i, t in _tensors(result)
        if operation.name == CONSTANT or storage_of(t)._cdata not in known
    ]
    return written + fresh


def _has(given: dict[str, Any], what: str) -> bool:
    """Whether a number among the arguments is a NaN (`what` = NaN) or non-finite."""
    numbers = [v for v in tree_leaves(list(given.values())) if isinstance(v, float)]
    return any(math.isnan(v) if what == "NaN" else not math.isfinite(v) for v in numbers)


def _numbered(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


class Watching:
    """Findings of a `with watching(…)` block."""

    def __init__(self, watch: Watch, models: Mapping[str, nn.Module], already: tuple[str, ...]):
        self.watch, self.models, self.already, self.seconds = watch, models, already, 0.0

    def report(self, *results: Any, ended_by: str = "") -> Report:
        """Report the event that reached `results`, gradients or weights;
        else one that reached a gradient or a number.

        Infinities that were put in count only if they themselves reach a number such as the loss.
        If the call ended with an error, the first event is reported.
        """
        watch = self.watch
        tensors = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        tensors += [
            t
            for m in self.models.values()
            for p in m.parameters()
            for t in (p, p.grad)
            if t is not None
        ]
        reached = [e for t in tensors if not is_finite(t) and (e := watch.mark(t)) is not None]
        reached = reached or watch.landed or (watch.events if ended_by else [])
        alone = [e for e in watch.landed if reached and not e.strong]
        weak = {id(e) for e in reached if not e.strong} - {id(e) for e in alone}
        first = min([*reached, *alone], key=lambda e: (id(e) in weak, e.number), default=None)
        others = tuple(e for e in watch.events if e is not first)
        point = next((name for name, event in watch.passed if event is first), "")
        return Report(first, others, self.already, watch.operations, self.seconds, point, ended_by)


@contextmanager
def watching(models: nn.Module | Mapping[str, nn.Module] | None = None) -> Iterator[Watching]:
    """Check every operation inside the block; modules of `models` are named by their paths.

    All hooks are removed on exit. Results are bit-equal; docs/probing.md states the cost.
    """
    named = {"": models} if isinstance(models, nn.Module) else dict(models or {})
    held, already = {}, []
    for key, model in named.items():
        for kind, tensors in (
            ("parameter", model.named_parameters()),
            ("buffer", model.named_buffers()),
        ):
            for path, tensor in tensors:
                name = ".".join(filter(None, (key, path)))
                held[storage_of(tensor)._cdata] = f"{kind} {name}"
                already += [] if is_finite(tensor) else [name]
    with track_call_sites(named) as here:
        watch = Watch(here, held)
        seen = Watching(watch, named, tuple(already))
        try:
            with _passing_by(named, watch), watch:
                yield seen
        finally:
            seen.seconds = time.perf_counter() - watch.started


@contextmanager
def _passing_by(models: Mapping[str, nn.Module], watch: Watch) -> Iterator[None]:
    """Hook the points of the models that have a name map."""
    with ExitStack() as stack:
        for model in models.values():
            with suppress(UsageError):
                names = [s.point.name for s in sites(model, map_of(model)) if not s.point.derived]
                stack.enter_context(hook_points(model, names, watch.pass_by, on_grad=watch.pass_by))
        yield


def first_nonfinite(
    call: Callable[..., Any],
    *args: Any,
    models: nn.Module | Mapping[str, nn.Module] | None = None,
    backward: bool = False,
    **kwargs: Any,
) -> Report:
    """Run `call(*args, **kwargs)` once and find the first operation that created a NaN
    or infinity in its result.

    A module as `call` is its own model. With `backward`, the sum of the floating-point results is
    differentiated, and gradients of the parameters are results too. An error after such an
    operation is part of the report; any other error is raised.
    """
    models = call if models is None and isinstance(call, nn.Module) else models
    result, ended_by = None, ""
    with watching(models) as seen:
        try:
            result = call(*args, **kwargs)
            if backward:
                sum(
                    t.sum()
                    for t in tree_leaves(result)
                    if isinstance(t, Tensor) and t.requires_grad
                ).backward()
        except Exception as e:
            if not any(event.strong for event in seen.watch.events):
                raise
            ended_by = f"{type(e).__name__}: {e}"
    return seen.report(result, ended_by=ended_by)

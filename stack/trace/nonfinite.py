"""The first operation that makes a NaN or an infinity, forward or backward, of any module or
function that runs in plain torch.

Every operation below autograd is looked at as it runs. Values that are not finite carry the mark of
where they come from to whatever is computed from them, so that of many such operations the one is
named that reaches the result. An infinity that a mask puts in, or one that a later choice throws
away, is told apart. What torch.compile or a Triton kernel does inside is one operation, or not seen
at all.
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
from stackproof.trace.maps import map_of
from stackproof.trace.points import Point, sites
from stackproof.trace.tap import tap
from stackproof.trace.whereabouts import Where, Whereabouts, whereabouts

EVENTS_MAX = 64  # told in one report
SHOWN_MAX = 4  # tensors of a list that an operation takes or gives
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
    """What a tensor held. Statistics are of its finite values, in float64;
    None where there are none.

    `held` says which parameter or buffer it is, if one; `first_bad` is the index of the first
    value that is not finite.
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
    """An operation whose result is not finite, and nothing before it is the reason.

    `made`: of finite inputs, or a NaN of infinities that were put in. `came in`: an input, which
    may be `carrier`, held it before the trace began. `put in`: a constant that the code names
    itself, as masks do. `number` counts operations from 1. `inputs` are as they were before the
    operation: what was last good.
    """

    kind: Literal["made", "came in", "put in"]
    what: Literal["NaN", "Inf"]
    op: str
    where: Where
    number: int
    inputs: tuple[Values, ...]
    outputs: tuple[Values, ...]
    scalars: tuple[tuple[str, Any], ...]
    carrier: str = ""

    @property
    def strong(self) -> bool:
        """Whether what is computed from this is put down to it, and not looked at for itself."""
        return self.kind == "made" or (
            self.kind == "came in" and (self.what == "NaN" or self.carrier.startswith("parameter"))
        )


@dataclass(frozen=True)
class Report:
    """`first` made what reached the result; None where all of that is finite.
    `others` reached nothing or came later.

    `point` is the first place of the map of names that showed it, "" where no map fits or it passed
    none; in a backward, by its gradient. `already` names parameters and buffers that were not
    finite before; `ended_by` is the error that the call ended with, if one.
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
    """A tensor that an operation reads, as it was before: `values` is a copy where the operation
    works in place on `tensor`.
    """

    name: str
    index: int | None
    tensor: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Operation:
    """One operation as it was called: arguments by name, and what it was about to read."""

    func: Any
    given: dict[str, Any]
    where: Where
    read: list[_Read]

    @property
    def name(self) -> str:
        return self.func._schema.name


_Result = tuple[str, int | None, Tensor]


class Watch(TorchDispatchMode):
    """Looks at every operation for the time of a `with`.
    `held` names storages of parameters and buffers.
    """

    def __init__(self, here: Whereabouts, held: Mapping[int, str]):
        super().__init__()
        self.here, self.held = here, held
        self.events: list[Event] = []
        # what reached a gradient, or a number that was read out of a tensor
        self.landed: list[Event] = []
        self.passed: list[tuple[str, Event]] = []  # points that showed something that is not finite
        self.operations, self.started = 0, time.perf_counter()
        # the weak reference keeps the key from being used again
        self._marks: dict[int, tuple[StorageWeakRef, Event]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        given = _given(func, args, kwargs)
        operation = _Operation(func, given, self.here.where(str(func)), _read(func, given))
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
        """Where what is not finite in the tensor comes from."""
        _, event = self._marks.get(storage_of(tensor)._cdata, (None, None))
        return event

    def pass_by(self, point: Point, tensor: Tensor) -> None:
        """Note a point that shows what is not finite.
        A handler of `tap`, for values and gradients.
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
        """The event that a result that is not finite goes back to: an earlier one, or a new one."""
        guilty = [r for r in operation.read if not is_finite(r.values)]
        marks = {id(r): self.mark(r.tensor) for r in guilty}
        if strong := [m for m in marks.values() if m is not None and m.strong]:
            return min(strong, key=lambda e: e.number)
        what = "NaN" if any(bool(t.isnan().any()) for _, _, t in bad) else "Inf"
        alike = [r for r in guilty if bool(r.values.isnan().any())] if what == "NaN" else guilty
        if operation.name == CONSTANT or (not alike and _has(operation.given, what)):
            return self._enter("put in", what, operation, bad)
        if strangers := [r for r in alike if marks[id(r)] is None]:
            carrier = next(
                (c for r in strangers if (c := self.held.get(storage_of(r.tensor)._cdata, ""))), ""
            )
            return self._enter(
                "came in", what, operation, bad, carrier or f"argument {strangers[0].name}"
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
    """Counts and statistics of a tensor.
    Those of integers and truth values are of their numbers.
    """
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
    """Whether every value is. One pass, and a second where the sum overflows.
    True for types that hold no NaN, and for no values.
    """
    if tensor.device.type == "meta" or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = _plain(tensor)
    wide = torch.promote_types(values.dtype, torch.float32)
    return math.isfinite(values.sum(dtype=wide).item()) or bool(values.isfinite().all())


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """The memory of a tensor; of a sparse one, that of its values."""
    return (tensor if tensor.layout == torch.strided else tensor._values()).untyped_storage()


def _plain(tensor: Tensor) -> Tensor:
    """A tensor on which every function is defined: values of a sparse one, parts of a complex one,
    eight-bit floats as float32.
    """
    if tensor.layout != torch.strided:
        tensor = tensor._values()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _given(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operation's schema."""
    return dict(zip((a.name for a in func._schema.arguments), args)) | dict(kwargs)


def _tensors(value: Any) -> list[tuple[int | None, Tensor]]:
    """The tensors of an argument or result, numbered where it is a list."""
    if isinstance(value, Tensor):
        return [(None, value)]
    return (
        [(i, t) for i, t in enumerate(value) if isinstance(t, Tensor)]
        if isinstance(value, list | tuple)
        else []
    )


def _written(func: Any) -> set[str]:
    """Arguments that the operation writes to."""
    return {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }


def _read(func: Any, given: dict[str, Any]) -> list[_Read]:
    """What the operation is about to read, with copies of what it writes to at the same time."""
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
    """New values that the operation has made: results that are no views of what it read,
    and what it wrote to.
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
    """Whether a number among the arguments is such a value: infinities make a NaN
    only with the help of others.
    """
    numbers = [v for v in tree_leaves(list(given.values())) if isinstance(v, float)]
    return any(math.isnan(v) if what == "NaN" else not math.isfinite(v) for v in numbers)


def _numbered(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


class Watching:
    """What a `with watching(…)` has seen."""

    def __init__(self, watch: Watch, models: Mapping[str, nn.Module], already: tuple[str, ...]):
        self.watch, self.models, self.already, self.seconds = watch, models, already, 0.0

    def report(self, *results: Any, ended_by: str = "") -> Report:
        """The event that reached `results`, the gradients or the weights; else one that was seen to
        land in a gradient or a number.

        A NaN of infinities that were put in goes back to them only where they land in a number
        themselves, as a loss does. Of an error no more is known than what came before it, so the
        first event is named.
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
    """Look at every operation inside the `with`, and name places in the modules
    of `models` by their paths.

    No hook stays behind. What is computed is the same to the bit; it takes several times as long:
    measured in docs/probing.md.
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
    with whereabouts(named) as here:
        watch = Watch(here, held)
        seen = Watching(watch, named, tuple(already))
        try:
            with _passing_by(named, watch), watch:
                yield seen
        finally:
            seen.seconds = time.perf_counter() - watch.started


@contextmanager
def _passing_by(models: Mapping[str, nn.Module], watch: Watch) -> Iterator[None]:
    """Points of those models that a map of names fits."""
    with ExitStack() as stack:
        for model in models.values():
            with suppress(UsageError):
                names = [s.point.name for s in sites(model, map_of(model)) if not s.point.derived]
                stack.enter_context(tap(model, names, watch.pass_by, on_grad=watch.pass_by))
        yield


def first_nonfinite(
    call: Callable[..., Any],
    *args: Any,
    models: nn.Module | Mapping[str, nn.Module] | None = None,
    backward: bool = False,
    **kwargs: Any,
) -> Report:
    """Run `call(*args, **kwargs)` once and name the first operation that made a NaN or an
    infinity of what it returns.

    A call that is a module is its own model. With `backward`, the sum of the floating results is
    differentiated, and gradients of the models' parameters are results too. An error that comes
    after such an operation is told in the report; others travel on.
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

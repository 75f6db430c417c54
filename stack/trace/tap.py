"""Hooks for the length of a `with`: every value at a point is shown to a handler,
which may put another in its place.

The model itself runs, nothing is computed again; what is left behind afterwards is nothing.
B batch, T tokens, N heads, K key/value heads, H head_dim, F features, R rows of tokens
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.spec.errors import UsageError
from stackproof.trace import scores
from stackproof.trace.maps import map_of
from stackproof.trace.points import (
    Attention,
    Function,
    Input,
    Layout,
    NameMap,
    Output,
    Place,
    Point,
    Routing,
    Silu,
    Site,
    sites,
)
from stackproof.trace.room import Room, room_for

Handler = Callable[[Point, Tensor], Tensor | None]


@contextmanager
def tap(
    model: nn.Module,
    names: Iterable[str] | None,
    handler: Handler,
    *,
    where: NameMap | Mapping[str, str | Place] | None = None,
    on_grad: Handler | None = None,
    scratch: bool = False,
) -> Iterator[list[Point]]:
    """Show `handler(point, tensor)` every value at the points `names` (None:
    all) while the block runs; gives the points.

    Tensors begin with (B, T), experts and routers with (1, R). A tensor that the handler returns,
    of the same shape, flows on in its place; points that do not flow are only shown. `on_grad` sees
    gradients in the same layout, where there are any, and what it returns goes on in the backward
    in their place. The handler is called as modules run, so a derived point comes with what it is
    derived from. With `scratch`, derived values lie in memory that the next one is written to: for
    handlers that keep nothing. Raises UsageError for unknown names.
    """
    where = map_of(model, where)
    chosen = sites(model, where, names)
    view = _Viewer(handler, on_grad, scratch)
    with ExitStack() as undo:
        for site in chosen:
            match site.place:
                case Attention():
                    continue
                case Routing(function=(module, name)):
                    _wrap_routing(model, site, module, name, view, undo)
                case _:
                    undo.callback(_hook(model, site, view).remove)
        inside = [s for s in chosen if isinstance(s.place, Attention)]
        if inside and where.function is not None:
            _wrap(model, where, inside, view, undo)
        yield [s.point for s in chosen]


@dataclass(frozen=True)
class _Form:
    """How a raw tensor is laid out, and what is taken of it before that; `grad` takes the same of
    its gradient, and both are undone.
    """

    layout: Layout
    take: Callable[[Tensor], Tensor] = lambda x: x
    grad: Callable[[Tensor], Tensor] | None = None
    back: Callable[[Tensor, Tensor], Tensor] = lambda new, raw: new
    grad_back: Callable[[Tensor, Tensor], Tensor] | None = None


def _part(layout: Layout, part: tuple[int, int] | None) -> _Form:
    """The i-th of n equal parts of the features, or all of them."""
    if part is None:
        return _Form(layout)
    i, n = part
    return _Form(
        layout,
        take=lambda raw: raw.chunk(n, -1)[i],
        back=lambda new, raw: torch.cat(
            [new if j == i else p for j, p in enumerate(raw.chunk(n, -1))], -1
        ),
    )


class _Viewer:
    """Shows one tensor in the layout that handlers see, and takes back what replaces it."""

    def __init__(self, handler: Handler, on_grad: Handler | None, scratch: bool = False):
        self.handler, self.on_grad, self.scratch = handler, on_grad, scratch

    def show(self, point: Point, raw: Tensor, form: _Form) -> Tensor | None:
        """The tensor to use instead of `raw`, or None."""
        if self.on_grad is not None and raw.requires_grad and not point.derived:
            raw.register_hook(lambda grad: self._gradient(point, grad, form))
        seen = _shown(form.take(raw), form.layout)
        new = self.handler(point, seen)
        if new is None:
            return None
        if not point.flows:
            how = (
                "is worked out beside the model"
                if point.derived
                else "is returned beside what the model reads"
            )
            raise UsageError(
                f"{point.name} {how}, so nothing flows on from it",
                next_step="replace its sources, or what follows",
            )
        if new.shape != seen.shape:
            raise UsageError(
                f"{point.name} cannot be replaced by another shape",
                value=tuple(new.shape),
                allowed=tuple(seen.shape),
            )
        return form.back(_hidden(new.to(raw.dtype), form.layout), raw)

    def _gradient(self, point: Point, grad: Tensor, form: _Form) -> Tensor | None:
        """The gradient to go on with, or None."""
        new = self.on_grad(point, _shown((form.grad or form.take)(grad), form.layout))
        return (
            None
            if new is None
            else (form.grad_back or form.back)(_hidden(new.to(grad.dtype), form.layout), grad)
        )


def _shown(x: Tensor, layout: Layout) -> Tensor:
    match layout:
        case "BTF" | "BTNH":
            return x
        case "BNTH":
            return x.transpose(1, 2)
        case "RF":
            return x[None]
        case other:
            assert_never(other)


def _hidden(x: Tensor, layout: Layout) -> Tensor:
    """Back from what handlers see."""
    return x[0] if layout == "RF" else _shown(x, layout)


def _hook(model: nn.Module, site: Site, view: _Viewer) -> Any:
    """Register the hook of a place that is a module's; gives the handle that removes it."""
    point = site.point
    match site.place:
        case Output(path, layout, part, _):
            form = _part(layout, part)
            return model.get_submodule(path).register_forward_hook(
                lambda m, a, out: _with_first(out, view, point, form)
            )
        case Silu(path, layout):
            return model.get_submodule(path).register_forward_hook(
                lambda m, a, out: _beside(view, point, _silu(_tensor(out), view.scratch), layout)
            )
        case Routing(path):
            return model.get_submodule(path).register_forward_hook(
                lambda m, a, out: _routed(view, point, site.place, out)
            )
        case Input(path, layout, shared):
            # where gradients are shown, nothing is written over: a graph may hold it
            given = _given_shared if shared and view.on_grad is None else _given
            return model.get_submodule(path).register_forward_pre_hook(
                lambda m, a, kw: given(a, kw, view, point, layout), with_kwargs=True
            )
        case other:
            raise TypeError(other)


def _beside(view: _Viewer, point: Point, figure: Tensor, layout: Layout) -> None:
    view.show(point, figure.detach(), _Form(layout))


def _silu(x: Tensor, scratch: bool) -> Tensor:
    if not scratch:
        return F.silu(x)
    held = room_for("derived").take(x.numel(), x.dtype, x.device).view(x.shape)
    return torch.ops.aten.silu.out(x.detach(), out=held)


def _tensor(out: Any) -> Tensor:
    """The first tensor of what a module returned."""
    return out if isinstance(out, Tensor) else next(o for o in out if isinstance(o, Tensor))


def _with_first(out: Any, view: _Viewer, point: Point, form: _Form) -> Any:
    # a whole model of transformers
    if not isinstance(out, Tensor | tuple | list) and hasattr(out, "logits"):
        new = view.show(point, out.logits, form)
        return None if new is None else type(out)(**(dict(out.items()) | {"logits": new}))
    first = _tensor(out)
    new = view.show(point, first, form)
    if new is None or isinstance(out, Tensor):
        return new
    return tuple(new if o is first else o for o in out)


def _given(
    args: tuple, kwargs: dict[str, Any], view: _Viewer, point: Point, layout: Layout
) -> tuple[tuple, dict] | None:
    """Show the first tensor that goes in; where another takes its place, the arguments with it."""
    at, key, first = _first_given(args, kwargs)
    new = view.show(point, first, _Form(layout))
    if new is None:
        return None
    if key is None:
        return (*args[:at], new, *args[at + 1 :]), kwargs
    return args, kwargs | {key: new}


def _given_shared(
    args: tuple, kwargs: dict[str, Any], view: _Viewer, point: Point, layout: Layout
) -> None:
    """As `_given`, but the new value is written over the old one, which a sum later reads too.

    Where a backward follows, the handler is shown a copy: what it does with the value
    must not see it overwritten.
    """
    first = _first_given(args, kwargs)[2]
    wanted = torch.is_grad_enabled() and first.requires_grad
    form = _Form(layout, take=torch.clone, grad=lambda g: g) if wanted else _Form(layout)
    new = view.show(point, first, form)
    if new is not None:
        first.copy_(new)


def _first_given(args: tuple, kwargs: dict[str, Any]) -> tuple[int, str | None, Tensor]:
    for at, value in enumerate(args):
        if isinstance(value, Tensor):
            return at, None, value
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return -1, key, value
    raise UsageError(
        "a module was called without any tensor, so its input is no point",
        next_step="map the output of the one before it",
    )


# ---- routing


def _wrap_routing(
    model: nn.Module, site: Site, module: str, name: str, view: _Viewer, undo: ExitStack
) -> None:
    """Wrap the routing function while the module of the site runs."""
    holder, around = importlib.import_module(module), []

    def enter(*_: Any) -> None:
        original = getattr(holder, name)

        def tapped(*args: Any, **options: Any) -> tuple:
            return _routed(view, site.point, site.place, original(*args, **options))

        setattr(holder, name, tapped)
        around.append(original)

    def leave(*_: Any) -> None:
        if around:
            setattr(holder, name, around.pop())

    part = model.get_submodule(site.place.path)
    undo.callback(part.register_forward_pre_hook(enter, prepend=True).remove)
    undo.callback(part.register_forward_hook(leave, always_call=True).remove)


def _routed(view: _Viewer, point: Point, place: Routing, out: tuple) -> tuple:
    """Show the weights of all experts, and route by what replaces them: as many experts as before,
    those of the largest weights.
    """
    scores_RE, chosen_Rk, weights_Rk = (out[i] for i in (place.scores, place.chosen, place.weights))
    all_RE = weights_Rk.new_zeros(scores_RE.shape).scatter(1, chosen_Rk, weights_Rk)
    new_RE = view.show(point, all_RE, _Form("RF"))
    if new_RE is not None:
        chosen_Rk = new_RE.argsort(dim=-1, descending=True, stable=True)[:, : chosen_Rk.shape[1]]
    elif view.on_grad is None:
        return out
    # a gradient passes all experts' weights, where it is shown
    new_Rk = (all_RE if new_RE is None else new_RE).gather(1, chosen_Rk)
    return tuple(
        {place.weights: new_Rk, place.chosen: chosen_Rk}.get(i, x) for i, x in enumerate(out)
    )


# ---- attention, which is a function


def _wrap(
    model: nn.Module, where: NameMap, inside: list[Site], view: _Viewer, undo: ExitStack
) -> None:
    """Wrap the attention function; which layer calls it is known from
    the blocks that are running.
    """
    running: list[int] = []
    # of scores, whose figures are taken out before those of another point are
    room = room_for("figures")
    by_layer: dict[int, dict[str, Site]] = {}
    for site in inside:
        by_layer.setdefault(site.point.layer, {})[site.place.which] = site
    for layer in by_layer:
        block = model.get_submodule(where.blocks.format(layer))
        undo.callback(
            block.register_forward_pre_hook(
                lambda m, a, i=layer: running.append(i), prepend=True
            ).remove
        )
        undo.callback(
            block.register_forward_hook(lambda m, a, out: _left(running), always_call=True).remove
        )
    module, name = importlib.import_module(where.function.module), where.function.name
    original = getattr(module, name)

    def tapped(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not running:
            return original(q, k, v, *rest, **options)
        found = by_layer[running[-1]]
        q, k = _replaced(found, view, where.function, q, k)
        _figures(found, view, where.function, room, q, k, rest, options)
        mixed = original(q, k, v, *rest, **options)
        new = _show_inside(found, "mixed", view, mixed, where.function.n_heads)
        return mixed if new is None else new

    setattr(module, name, tapped)
    undo.callback(setattr, module, name, original)


def _left(running: list[int]) -> None:
    if running:
        running.pop()


def _replaced(
    found: dict[str, Site], view: _Viewer, function: Function, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys as they go on."""
    new_q = _show_inside(found, "q", view, q, function.n_heads)
    new_k = _show_inside(found, "k", view, k, function.n_kv_heads)
    return (q if new_q is None else new_q), (k if new_k is None else new_k)


def _show_inside(
    found: dict[str, Site], which: str, view: _Viewer, raw: Tensor, n_heads: int | None
) -> Tensor | None:
    """Show queries, keys or mixed values with `n_heads` heads,
    however the model has laid them out for the kernel.

    Keys that were already repeated for each query head are shown once, and a replacement is
    repeated again; of one token, transformers lays the heads of a group along the tokens, which is
    undone.
    """
    if which not in found:
        return None
    site, have = found[which], raw.shape[1]
    layout, n = site.place.layout, n_heads or have
    form = _Form(layout)
    if have > n:
        many = have // n
        grad = lambda g: g.unflatten(1, (n, many)).sum(2)  # noqa: E731
        grad_back = lambda new, g: (new / many).repeat_interleave(many, 1)  # noqa: E731
        form = _Form(
            layout,
            lambda x: x[:, ::many],
            grad,
            lambda new, x: new.repeat_interleave(many, 1),
            grad_back,
        )
    elif have < n:
        form = _Form(
            layout,
            lambda x: x.reshape(x.shape[0], n, -1, x.shape[-1]),
            back=lambda new, x: new.reshape(x.shape),
        )
    return view.show(site.point, raw, form)


def _figures(
    found: dict[str, Site],
    view: _Viewer,
    function: Function,
    room: Room,
    q: Tensor,
    k: Tensor,
    rest: tuple,
    options: dict,
) -> None:
    """Show what the scores of this call are like, from what is really passed."""
    if not {"scores", "entropy"} & found.keys():
        return
    n_heads = function.n_heads or q.shape[1]
    q = q if q.shape[1] >= n_heads else q.reshape(q.shape[0], n_heads, -1, q.shape[-1])
    call = scores.call_of(function.name, q, k, rest, options)
    with torch.no_grad():
        top_BTN, entropy_BTN = scores.figures(call, room)
    for which, figure in (("scores", top_BTN), ("entropy", entropy_BTN)):
        if which in found:
            _beside(view, found[which].point, figure, "BTF")

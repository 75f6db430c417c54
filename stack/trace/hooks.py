"""Context manager that hooks named points of a model; the handler may return a replacement value.

The model's own modules run, nothing is recomputed, and all hooks are removed on exit.
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
from stackproof.trace.scratch import BufferPool, buffer_pool

Handler = Callable[[Point, Tensor], Tensor | None]


@contextmanager
def hook_points(
    model: nn.Module,
    names: Iterable[str] | None,
    handler: Handler,
    *,
    where: NameMap | Mapping[str, str | Place] | None = None,
    on_grad: Handler | None = None,
    scratch: bool = False,
) -> Iterator[list[Point]]:
    """Call `handler(point, tensor)` for every value at the points `names` (None: all);
    yields the points.

    Tensors begin with (B, T), those of experts and routers with (1, R). A tensor of the same shape
    that the handler returns replaces the value; points with `flows=False` cannot be replaced.
    `on_grad` is called with gradients in the same layout and may return a replacement too. Calls
    come in the order in which modules run. With `scratch`, derived values share one buffer: only
    for handlers that keep no tensor. Raises UsageError for unknown names.
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


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[Any]:
    """Set an attribute of a Python module or an nn.Module until the block ends;
    yields the original.
    """
    original, own = getattr(holder, name), name in vars(holder)
    setattr(holder, name, value)
    try:
        yield original
    finally:
        setattr(holder, name, original) if own else delattr(holder, name)


@dataclass(frozen=True)
class _Form:
    """Layout of a raw tensor, and which part of it the handler gets.

    `take` selects the part and `back` puts a replacement in;
    `grad` and `grad_back` do so for gradients.
    """

    layout: Layout
    take: Callable[[Tensor], Tensor] = lambda x: x
    grad: Callable[[Tensor], Tensor] | None = None
    back: Callable[[Tensor, Tensor], Tensor] = lambda new, raw: new
    grad_back: Callable[[Tensor, Tensor], Tensor] | None = None


def _part(layout: Layout, part: tuple[int, int] | None) -> _Form:
    """Part `i` of `n` equal parts of the features; all features if `part` is None."""
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
    """Passes tensors to the handlers in the documented layout, and converts replacements back."""

    def __init__(self, handler: Handler, on_grad: Handler | None, scratch: bool = False):
        self.handler, self.on_grad, self.scratch = handler, on_grad, scratch

    def show(self, point: Point, raw: Tensor, form: _Form) -> Tensor | None:
        """The replacement for `raw`; None to keep it.
        Raises UsageError if the point cannot take it.
        """
        if self.on_grad is not None and raw.requires_grad and not point.derived:
            raw.register_hook(lambda grad: self._gradient(point, grad, form))
        seen = _shown(form.take(raw), form.layout)
        new = self.handler(point, seen)
        if new is None:
            return None
        if not point.flows:
            why = (
                "is computed beside the model"
                if point.derived
                else "is an extra output of its module"
            )
            raise UsageError(
                f"{point.name} {why}: the forward does not read it, so it cannot be replaced",
                next_step="replace the points it is computed from, or those after it",
            )
        if new.shape != seen.shape:
            raise UsageError(
                f"the replacement for {point.name} has the wrong shape",
                value=tuple(new.shape),
                allowed=tuple(seen.shape),
            )
        return form.back(_hidden(new.to(raw.dtype), form.layout), raw)

    def _gradient(self, point: Point, grad: Tensor, form: _Form) -> Tensor | None:
        """The replacement for a gradient; None to keep it."""
        new = self.on_grad(point, _shown((form.grad or form.take)(grad), form.layout))
        if new is None:
            return None
        return (form.grad_back or form.back)(_hidden(new.to(grad.dtype), form.layout), grad)


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
    """Inverse of `_shown`."""
    return x[0] if layout == "RF" else _shown(x, layout)


def _hook(model: nn.Module, site: Site, view: _Viewer) -> Any:
    """Register the hook of a place of a module; returns its handle."""
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
            # with gradient handlers no tensor is overwritten: autograd may have saved it
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
    held = buffer_pool("derived").take(x.numel(), x.dtype, x.device).view(x.shape)
    return torch.ops.aten.silu.out(x.detach(), out=held)


def _tensor(out: Any) -> Tensor:
    """The first tensor of a module's output."""
    return out if isinstance(out, Tensor) else next(o for o in out if isinstance(o, Tensor))


def _with_first(out: Any, view: _Viewer, point: Point, form: _Form) -> Any:
    # a model of transformers
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
    """Show the first tensor argument; returns the changed arguments if it is replaced."""
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
    """As `_given`, but a replacement is written into the tensor, because a later sum reads it too.

    If a backward follows, the handler gets a copy: autograd must not save a
    tensor that is overwritten.
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
        "a module was called without a tensor, so its input cannot be hooked",
        next_step="map the output of the module before it",
    )


# ---- routing


def _wrap_routing(
    model: nn.Module, site: Site, module: str, name: str, view: _Viewer, undo: ExitStack
) -> None:
    """Wrap the routing function while the module of the site runs."""
    holder, around = importlib.import_module(module), []

    def enter(*_: Any) -> None:
        original = getattr(holder, name)

        def hooked(*args: Any, **options: Any) -> tuple:
            return _routed(view, site.point, site.place, original(*args, **options))

        setattr(holder, name, hooked)
        around.append(original)

    def leave(*_: Any) -> None:
        if around:
            setattr(holder, name, around.pop())

    part = model.get_submodule(site.place.path)
    undo.callback(part.register_forward_pre_hook(enter, prepend=True).remove)
    undo.callback(part.register_forward_hook(leave, always_call=True).remove)


def _routed(view: _Viewer, point: Point, place: Routing, out: tuple) -> tuple:
    """Show the weights of all experts; a replacement routes to its k largest weights,
    k as before.
    """
    scores_RE, chosen_Rk, weights_Rk = (out[i] for i in (place.scores, place.chosen, place.weights))
    all_RE = weights_Rk.new_zeros(scores_RE.shape).scatter(1, chosen_Rk, weights_Rk)
    new_RE = view.show(point, all_RE, _Form("RF"))
    if new_RE is not None:
        chosen_Rk = new_RE.argsort(dim=-1, descending=True, stable=True)[:, : chosen_Rk.shape[1]]
    elif view.on_grad is None:
        return out
    # so that the gradient of all weights is seen
    new_Rk = (all_RE if new_RE is None else new_RE).gather(1, chosen_Rk)
    return tuple(
        {place.weights: new_Rk, place.chosen: chosen_Rk}.get(i, x) for i, x in enumerate(out)
    )


# ---- attention, a function and not a module


def _wrap(
    model: nn.Module, where: NameMap, inside: list[Site], view: _Viewer, undo: ExitStack
) -> None:
    """Wrap the attention function. Hooks on the blocks track the calling layer."""
    running: list[int] = []
    # statistics of scores are read before the next user of the pool writes
    pool = buffer_pool("figures")
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

    def hooked(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not running:
            return original(q, k, v, *rest, **options)
        found, n_heads = by_layer[running[-1]], where.function.n_heads
        q = _show_inside(found, "q", view, q, n_heads)
        k = _show_inside(found, "k", view, k, where.function.n_kv_heads)
        if {"scores", "entropy"} & found.keys():
            n = n_heads or q.shape[1]
            q_BNTH = q if q.shape[1] >= n else q.reshape(q.shape[0], n, -1, q.shape[-1])
            _figures(found, view, pool, scores.call_of(name, q_BNTH, k, rest, options))
        return _show_inside(found, "mixed", view, original(q, k, v, *rest, **options), n_heads)

    undo.enter_context(replaced(module, name, hooked))


def _left(running: list[int]) -> None:
    if running:
        running.pop()


def _show_inside(
    found: dict[str, Site], which: str, view: _Viewer, raw: Tensor, n_heads: int | None
) -> Tensor:
    """Show queries, keys or mixed values with `n_heads` heads, whatever layout the kernel is called
    with; returns them, replaced if the handler did.

    Keys already repeated for each query head are shown once, and a replacement is repeated again.
    For a single token transformers lays the heads of a group along the tokens: undone as well.
    """
    if which not in found:
        return raw
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
    new = view.show(site.point, raw, form)
    return raw if new is None else new


def _figures(found: dict[str, Site], view: _Viewer, pool: BufferPool, call: scores.Call) -> None:
    """Show statistics of the scores of a call of attention."""
    with torch.no_grad():
        top_BTN, entropy_BTN = scores.figures(call, pool)
    for which, figure in (("scores", top_BTN), ("entropy", entropy_BTN)):
        if which in found:
            _beside(view, found[which].point, figure, "BTF")

"""Named points of a forward in execution order, and the places in a model that they stand for.

B batch, T tokens, N heads, H head_dim, F features, R rows of tokens
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from stackproof.spec.errors import UsageError

# The operation that computes a point from the points before it:
# guilty if this is the first wrong point.
OPERATIONS = {
    "embedding": "token embedding, and learned positions where there are any",
    "attention_norm": "norm before attention",
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "q_norm": "norm of query heads",
    "k_norm": "norm of key heads",
    "q_rotated": "rotation of queries by position",
    "k_rotated": "rotation of keys by position",
    "scores": "scale, mask and product of queries and keys",
    "entropy": "mask and spread of attention",
    "attention_mixed": (
        "attention kernel: scale, mask, softmax, head expansion and mixing of values"
    ),
    "attention_out": "output projection of attention",
    "resid_mid": "residual sum after attention",
    "ffn_norm": "norm before the feed-forward",
    "router": "router projection",
    "routing": "choice and weights of experts",
    "ffn.gate": "gate projection",
    "ffn.up": "up projection",
    "ffn.silu": "silu of the gate",
    "ffn.act": "activation function",
    "ffn.swiglu": "gated product",
    "ffn.out": "down projection, or sum of experts",
    "resid_out": "residual sum after the feed-forward",
    "final_norm": "final norm",
    "logits": "output head",
}
# The points that read a point: their derivative is guilty if its gradient is the first wrong one.
# After a bar: the readers in models without the points before the bar.
READERS = {
    "embedding": "attention_norm resid_mid",
    "attention_norm": "q k v",
    "q": "q_norm | q_rotated | attention_mixed",
    "k": "k_norm | k_rotated | attention_mixed",
    "v": "attention_mixed",
    "q_norm": "q_rotated | attention_mixed",
    "k_norm": "k_rotated | attention_mixed",
    "q_rotated": "attention_mixed",
    "k_rotated": "attention_mixed",
    "attention_mixed": "attention_out",
    "attention_out": "resid_mid",
    "resid_mid": "ffn_norm resid_out",
    "ffn_norm": "router ffn.gate ffn.up | ffn.out",
    "router": "routing",
    "routing": "ffn.out",
    "ffn.gate": "ffn.swiglu",
    "ffn.up": "ffn.swiglu | ffn.act",
    "ffn.act": "ffn.out",
    "ffn.swiglu": "ffn.out",
    "ffn.out": "resid_out",
    "resid_out": "attention_norm resid_mid final_norm",
    "final_norm": "logits",
}
Layout = Literal["BTF", "BNTH", "BTNH", "RF"]


@dataclass(frozen=True)
class Point:
    """A named place of one model: `layers.3.ffn.swiglu` has layer 3 and slot `ffn.swiglu`.
    `order` counts from 0.

    A `derived` value is computed beside the model.
    `flows`: the rest of the forward reads this value.
    """

    name: str
    layer: int | None
    slot: str
    order: int
    derived: bool = False
    flows: bool = True

    @property
    def operation(self) -> str:
        """The operation that computes this point; the slot if it is not listed."""
        return OPERATIONS.get(self.kind, self.slot)

    @property
    def kind(self) -> str:
        """The slot; for an expert, that of a plain feed-forward."""
        return re.sub(r"^experts\.\d+\.", "ffn.", self.slot)


def read_by(point: Point, looked_at: Sequence[Point], every: Sequence[Point]) -> str:
    """The operations that read a point, in words. `every` are all points of the model in order.

    If a reader is unknown or not among `looked_at`: everything up to the next point that is.
    """
    seen = {p.name for p in looked_at}
    for group in READERS.get(point.kind, "").split("|"):
        if readers := _next(point, group.split(), every):
            if all(r.name in seen for r in readers):
                return ", ".join(dict.fromkeys(r.operation for r in readers))
            break
    later = [p for p in looked_at if p.order > point.order and not p.derived]
    return f"what lies between it and {later[0].name if later else 'the loss'}"


def _next(point: Point, kinds: Sequence[str], every: Sequence[Point]) -> list[Point]:
    """Points of these kinds in the layer of `point` (the next layer for `embedding` and
    `resid_out`), else outside of layers.
    """
    layer = {"embedding": 0, "resid_out": (point.layer or 0) + 1}.get(point.kind, point.layer)
    of_expert = point.slot.rpartition(".")[0] if point.slot.startswith("experts.") else None
    near = [
        p
        for p in every
        if p.kind in kinds
        and p.layer == layer
        and (of_expert is None or p.slot.startswith((of_expert, "ffn.out")))
    ]
    return near or [p for p in every if p.kind in kinds and p.layer is None]


@dataclass(frozen=True)
class Output:
    """The output of a module, or the first tensor of a tuple; `part` (i,
    n) is part i of n equal parts of its features.

    `flows` is false if the forward reads other outputs of the module and not this tensor.
    """

    path: str
    layout: Layout = "BTF"
    part: tuple[int, int] | None = None
    flows: bool = True


@dataclass(frozen=True)
class Input:
    """The first tensor argument of a module.
    `shared`: others read the same tensor, so it is replaced in place.
    """

    path: str
    layout: Layout = "BTF"
    shared: bool = False


@dataclass(frozen=True)
class Attention:
    """A tensor of the attention function: queries, keys, output, or a statistic of its scores."""

    which: Literal["q", "k", "mixed", "scores", "entropy"]
    layout: Layout = "BNTH"


@dataclass(frozen=True)
class Silu:
    """silu of the output of the module `path`, computed beside the model."""

    path: str
    layout: Layout = "BTF"


@dataclass(frozen=True)
class Routing:
    """The weight of each expert for each row of tokens, 0 if not chosen: (R, E).

    Read from the tuple that the module `path`, or a `function` (module, name) called inside it,
    returns. The numbers are the indices of all scores (R, E), chosen expert ids (R, k) and their
    weights (R, k).
    """

    path: str
    scores: int
    chosen: int
    weights: int
    function: tuple[str, str] | None = None


Place = Output | Input | Attention | Silu | Routing


@dataclass(frozen=True)
class Function:
    """The attention function of a model family, by module and name, and its head counts (None:
    as called).
    """

    module: str
    name: str
    n_heads: int | None = None
    n_kv_heads: int | None = None


@dataclass(frozen=True)
class NameMap:
    """The places of a model family by point, in execution order.
    `{}` stands for a layer, a second one for an expert.

    `blocks` is the path of the layers, required with `function`.
    `without` gives reasons for missing slots.
    """

    family: str
    places: Mapping[str, Place]
    blocks: str = ""
    function: Function | None = None
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One point and its place, numbers filled in."""

    point: Point
    place: Place


def sites(model: nn.Module, where: NameMap, names: Iterable[str] | None = None) -> list[Site]:
    """The points of a model in execution order: all, or those that `names` (exact,
    or with * and ?) select.

    Raises UsageError for a place that the model lacks and for an unknown name,
    with the nearest ones.
    """
    modules = [name for name, _ in model.named_modules()]
    patterns = list(where.places)
    found = [
        (_key(pattern, index, numbers, patterns), pattern, numbers, place, path)
        for index, (pattern, place) in enumerate(where.places.items())
        for numbers, path in _matches(place, where, modules)
    ]
    made = []
    for order, (_, pattern, numbers, place, path) in enumerate(sorted(found, key=lambda f: f[0])):
        layer, slot = None, pattern
        if numbers:
            layer = numbers[0]
            slot = re.sub(r"^[^{}]*\{\}\.", "", pattern, count=1).format(*numbers[1:])
        derived = isinstance(place, Silu) or (
            isinstance(place, Attention) and place.which in ("scores", "entropy")
        )
        placed = place if isinstance(place, Attention) else replace(place, path=path)
        flows = not derived and getattr(place, "flows", True)
        made.append(
            Site(Point(pattern.format(*numbers), layer, slot, order, derived, flows), placed)
        )
    return made if names is None else select(made, names, where)


def _matches(
    place: Place, where: NameMap, modules: Sequence[str]
) -> list[tuple[tuple[int, ...], str]]:
    """Numbers and path of every module that a place matches."""
    path = where.blocks if isinstance(place, Attention) else place.path
    pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
    found = [
        (tuple(map(int, m.groups())), name) for name in modules if (m := pattern.fullmatch(name))
    ]
    if not found:
        near = difflib.get_close_matches(path, modules, n=3, cutoff=0)
        raise UsageError(
            f"the name map of {where.family} has the path {path}, and the model has no such module",
            allowed=f"nearest: {', '.join(near)}",
            next_step=(
                "give a name map of this model in Python: where={'layers.{}.ffn.out': "
                "'path.of.layers.{}.mlp'}"
            ),
        )
    return found


def _key(pattern: str, index: int, numbers: tuple[int, ...], patterns: Sequence[str]) -> tuple:
    """Sort key: before all layers, layer by layer in the order of the map, expert by expert,
    after all layers.
    """
    layered = [i for i, p in enumerate(patterns) if "{}" in p]
    if not numbers:
        return (0 if not layered or index < layered[0] else 2, 0, index)
    first = index
    if len(numbers) > 1:
        first = next((i for i in range(index, -1, -1) if patterns[i].count("{}") < 2), -1) + 1
    return (1, numbers[0], first, *numbers[1:], index)


def select(found: Sequence[Site], names: Iterable[str], where: NameMap) -> list[Site]:
    """The sites with these names, in execution order. Raises UsageError for an unknown name."""
    known = [s.point.name for s in found]
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        matching = fnmatch.filter(known, name)
        if not matching:
            slot = re.sub(r"^.*?\.\d+\.", "", name)
            raise UsageError(
                f"{where.family} has no point {name}"
                + (f": {where.without[slot]}" if slot in where.without else ""),
                allowed=(
                    f"nearest: {', '.join(difflib.get_close_matches(name, known, n=3, cutoff=0))}"
                ),
                next_step="stack trace MODEL lists all points; * stands for any part of a name",
            )
        chosen.update(matching)
    return [s for s in found if s.point.name in chosen]

"""Where in a forward pass tracing looks: points, in execution order,
and the places of a model that they stand for.

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

# What makes the value at a point out of the points before it:
# what is wrong when this point is the first that is.
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
# What reads the value at a point next: whose derivative is wrong when the gradient there is the
# first that is. After a bar what reads it in models that have none of the points before the bar.
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
    `order` counts from 0 as the model runs.

    A `derived` value is worked out beside the model.
    `flows` says whether the rest of the forward reads what is seen here.
    """

    name: str
    layer: int | None
    slot: str
    order: int
    derived: bool = False
    flows: bool = True

    @property
    def operation(self) -> str:
        """What makes the value here; the slot itself where nobody has said it."""
        return OPERATIONS.get(self.kind, self.slot)

    @property
    def kind(self) -> str:
        """The slot, of an expert that of a plain feed-forward."""
        return re.sub(r"^experts\.\d+\.", "ffn.", self.slot)


def read_by(point: Point, looked_at: Sequence[Point], every: Sequence[Point]) -> str:
    """What reads the value at a point, of all points of a model in order:
    the operations that make the points after it.

    Where some of these are not looked at, or nobody has said them,
    all that lies between it and the next point that is.
    """
    seen = {p.name for p in looked_at}
    for group in READERS.get(point.kind, "").split("|"):
        if readers := _next(point, group.split(), every):
            if all(r.name in seen for r in readers):
                return ", ".join(dict.fromkeys(r.operation for r in readers))
            break
    later = [p for p in looked_at if p.order > point.order and not p.derived]
    return (
        f"what lies between it and {later[0].name}"
        if later
        else "what lies between it and the loss"
    )


def _next(point: Point, kinds: Sequence[str], every: Sequence[Point]) -> list[Point]:
    """The points of these kinds in the layer of a point; after a whole layer, or before all, in the
    next one; else outside of layers.
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
    """What a module returns, or the first tensor of a tuple; `part` (i,
    n) is the i-th of n equal parts of its features.

    `flows` is false where the rest of the forward does not read this tensor but others that the
    module returns beside it.
    """

    path: str
    layout: Layout = "BTF"
    part: tuple[int, int] | None = None
    flows: bool = True


@dataclass(frozen=True)
class Input:
    """The first tensor that a module is given.
    `shared` says that others read the same tensor, so that it is replaced where it lies.
    """

    path: str
    layout: Layout = "BTF"
    shared: bool = False


@dataclass(frozen=True)
class Attention:
    """A tensor of the attention function: what goes in as queries or keys, what comes out,
    or a figure of its scores.
    """

    which: Literal["q", "k", "mixed", "scores", "entropy"]
    layout: Layout = "BNTH"


@dataclass(frozen=True)
class Silu:
    """silu of what the module `path` returns, worked out beside the model."""

    path: str
    layout: Layout = "BTF"


@dataclass(frozen=True)
class Routing:
    """The weight of each expert for each row of tokens, 0 where it was not chosen: (R, E).

    Read from the tuple that the module `path` returns, or `function` (module and name) when it is
    called inside `path`; the numbers say where in it the scores of all experts (R, E), the ids of
    the chosen ones (R, k) and their weights (R, k) are.
    """

    path: str
    scores: int
    chosen: int
    weights: int
    function: tuple[str, str] | None = None


Place = Output | Input | Attention | Silu | Routing


@dataclass(frozen=True)
class Function:
    """The attention function a family of models calls, by module and name, with the heads it is
    meant to have (None: those it gets).
    """

    module: str
    name: str
    n_heads: int | None = None
    n_kv_heads: int | None = None


@dataclass(frozen=True)
class NameMap:
    """The places of a family of models by point, in execution order.
    `{}` stands for a layer, a second one for an expert.

    `blocks` are the modules of the layers, needed where `function` is.
    `without` says of slots why this model does not have them.
    """

    family: str
    places: Mapping[str, Place]
    blocks: str = ""
    function: Function | None = None
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One point and its place, with all numbers filled in."""

    point: Point
    place: Place


def sites(model: nn.Module, where: NameMap, names: Iterable[str] | None = None) -> list[Site]:
    """The points of a model in execution order: all, or those that `names` (exact,
    or with * and ?) select.

    Raises UsageError for a place that the model lacks and for a name that no point has,
    with what comes nearest.
    """
    modules = [name for name, _ in model.named_modules()]
    found = []
    for index, (pattern, place) in enumerate(where.places.items()):
        for numbers, path in _matches(place, where, modules):
            found.append(
                (_key(pattern, index, numbers, list(where.places)), pattern, numbers, place, path)
            )
    found.sort(key=lambda entry: entry[0])
    made = []
    for order, (_, pattern, numbers, place, path) in enumerate(found):
        layer = numbers[0] if numbers else None
        slot = (
            re.sub(r"^[^{}]*\{\}\.", "", pattern, count=1).format(*numbers[1:])
            if numbers
            else pattern
        )
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
    """Numbers and path of every module that a place stands for."""
    path = where.blocks if isinstance(place, Attention) else place.path
    pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
    found = [
        (tuple(map(int, m.groups())), name) for name in modules if (m := pattern.fullmatch(name))
    ]
    if not found:
        near = difflib.get_close_matches(path, modules, n=3, cutoff=0)
        raise UsageError(
            f"the map of names for {where.family} says {path}, and the model has no such module",
            allowed=f"nearest: {', '.join(near)}",
            next_step=(
                "give a map of this model's own names, in Python: where={'layers.{}.ffn.out': "
                "'path.of.layers.{}.mlp'}"
            ),
        )
    return found


def _key(pattern: str, index: int, numbers: tuple[int, ...], patterns: Sequence[str]) -> tuple:
    """Before all layers, layer by layer, after all layers; inside a layer as the map says,
    expert by expert.
    """
    layered = [i for i, p in enumerate(patterns) if "{}" in p]
    if not numbers:
        return (0 if not layered or index < layered[0] else 2, 0, index)
    first = (
        next((i for i in range(index, -1, -1) if patterns[i].count("{}") < 2), -1) + 1
        if len(numbers) > 1
        else index
    )
    return (1, numbers[0], first, *numbers[1:], index)


def select(found: Sequence[Site], names: Iterable[str], where: NameMap) -> list[Site]:
    """Those sites whose names are asked for, in execution order."""
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

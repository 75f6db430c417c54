"""Weights and values that a resolved `model` section declares, by the architecture table."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from stackproof.spec.architecture import (
    AFTER_ATTENTION,
    AFTER_FEED_FORWARD,
    EMBEDDING,
    FIRST_VARIANTS,
    HEAD,
    TABLE,
    Dim,
    Mixture,
    Model,
    Value,
    Weight,
)
from stackproof.spec.errors import IntegrityError

TABLE_FILE = "spec/architecture.py"


@dataclass(frozen=True)
class Tensor:
    """A weight with its full name and shape; `met` is the share of a block's tokens that it
    processes.
    """

    name: str
    shape: tuple[int, ...]
    weight: Weight
    met: Fraction = Fraction(1)

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


def section(model: Model, key: str) -> Mapping[str, Any]:
    """The declared section at a dotted key; the first variant if an old record has no such
    section.
    """
    declared: Mapping[str, Any] = FIRST_VARIANTS | dict(model)
    for name in key.split("."):
        declared = declared[name]
    return declared


def part(model: Model, key: str) -> Any:
    """The table's entry for the declared variant. Raises IntegrityError if the table has no
    entry.
    """
    kind = section(model, key)["kind"]
    if (found := TABLE[key].get(kind)) is None:
        raise IntegrityError(
            f"{TABLE_FILE} has no entry for model.{key}.kind = {kind}",
            allowed=", ".join(TABLE[key]),
            next_step=f"add the entry {kind} to {TABLE_FILE}, or correct its name there",
        )
    return found


def sizes(model: Model, vocab_size: int = 0) -> dict[str, int]:
    """The value of each symbol: the whole numbers of the section, and those that it implies."""
    experts = section(model, "ffn").get("n_experts", 1)
    numbers = {key: value for key, value in model.items() if type(value) is int}
    return numbers | {"vocab_size": vocab_size, "n_experts": experts}


def shape_of(dims: tuple[Dim, ...], numbers: Mapping[str, int], entry: str) -> tuple[int, ...]:
    """The sizes of an entry of the table. Raises IntegrityError if one is not a Dim of known
    symbols.
    """
    try:
        return tuple(dim.of(numbers) for dim in dims)
    except (AttributeError, KeyError, TypeError) as e:
        raise IntegrityError(
            f"{TABLE_FILE}: {entry} has a shape that is not made of known symbols",
            value=dims,
            allowed=f"a tuple of Dim, each a tuple of {', '.join(sorted(numbers))}",
            next_step=f"correct the shape in {TABLE_FILE}",
        ) from e


def width_of(value: Value, numbers: Mapping[str, int]) -> int:
    """Features of a value per token."""
    return shape_of((value.width,), numbers, f"the value {value.slot or value.module}")[0]


def tensors(model: Model, vocab_size: int) -> list[Tensor]:
    """All weights of a checkpoint of the model in order, buffers included.

    Raises IntegrityError for a variant without an entry, or an entry of unknown symbols.
    """
    shape = (vocab_size, model["d_model"])
    found = [Tensor("embed.weight", shape, EMBEDDING), *_weights(model, "positions", "positions.")]
    for layer in range(model["n_layers"]):
        found += block_tensors(model, layer)
    found += _weights(model, "norm", "final_norm.")
    return found if model["tied_head"] else [*found, Tensor("head.weight", shape, HEAD)]


def block_tensors(model: Model, layer: int) -> list[Tensor]:
    """The weights and buffers of one block, `layer` counted from 0."""
    at = f"layers.{layer}."
    found = [
        *_weights(model, "norm", at + "attention_norm."),
        *_weights(model, "attention", at + "attention."),
        *_weights(model, "norm", at + "ffn_norm."),
        *_weights(model, "ffn", at + "ffn."),
    ]
    if isinstance(part(model, "ffn"), Mixture):
        found += _weights(model, "ffn.balance", at + "ffn.")
        n_experts, top_k = (section(model, "ffn")[key] for key in ("n_experts", "top_k"))
        for e in range(n_experts):
            own = f"{at}ffn.experts.{e}."
            found += _weights(model, "ffn.expert", own, Fraction(top_k, n_experts))
    if gated(model, layer):
        found += _weights(model, "depth", at + "depth.")
        found += _weights(model, "depth.gate", at + "depth.")
    return found


def _weights(model: Model, key: str, prefix: str, met: Fraction = Fraction(1)) -> Iterator[Tensor]:
    declared, numbers = section(model, key), sizes(model)
    for weight in part(model, key).weights:
        if weight.when is None or weight.when.holds(declared):
            entry = f"the weight {weight.name} of model.{key}.kind = {declared['kind']}"
            yield Tensor(prefix + weight.name, shape_of(weight.shape, numbers, entry), weight, met)


def gated(model: Model, layer: int) -> bool:
    """Whether a gate decides which tokens block `layer` changes."""
    return part(model, "depth").weights != () and (layer + 1) % model["depth"]["every"] == 0


def share_of_tokens(model: Model, layer: int) -> float:
    """Share of the tokens (0-1) that a block reads."""
    if gated(model, layer) and (key := part(model, "depth.gate").share_key):
        return section(model, "depth.gate")[key]
    return 1.0


def block_values(model: Model, layer: int) -> list[Value]:
    """The values of the forward of a block, in execution order.

    Slots and modules are relative to the block, with `{}` for the number of an expert. Values of an
    expert are kept once per expert that receives the token.
    """

    def of(key: str, slots: str = "", modules: str = "") -> Iterator[Value]:
        return _values(part(model, key).values, section(model, key), slots, modules)

    found = [
        *of("norm", "attention_norm", "attention_norm"),
        *of("attention", "", "attention."),
        *of("positions"),
        *_values(part(model, "attention").kernel, section(model, "attention")),
        *_values(AFTER_ATTENTION, model),
        *of("norm", "ffn_norm", "ffn_norm"),
    ]
    if isinstance(entry := part(model, "ffn"), Mixture):
        found += [*of("ffn", "", "ffn."), *of("ffn.balance", "", "ffn.")]
        own, top_k = section(model, "ffn.expert"), section(model, "ffn")["top_k"]
        inside = part(model, "ffn.expert").values + entry.expert_values
        for value in _values(inside, own, "experts.{}.", "ffn.experts.{}."):
            found.append(replace(value, kept=top_k * value.kept, layout="RF"))
    else:
        found += of("ffn", "ffn.", "ffn.")
    found += _values(AFTER_FEED_FORWARD, model)
    return [*found, *of("depth"), *of("depth.gate")] if gated(model, layer) else found


def _values(
    values: tuple[Value, ...], declared: Mapping[str, Any], slots: str = "", modules: str = ""
) -> Iterator[Value]:
    """The values with a true condition, slots and modules prefixed."""
    for value in values:
        if value.when is None or value.when.holds(declared):
            module = (modules + value.module).removesuffix(".")
            yield replace(value, slot=slots + value.slot, module=module)

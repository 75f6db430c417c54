"""Translation of a model to another library's format: its configuration keys and its tensors.

An architecture of theirs supports a configuration if its written form reads back as the same
configuration. So keys without a counterpart are found by reading back, not by a list.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor

from stackproof.config import AuxiliaryLoss, MixtureOfExperts, ModelConfig
from stackproof.spec.errors import ConfigError

WRAPPERS = frozenset(("_orig_mod", "module"))
_MISSING = object()


class Keys:
    """A configuration of theirs. Every key must be read."""

    def __init__(self, document: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.left, self.defaults = dict(document), defaults

    def take(self, key: str) -> Any:
        """The value of a key, or the reader's default. Raises ConfigError if there is neither."""
        value = self.left.pop(key, self.defaults.get(key, _MISSING))
        if value is _MISSING:
            raise ConfigError(
                f"config.json has no {key}", next_step="take the folder as its publisher wrote it"
            )
        return value

    def number(self, key: str) -> Any:
        """A number from 0, a bool or None. Raises ConfigError for anything else."""
        value = self.take(key)
        if not isinstance(value, int | float | None) or (value is not None and value < 0):
            raise ConfigError(
                f"{key} in config.json is not a size",
                value=repr(value)[:80],
                allowed="a number from 0",
            )
        return value

    def demand(self, key: str, allowed: Sequence[Any]) -> Any:
        """A value for which the computation equals ours. Raises ConfigError for another."""
        value = self.take(key)
        if value not in allowed:
            raise unsupported(key, value, f"{key} = {' or '.join(map(repr, allowed))}")
        return value

    def finish(
        self, neutral: frozenset[str] = frozenset(), aside: frozenset[str] = frozenset()
    ) -> list[str]:
        """The keys of `aside` that were left, as text.

        Raises ConfigError for a key that was not read and is not `neutral`.
        """
        if strange := sorted(self.left.keys() - neutral - aside):
            raise unsupported(
                strange[0], self.left[strange[0]], "keys whose effect on the computation is known"
            )
        return [f"{k} = {self.left[k]}" for k in sorted(aside & self.left.keys()) if self.left[k]]


def unsupported(key: str, value: Any, allowed: str) -> ConfigError:
    """The error for a value of theirs that our model does not support."""
    return ConfigError(
        f"{key} in config.json has no counterpart here",
        value=repr(value)[:120],
        allowed=allowed,
        next_step="choose a model without it",
    )


@dataclass(frozen=True)
class Row:
    """One tensor of theirs: ours are its row blocks, in order; it may be transposed to (in,
    out).
    """

    ours: tuple[str, ...]
    theirs: str
    transposed: bool


class Kind:
    """One architecture: its keys for our sizes, the values it needs, its modules for ours.

    `{}` stands for a number. `fixed` are keys with the values for which the computation equals
    ours; they are written and read, `absent` only read. `defaults` are those of their reader.
    `aside` are keys of training without a counterpart. `running` are modules with another name in
    memory than in files.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    base: ClassVar[str]  # a prefix that tensors of a model without its head may lack
    sizes: ClassVar[dict[str, str]]
    defaults: ClassVar[dict[str, Any]]
    fixed: ClassVar[dict[str, tuple]]
    absent: ClassVar[dict[str, tuple]]
    neutral: ClassVar[frozenset[str]]
    aside: ClassVar[frozenset[str]]
    modules: ClassVar[dict[str, str]]
    transposed: ClassVar[frozenset[str]] = frozenset()
    running: ClassVar[Mapping[str, str]] = {}

    def parts(self, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
        """Our `model` section apart from sizes, from their keys."""
        raise NotImplementedError

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        """Their keys for our `model` section apart from sizes, as far as they exist."""
        raise NotImplementedError

    def read(self, document: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
        """Our configuration, and keys of training that were ignored. Raises ConfigError."""
        needed = self.fixed | self.absent
        keys = Keys(document, self.defaults | {k: v[0] for k, v in needed.items()})
        for key, allowed in needed.items():
            keys.demand(key, allowed)
        sizes = {ours: keys.number(theirs) for ours, theirs in self.sizes.items()}
        if not sizes["n_heads"]:
            raise ConfigError("config.json describes no model: it has no heads")
        try:
            sizes |= self.parts(keys, sizes)
        except (TypeError, ValueError, AttributeError) as e:
            raise ConfigError(
                f"config.json describes no model: a value is missing or of another type: {e}",
                next_step="take the folder as its publisher wrote it",
            ) from e
        aside = keys.finish(self.neutral, self.aside)
        try:
            return ModelConfig.model_validate_json(json.dumps(sizes), strict=True), aside
        except ValidationError as e:
            error = e.errors()[0]
            what = ".".join(("model", *map(str, error["loc"]))) + ": " if error["loc"] else ""
            raise ConfigError(
                "config.json describes no model: "
                f"{what}{error['msg'].removeprefix('Value error, ')}",
                value=str(error["input"])[:80],
            ) from e

    def write(self, cfg: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """Their configuration of a model, without token ids."""
        sizes = {theirs: getattr(cfg, ours) for ours, theirs in self.sizes.items()}
        fixed = {key: allowed[0] for key, allowed in self.fixed.items()}
        names = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
        }
        return names | sizes | fixed | self.config_keys(cfg)

    def lost_keys(self, cfg: ModelConfig) -> list[str]:
        """Keys of our configuration that would be lost, with their values; empty if supported."""
        try:
            read_back, _ = self.read(self.write(cfg, 2))
        except ConfigError as e:
            return [e.what.removeprefix("config.json describes no model: ")]
        return _differences(
            for_inference(cfg).model_dump(), for_inference(read_back).model_dump(), "model."
        )

    def rows(self, names: Iterable[str]) -> list[Row]:
        """Their tensors made of ours, by name. Raises ConfigError for a tensor without a place."""
        order = {module: place for place, module in enumerate(self.modules)}
        places: dict[str, list[tuple[int, str]]] = {}
        for name in names:
            module, _, suffix = pattern(name).rpartition(".")
            if module not in order:
                raise ConfigError(
                    f"{self.architecture} has no place for {name}", allowed=", ".join(self.modules)
                )
            theirs = f"{self.modules[module].format(*numbers(name))}.{suffix}"
            places.setdefault(theirs, []).append((order[module], name))
        return [
            Row(tuple(n for _, n in sorted(ours)), theirs, self._lies_transposed(theirs))
            for theirs, ours in places.items()
        ]

    def _lies_transposed(self, theirs: str) -> bool:
        return (
            theirs.endswith(".weight")
            and pattern(theirs).removesuffix(".weight") in self.transposed
        )


def for_inference(cfg: ModelConfig) -> ModelConfig:
    """A configuration without the keys that apply in training only."""
    update: dict[str, Any] = {"dropout": 0.0}
    if isinstance(cfg.ffn, MixtureOfExperts):
        balance = AuxiliaryLoss() if isinstance(cfg.ffn.balance, AuxiliaryLoss) else cfg.ffn.balance
        update["ffn"] = cfg.ffn.model_copy(update={"capacity_factor": None, "balance": balance})
    return cfg.model_copy(update=update)


def plain_name(name: str) -> str:
    """A tensor's name without the parts that compiling or wrapping inserts."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def to_theirs(row: Row, tensors: Mapping[str, Tensor]) -> Tensor:
    """Their tensor of a row."""
    joined = (
        torch.cat([tensors[n] for n in row.ours]) if len(row.ours) > 1 else tensors[row.ours[0]]
    )
    return joined.T.contiguous() if row.transposed else joined


def to_ours(row: Row, tensor: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Our tensors of a row, views of theirs. `shapes` are ours by name."""
    joined = tensor.T if row.transposed else tensor
    return dict(zip(row.ours, joined.split([shapes[n][0] for n in row.ours])))


def their_shape(row: Row, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The shape their tensor must have."""
    joined = (sum(shapes[n][0] for n in row.ours), *shapes[row.ours[0]][1:])
    return joined[::-1] if row.transposed else joined


def pattern(name: str) -> str:
    """A dotted name with `{}` for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


def numbers(name: str) -> list[str]:
    """The numbers in a dotted name."""
    return re.findall(r"(?<=\.)\d+(?=\.)", name)


def _differences(ours: Any, theirs: Any, at: str) -> list[str]:
    """Dotted keys, with our value, in which two dumped configurations differ.

    Of a part of another kind, only the kind.
    """
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return [] if ours == theirs else [f"{at.removesuffix('.')} = {ours}"]
    if ours.get("kind") != theirs.get("kind"):
        return [f"{at}kind = {ours.get('kind')}"]
    return [d for key in ours for d in _differences(ours[key], theirs.get(key), f"{at}{key}.")]

"""Configuration keys that were renamed, and the translation of recorded configurations."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import Field

from stackproof.spec import ROOT
from stackproof.spec.gates import Frozen
from stackproof.spec.records import Override
from stackproof.spec.tables import read_tables

KEY = r"^[a-z_0-9]+(\.[a-z_0-9]+)+$"


class RenamedKey(Frozen):
    """A dotted key, its name since a version of the spec, and the values that changed with it."""

    since: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    old: str = Field(pattern=KEY)
    new: str = Field(pattern=KEY)
    values: dict[str, Any] = {}


@cache
def renamed_keys() -> tuple[RenamedKey, ...]:
    """All renamed keys, oldest first. Raises IntegrityError naming a broken entry."""
    return tuple(read_tables(ROOT / "spec" / "renamed_keys.toml", "renamed", RenamedKey))


def current_key(key: str) -> str:
    """Today's name of a dotted key."""
    for renamed in renamed_keys():
        key = renamed.new if key == renamed.old else key
    return key


def current_override(override: Override) -> Override:
    """A recorded change of a key, under today's name and value."""
    for renamed in renamed_keys():
        if override.key == renamed.old:
            value = renamed.values.get(str(override.value), override.value)
            override = override.model_copy(update={"key": renamed.new, "value": value})
    return override


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration under today's keys. The given tree stays as it is."""
    tree = dict(config)
    for renamed in renamed_keys():
        *path, old = renamed.old.split(".")
        table = _table(tree, path)
        if table is None or old not in table:
            continue
        value = table.pop(old)
        target, new = renamed.new.rsplit(".", 1)
        _table(tree, target.split("."))[new] = renamed.values.get(str(value), value)
    return tree


def _table(tree: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    """The table at a path, copied on the way down; None where there is no table."""
    for part in path:
        if not isinstance(tree.get(part), Mapping):
            return None
        tree[part] = dict(tree[part])
        tree = tree[part]
    return tree

"""Strict reading of files into pydantic models. Errors name the file, the entry and the field."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import MAX_TEXT_BYTES, read_text

MAX_KEY_PARTS = 100
PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
# Possessive, and from the beginning of a part on: the time grows with the text, not its square.
LONG_KEY = re.compile(rf"(?<![\w-])(?:{PART}[ \t]*+\.[ \t]*+){{{MAX_KEY_PARTS}}}")

Kind = TypeVar("Kind", bound=BaseModel)


def validated(kind: type[Kind], value: Any, *, origin: str, next_step: str = "") -> Kind:
    """The value as a model. Raises IntegrityError naming `origin` and the first invalid field."""
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{origin}: field {field}: {first['msg']}" if field else f"{origin}: {first['msg']}",
            value=str(first.get("input"))[:120],
            next_step=next_step,
        ) from e


def parse_toml(text: str) -> dict[str, Any]:
    """The tree of a TOML text. Raises ValueError for invalid text, impossible dates, deep nesting,
    and keys of more than MAX_KEY_PARTS parts, for which the parser needs memory by their square.
    """
    if LONG_KEY.search(text):
        raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts")
    try:
        tree = tomllib.loads(text)
        json.dumps(tree, default=str)  # tables in tables, for which tomllib has no limit
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    return tree


def read_toml(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """A TOML file. Raises IntegrityError if it cannot be read or parsed."""
    try:
        return parse_toml(read_text(path, max_bytes))
    except (OSError, ValueError) as e:
        raise IntegrityError(f"cannot read {path}: {e}") from e


def tables(
    document: Mapping[str, Any], key: str, kind: type[Kind], *, origin: str, **defaults: Any
) -> list[Kind]:
    """All tables `[[key]]` of a document, in file order."""
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise IntegrityError(f"{origin}: {key} must be tables", allowed=f"[[{key}]]")
    return [
        validated(
            kind,
            defaults | table,
            origin=f"{origin}: {key} {table.get('id', table.get('name', '?'))}",
        )
        for table in found
    ]


def read_tables(path: Path, key: str, kind: type[Kind]) -> list[Kind]:
    """All tables `[[key]]` of a TOML file, in file order; empty if the file is missing."""
    return tables(read_toml(path), key, kind, origin=str(path)) if path.is_file() else []

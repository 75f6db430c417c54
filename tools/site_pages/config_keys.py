"""The configuration page, from the JSON schema of `RunConfig`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stackproof.config import RunConfig
from tools.site_pages.render import Page, page

Schema = dict[str, Any]
BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minLength": "length ≥",
    "minItems": "length ≥",
}
TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "None"}


@dataclass(frozen=True)
class Key:
    """A configuration key with its type, bounds, default as JSON, and meaning."""

    name: str
    type: str
    allowed: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Section:
    """A table of the configuration; `kind` is set if it is one of several variants."""

    prefix: str
    kind: str
    meaning: str
    keys: list[Key]


def config_page() -> Page:
    """Every key with type, range, default and meaning, one table per section or variant."""
    schema = RunConfig.model_json_schema()
    return page("config.md", "Configuration", "config.md.j2", sections=sections(schema))


def sections(schema: Schema) -> list[Section]:
    """The sections of a configuration's schema, each before those below it."""
    return list(_sections(schema, schema["$defs"], "", ""))


def _sections(table: Schema, named: Schema, prefix: str, kind: str) -> Iterator[Section]:
    fields = {f: (s, _tables(s, named)) for f, s in table.get("properties", {}).items()}
    keys = [
        _key(f"{prefix}{field}", schema)
        for field, (schema, below) in fields.items()
        if ("items" in schema or not below) and not (kind and field == "kind")
    ]
    yield Section(prefix.removesuffix("."), kind, table.get("description", ""), keys)
    for field, (_, below) in fields.items():
        for child in below:
            variant = child["properties"]["kind"]["const"] if len(below) > 1 else ""
            yield from _sections(child, named, f"{prefix}{field}.", variant)


def _tables(schema: Schema, named: Schema) -> list[Schema]:
    """The tables that a field holds, itself or as items; several for a union."""
    choices = schema.get("items", schema)
    choices = choices.get("oneOf") or choices.get("anyOf") or choices.get("allOf") or [choices]
    tables = (named.get(c.get("$ref", "").removeprefix("#/$defs/"), {}) for c in choices)
    return [t for t in tables if t.get("type") == "object"]


def _key(name: str, schema: Schema) -> Key:
    limits = {k: v for part in (*schema.get("anyOf", ()), schema) for k, v in part.items()}
    bounds = [f"{sign} {_number(limits[b])}" for b, sign in BOUNDS.items() if b in limits]
    default = schema.get("default")
    if "default" in schema:
        default = "none" if default is None else json.dumps(default, ensure_ascii=False)
    return Key(name, _type(schema), ", ".join(bounds), default, schema.get("description", ""))


def _number(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2^{power}" if bound == 2**power and power > 16 else f"{bound:g}"


def _type(schema: Schema) -> str:
    """A field's type in the terms of Python, or the values of an enumeration."""
    match schema:
        case {"enum": values}:
            return " | ".join(map(str, values))
        case {"const": value}:
            return str(value)
        case {"anyOf": choices}:
            return " | ".join(map(_type, choices))
        case {"type": "array", "items": items}:
            return f"list[{_type(items)}]"
        case {"type": "object", "additionalProperties": values}:
            return f"dict[str, {_type(values)}]"
        case {"$ref": _} | {"oneOf": _}:
            return "table"
    return TYPES[schema["type"]]

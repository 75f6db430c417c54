"""Canonical JSON (RFC 8785), strict parsing, and sha256."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rfc8785
from pydantic_core import from_json, to_json

from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import MAX_TEXT_BYTES, open_regular, read_bytes

MAX_SAFE_INTEGER = 2**53 - 1
# The form of what is not finite, and of whole numbers beyond 2^53.
AS_TEXT = r"^(NaN|-?Infinity|-?[0-9]{1,40})$"
# A million short keys take 1.6 GB when they are parsed, 500 times their length.
MAX_JSON_VALUES = 500_000
# 32 MiB of text have room for a manifest of 170,000 shards, of seven values each.
MAX_MANIFEST_VALUES = 1_200_000
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def encodable(text: str) -> str:
    """Text that has a UTF-8 form: lone surrogates, as of file names that are not UTF-8, become
    escapes.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def to_jsonable(value: Any) -> Any:
    """Convert a value to types of canonical JSON. Non-finite floats and integers beyond 2^53 become
    strings. Raises TypeError for a type without a JSON form.
    """
    match value:
        case bool() | None | str():
            return value
        case int():
            return value if abs(value) <= MAX_SAFE_INTEGER else str(value)
        case float():
            if math.isnan(value):
                return "NaN"
            # without an exponent it would be read back as an unsafe integer
            if MAX_SAFE_INTEGER < abs(value) < 1e21:
                return str(int(value))
            return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
        case dict():
            return {str(k): to_jsonable(v) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
            return [to_jsonable(v) for v in items]
        case Path():
            return value.as_posix()
    raise TypeError(f"cannot put a {type(value).__name__} into canonical JSON: {value!r}")


def canonical_json(value: Any) -> bytes:
    """RFC 8785 bytes of `value` after `to_jsonable`. Equal values give equal bytes."""
    return rfc8785.dumps(to_jsonable(value))


def canonical_lines(rows: Iterable[Any]) -> bytes:
    """JSON lines, each in canonical form."""
    return b"".join(canonical_json(row) + b"\n" for row in rows)


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a value."""
    return sha256_bytes(canonical_json(value))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a regular file, read in blocks of 1 MiB.
    Raises OSError if it cannot be read, FileRefused for a file of another kind.
    """
    digest = hashlib.sha256()
    with open_regular(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in a nested mapping that is not a mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_lines(data: bytes, *, origin: str) -> list[Any]:
    """The values of JSON lines, strictly parsed; blank lines are skipped.
    Raises IntegrityError naming `origin` and the line.
    """
    rows = [
        (number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()
    ]
    no_limit_exceeded = len(data) <= MAX_JSON_VALUES
    if no_limit_exceeded and (known := _without_escapes([line for _, line in rows])) is not None:
        return known
    return [parse_strict(line, origin=f"{origin}:{number}") for number, line in rows]


def is_canonical_line(data: bytes) -> bool:
    """Whether bytes without a newline are one JSON object in canonical form."""
    try:
        value = parse_strict(data, origin="the last line")
    except IntegrityError:
        return False
    return isinstance(value, dict) and canonical_json(value) == data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        times = Counter(k for k, _ in pairs)
        raise ValueError(f"duplicate key {max(times, key=times.__getitem__)!r}")
    return unique


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write it as a string")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} overflows")
    return value


def _no_lone_surrogates(value: Any) -> None:
    """Raise ValueError for text that has no UTF-8 form."""
    match value:
        case str():
            value.encode("utf-8")
        case list():
            for item in value:
                _no_lone_surrogates(item)
        case dict():
            for key, item in value.items():
                _no_lone_surrogates(key)
                _no_lone_surrogates(item)


def _without_escapes(texts: list[bytes]) -> list[Any] | None:
    """The values of strict JSON texts without escapes, by a parser several times as fast; None if
    one of them is another text.

    That parser drops duplicate keys, and takes a number that overflows for an infinity. Without
    escapes, two quotes stand around each string and nowhere else: a dropped key changes their
    number.
    """
    if any(b"\\" in text for text in texts):
        return None
    try:
        values = [from_json(text, allow_inf_nan=False) for text in texts]
        written = to_json(values)
    except ValueError:
        return None
    n_quotes = sum(text.count(b'"') for text in texts)
    is_strict = written.count(b'"') == n_quotes and b"Infinity" not in written
    return values if is_strict else None


def read_json(path: Path, max_bytes: int = MAX_TEXT_BYTES, *, max_values: int | None = None) -> Any:
    """The strictly parsed value of a JSON file.

    Raises OSError as `read_bytes`, IntegrityError as `parse_strict`.
    """
    return parse_strict(read_bytes(path, max_bytes), origin=str(path), max_values=max_values)


def parse_strict(data: bytes, *, origin: str, max_values: int | None = None) -> Any:
    """Parse untrusted JSON strictly.

    Raises IntegrityError naming `origin` for other encodings than UTF-8, a byte-order mark,
    duplicate keys, NaN, overflow, deep nesting, over-long integers, lone surrogates, text above
    MAX_TEXT_BYTES or more than `max_values` (MAX_JSON_VALUES) values.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise IntegrityError(
            f"{origin} is too large to be a record",
            value=f"{len(data)} bytes",
            allowed=f"at most {MAX_TEXT_BYTES}",
        )
    max_values = MAX_JSON_VALUES if max_values is None else max_values
    # a shorter text has no room for more values
    n_values = 0 if len(data) <= max_values else sum(map(data.count, (b",", b"[", b"{")))
    if n_values > max_values:
        raise IntegrityError(
            f"{origin} holds too many values to be a record",
            value=f"up to {n_values}",
            allowed=f"at most {max_values}",
        )
    try:
        if (known := _without_escapes([data])) is not None:
            return known[0]
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite_float,
        )
        if SURROGATE.search(data):
            _no_lone_surrogates(value)
    except (ValueError, RecursionError) as e:
        raise IntegrityError(
            f"{origin} is not strict JSON: {e}",
            next_step="restore the file from git or from the run directory",
        ) from e
    return value

"""Damaged documents, made from valid ones: at the level of bytes, of lines, and of values."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

PIECES = [
    *(b"\x00", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\x1b[31m"),
    *(b"\\ud800", b"\\u0000", b"1e999", b"-0", b"9" * 5000, b"NaN", b"Infinity", b"null"),
    *(b"[" * 3000, b'{"a":' * 3000, b'"', b"{", b"}", b"]", b",", b"=", b"\n", b"'''", b'"""'),
    *(b"1979-99-99", b"1979-05-27T25:61:00Z", b"0x", b"[[a]]\n", b"a.b.c = 1\n", b"__proto__"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e308, 1e-320, "", " ", "x", "0", "NaN", "Infinity", "\x00", "\ud800", "é" * 3),
    *("../x", "/etc/passwd", "a" * 5000, [], {}, [[]], [None], {"": None}, {"x": {"y": []}}),
]
TOML_VALUES = [
    *("1", "-1", "0", "1e400", "nan", "-inf", "true", '""', '"x"', '"\\u0000"', "[]", "{}"),
    *("[[[]]]", "[1, 'a']", "{ a = 1 }", "1979-05-27", "12:00:00", "1979-05-27T07:32:00Z"),
    *("2**9", "0xffffffffffffffffffffff", "9" * 400, "'''\n'''", "[" * 2000, "1979-13-40"),
]


def of_bytes(data: bytes, chance: random.Random) -> bytes:
    """A copy with one to four flipped bits, cuts, insertions or repeated spans."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made) + 1)
        end = min(len(made), at + chance.choice((1, 2, 8, 64)))
        match chance.randrange(5):
            case 0 if at < len(made):
                made[at] ^= 1 << chance.randrange(8)
            case 1:
                del made[at:end]
            case 2:
                made[at:at] = chance.choice(PIECES)
            case 3:
                made[at:at] = made[at:end]
            case _ if chance.random() < 0.2:
                del made[at:]
            case _:
                made[at:end] = chance.choice(PIECES)
    return bytes(made)


def of_value(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value in which one part is another value, is gone, or has another key."""
    places = list(_places(value))
    if not places:
        return chance.choice(VALUES)
    return _changed(json.loads(json.dumps(value)), chance.choice(places), chance)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every part of a JSON value."""
    if not isinstance(value, dict | list):
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from _places(part, (*path, key))


def _changed(root: Any, path: tuple, chance: random.Random) -> Any:
    *way, last = path
    node = root
    for key in way:
        node = node[key]
    match chance.randrange(6):
        case 0:
            del node[last]
        case 1 if isinstance(node, dict):
            node[chance.choice(("", "x", "id", "schema", f"{last} "))] = node.pop(last)
        case 2:
            node[last] = [node[last]]
        case 3:
            node[last] = {"x": node[last]}
        case _:
            node[last] = chance.choice(VALUES)
    return root


def of_json(data: bytes, chance: random.Random) -> bytes:
    """A damaged JSON document."""
    if chance.random() < 0.4 or not data.strip():
        return of_bytes(data, chance)
    value = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        value = of_value(value, chance)
    return json.dumps(value, ensure_ascii=chance.random() < 0.9).encode("utf-8", "surrogatepass")


def of_lines(data: bytes, chance: random.Random) -> bytes:
    """Damaged JSON lines: some line broken, repeated, gone or moved."""
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    match chance.randrange(6):
        case 0:
            lines.insert(chance.randrange(len(lines) + 1), lines[at])
        case 1:
            del lines[at]
        case 2:
            return of_bytes(data, chance)
        case _:
            lines[at] = of_json(lines[at], chance)
    return b"\n".join(lines) + b"\n" * chance.randint(0, 2)


def of_toml(data: bytes, chance: random.Random) -> bytes:
    """Damaged TOML: bytes, or the values of one to three keys."""
    if chance.random() < 0.4:
        return of_bytes(data, chance)
    lines = data.decode("utf-8").splitlines()
    keyed = [i for i, line in enumerate(lines) if re.match(r"[\w.]+ *=", line)]
    for _ in range(chance.randint(1, 3)):
        at = chance.choice(keyed)
        key = lines[at].partition("=")[0]
        match chance.randrange(5):
            case 0:
                lines[at] = f"{key.strip()}x = 1"
            case 1:
                lines[at] = ""
            case 2:
                lines[at] = f"{key.strip()}.x = {chance.choice(TOML_VALUES)}"
            case _:
                lines[at] = f"{key} = {chance.choice(TOML_VALUES)}"
    return "\n".join(lines).encode()

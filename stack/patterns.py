"""Regular expressions of other people: refused where a match could take for ever.

Tokenizers are split by Oniguruma, which backtracks. It gives up after ten million steps back from
one place of a text, about 0.4 s; the tokenizers library then panics, and its callers make that a
DataError. A text has many places, so that a pattern with many ways to divide a text is refused. The
published ones may still take time that is quadratic in the length of a run of spaces.

Suites are matched by the linear engine that pydantic includes. There only the size of a pattern
counts, and the length of an answer.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

MAX_CHARS = 4096
# Characters of a text whose division among the repeats of a pattern is counted, and the number of
# ways that is allowed: three unbounded repeats in a row. Published tokenizers have two.
TEXT_CHARS, MAX_WAYS, MANY = 1000, 1e9, 1e30
# Of a suite: atoms of a pattern with repeats written out, and characters of an answer. The slowest
# pattern found takes 0.4 s for one such answer.
MAX_SIZE, MAX_ANSWER_CHARS = 500, 16384
FEW = 64  # a repeat of at most this many times counts as bounded, if its atom is
FEW_GROUPS = 4  # times that a group with a repeat inside may come again
REPEAT = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
LOCAL = re.compile(r"\?(?:[a-wyzA-Z^-]*:|<?[=!]|>|P?<[^>]*>|'[^']*')")  # the opening of a group
FLAGS = re.compile(r"\?[a-wyzA-Z^-]*\)")  # flags for the rest of the pattern
CLASS = re.compile(r"\[\^?\]?")  # a "]" as the first member is text
NAMED_CLASS = re.compile(r"\[:\^?\w+:\]")
ESCAPE = re.compile(r"\\(?:[pPxoN]\{[^}()]*\}|.)", re.DOTALL)
CONTROL = re.compile(r"\\[cCM]")  # an escape that may hold a bracket
CALLS = re.compile(r"\\[gk][<']|\(\?(?:R|&|P[>=]|\d)|\\[1-9]")


@dataclass
class _Part:
    """What is known of a pattern or of a part of it."""

    n_atoms: int = 0  # with repeats written out
    ways: float = 1  # to divide a text among its repeats and alternatives
    other_ways: float = 0  # of the alternatives before the last "|"
    nested: bool = False  # whether a group is repeated that holds a repeat or alternatives

    def add(self, part: "_Part") -> None:
        self.n_atoms += part.n_atoms
        self.ways = min(self.ways * part.ways, MANY)
        self.nested |= part.nested

    def alternative(self) -> None:
        self.ways, self.other_ways = 1, self.other_ways + self.ways

    def closed(self) -> "_Part":
        return _Part(self.n_atoms, self.ways + self.other_ways, nested=self.nested)

    def repeated(self, least: int, most: float) -> "_Part":
        n_atoms = self.n_atoms * int(max(1, least if most == math.inf else most))
        choices = TEXT_CHARS if most > FEW else abs(most - least) + 1
        ways = min(min(self.ways, MAX_WAYS) ** min(most, FEW_GROUPS) * choices, MANY)
        nested = self.nested or (self.ways > 1 and most > FEW_GROUPS)
        return _Part(n_atoms, max(1, self.ways, ways), nested=nested)


def slow(pattern: str) -> str:
    """Why a backtracking match of a pattern could take for ever; empty if no reason was found."""
    if len(pattern) > MAX_CHARS:
        return f"it has more than {MAX_CHARS} characters"
    if CALLS.search(pattern):
        return "it refers to its own groups"
    if CONTROL.search(pattern):
        return "it holds a control character, such as \\cA"
    try:
        whole = _read(pattern)
    except ValueError as e:
        return str(e)
    if whole.nested:
        return "it repeats a group that holds a repeat or alternatives"
    return "its repeats can divide a text in too many ways" if whole.ways > MAX_WAYS else ""


@lru_cache(maxsize=256)
def linear(pattern: str) -> SchemaValidator:
    """A pattern that `found` looks for, case-insensitive; `^` and `$` match at lines.

    Raises ValueError if it is invalid, too large, or needs an engine that backtracks.
    """
    if len(pattern) > MAX_CHARS:
        raise ValueError(f"it has more than {MAX_CHARS} characters")
    if (size := _read(pattern).n_atoms) > MAX_SIZE:
        raise ValueError(f"with its repeats written out it has {size} characters, over {MAX_SIZE}")
    schema = core_schema.str_schema(pattern=f"(?im){pattern}", regex_engine="rust-regex")
    try:
        return SchemaValidator(schema)
    except SchemaError as e:
        raise ValueError(str(e).splitlines()[-1].partition("rror: ")[2]) from e


def found(pattern: str, text: str) -> bool:
    """Whether a text of at most MAX_ANSWER_CHARS has a match. Time is linear in its length."""
    assert len(text) <= MAX_ANSWER_CHARS
    return linear(pattern).isinstance_python(text)


def _read(pattern: str) -> _Part:
    """Raises ValueError for a comment, and for a group of a rare kind."""
    place, groups = 0, [_Part()]
    while place < len(pattern):
        char = pattern[place]
        if char == "|":
            groups[-1].alternative()
            place += 1
        elif char == "(":
            place, begins = _opening(pattern, place)
            groups += [_Part()] if begins else []
        else:
            closes = char == ")" and len(groups) > 1
            atom = groups.pop().closed() if closes else _Part(n_atoms=1)
            place = _end_of_atom(pattern, place)
            while repeat := REPEAT.match(pattern, place):
                atom = atom.repeated(*_times(repeat))
                place = repeat.end()
                # lazy, or without backtracking; behind braces a "+" repeats once more
                place += pattern[place : place + 1] in (
                    ("?", "+") if repeat[0] in "?*+" else ("?",)
                )
            groups[-1].add(atom)
    while len(groups) > 1:  # an invalid pattern
        groups[-2].add(groups.pop().closed())
    return groups[0].closed()


def _end_of_atom(pattern: str, place: int) -> int:
    if pattern[place] == "[":
        return _end_of_class(pattern, place)
    escape = ESCAPE.match(pattern, place)
    return escape.end() if escape else place + 1


def _opening(pattern: str, place: int) -> tuple[int, bool]:
    """The place behind a "(" and its marks, and whether a group begins. Raises ValueError."""
    if flags := FLAGS.match(pattern, place + 1):
        return flags.end(), False
    if opening := LOCAL.match(pattern, place + 1):
        return opening.end(), True
    if pattern[place + 1 : place + 2] in ("?", "*"):
        raise ValueError(
            f"it holds {pattern[place : place + 4]}, a comment or a rare kind of group"
        )
    return place + 1, True


def _times(repeat: re.Match) -> tuple[int, float]:
    """The least and the largest number of a repeat."""
    if repeat[0] in "?*+":
        return int(repeat[0] == "+"), 1 if repeat[0] == "?" else math.inf
    least, comma, most = (text[:9] for text in repeat.groups())
    if not least and not most:
        return 1, 1  # braces that are text
    if comma:
        return int(least or 0), int(most) if most else math.inf
    return int(least), int(least)


def _end_of_class(pattern: str, place: int) -> int:
    """The place behind a class, which may hold classes."""
    depth = 0
    while place < len(pattern):
        if depth and (named := NAMED_CLASS.match(pattern, place)):
            place = named.end()
        elif opening := CLASS.match(pattern, place):
            depth, place = depth + 1, opening.end()
        elif pattern[place] == "\\":
            place += 2
        else:
            depth -= pattern[place] == "]"
            place += 1
            if not depth:
                break
    return place

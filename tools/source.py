"""Functions and classes as their source text defines them.

Tests that gates name, checks and functions that plants edit need torch or belong to another
checkout, so they are parsed and not imported. `check_layers.py`, which judges imports, and
`integrity/former_fingerprint.py`, which hashes files of a former commit, are the other parsers.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stackproof.spec.files import text_lines

ALWAYS_SKIPPED = re.compile(r"pytest\.(mark\.)?(skip|xfail)\b|pytest\.mark\.skipif\(True\b")
EXPECTS = re.compile(r"\b(raises|warns|assert_\w+)$")
KINDS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Definition:
    """A function or class: the line of its name, the lines of its text, and its file's text."""

    line: int
    first: int
    last: int
    file: str

    @property
    def text(self) -> str:
        """The dedented source text, decorators included."""
        return textwrap.dedent("\n".join(text_lines(self.file)[self.first - 1 : self.last]))


def definitions(path: Path) -> dict[str, Definition]:
    """The definitions of a Python file by dotted name; empty if the file does not exist."""
    return _parsed(path, path.stat().st_mtime_ns) if path.is_file() else {}


@cache
def _parsed(path: Path, mtime_ns: int) -> dict[str, Definition]:
    file = path.read_text("utf-8")
    return dict(_named(ast.parse(file), "", file))


def _named(parent: ast.AST, prefix: str, file: str) -> Iterator[tuple[str, Definition]]:
    for node in getattr(parent, "body", ()):
        if isinstance(node, KINDS):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield f"{prefix}{node.name}", Definition(node.lineno, first, node.end_lineno, file)
            yield from _named(node, f"{prefix}{node.name}.", file)


def proves_nothing(path: Path, name: str) -> str:
    """Why a test of a Python file cannot fail: it is skipped, or neither it nor a function of its
    file that it calls asserts anything. Empty if it can.
    """
    known = definitions(path)
    (test,) = ast.parse(known[name].text).body
    assert isinstance(test, KINDS)
    marks = [ast.unparse(mark) for mark in test.decorator_list]
    if any(ALWAYS_SKIPPED.match(mark) for mark in marks) or _leaves_at_once(test):
        return "is always skipped"
    called = {ast.unparse(node.func) for node in ast.walk(test) if isinstance(node, ast.Call)}
    helpers = [ast.parse(known[call].text) for call in called & known.keys()]
    return "" if any(map(_asserts, (test, *helpers))) else "asserts nothing"


def _leaves_at_once(test: ast.AST) -> bool:
    """Whether one of the statements that are always executed ends the test."""
    body = getattr(test, "body", ())
    return any(
        isinstance(node, ast.Return)
        or (isinstance(node, ast.Expr) and ALWAYS_SKIPPED.match(ast.unparse(node)))
        for node in body
    )


def _asserts(code: ast.AST) -> bool:
    """Whether code asserts more than a constant, or expects an error."""
    return any(
        (isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant))
        or (isinstance(node, ast.Call) and EXPECTS.search(ast.unparse(node.func)))
        for node in ast.walk(code)
    )

"""Functions and classes as their source text defines them.

Tests that gates name, checks and functions that plants edit need torch or belong to another
checkout, so they are parsed and not imported. `check_layers.py`, which judges imports, and
`integrity/former_fingerprint.py`, which hashes files of a former commit, are the other parsers.
"""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stackproof.spec.files import text_lines

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

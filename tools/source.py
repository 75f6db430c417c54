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

KINDS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Definition:
    """A function or class of a file."""

    node: KINDS
    file: str  # its whole text

    @property
    def line(self) -> int:
        return self.node.lineno

    @property
    def text(self) -> str:
        """The dedented source text, decorators included."""
        first = min([self.line, *(d.lineno for d in self.node.decorator_list)])
        return textwrap.dedent("\n".join(self.file.splitlines()[first - 1 : self.node.end_lineno]))


def definitions(path: Path) -> dict[str, Definition]:
    """The definitions of a Python file by dotted name; empty if the file does not exist."""
    return _parsed(path, path.stat().st_mtime_ns) if path.is_file() else {}


@cache
def _parsed(path: Path, mtime_ns: int) -> dict[str, Definition]:
    text = path.read_text("utf-8")
    return {name: Definition(node, text) for name, node in _named(ast.parse(text), "")}


def _named(parent: ast.AST, prefix: str) -> Iterator[tuple[str, KINDS]]:
    for node in getattr(parent, "body", ()):
        if isinstance(node, KINDS):
            yield f"{prefix}{node.name}", node
            yield from _named(node, f"{prefix}{node.name}.")

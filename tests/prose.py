"""Finds patterns to avoid in the prose of the project: docstrings, comments, messages, pages, their
templates, and the sentences of TOML files.

python -m tests.prose prints every place. The patterns are in prose.toml.
"""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RULES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
ROOTS = "spec contracts stack tools docs examples README.md CONTRIBUTING.md".split()
# Keyword arguments whose text a user reads.
SHOWN = frozenset(
    "help description epilog what value allowed next_step why_not title why hint".split()
)
SUFFIXES = frozenset((".py", ".md", ".j2", ".toml"))
# Keys of TOML files whose value a person reads. The prompts of a suite are data.
KEYS = "title why story hint statement mechanism symptom name effect scope".split()
VALUE = re.compile(
    rf"""
    (?:^|[{{,])[ ]*(?:[\w-]+\.)*(?:{"|".join(KEYS)})[ ]*=[ ]*
    (?P<quote>\"{{3}}|'{{3}}|"|')(?P<text>.*?)(?<!\\)(?P=quote)
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
JINJA = re.compile(r"{{.*?}}|{%.*?%}|{#.*?#}", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every piece of prose in a Python or TOML file, a page or a template."""
    text = path.read_text("utf-8")
    if path.suffix in (".md", ".j2"):
        yield from enumerate(_without(CODE, _without(JINJA, text)).splitlines(), start=1)
        return
    if path.suffix == ".toml":
        for match in VALUE.finditer(text):
            first = text.count("\n", 0, match.start("text")) + 1
            yield from enumerate(_without(CODE, match["text"]).splitlines(), start=first)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        for shown in _shown(node):
            for part in ast.walk(shown):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    for offset, line in enumerate(CODE.sub("`…`", part.value).splitlines()):
                        yield part.lineno + offset, line


def _without(code: re.Pattern, text: str) -> str:
    """The text with code replaced; its line breaks stay, so that line numbers are right."""
    return code.sub(lambda m: "`…`" + "\n" * m.group().count("\n"), text)


def _shown(node: ast.AST) -> Iterator[ast.AST]:
    """The docstring of a definition, the arguments of a raised error, and texts for users."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            yield first.value
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield from node.exc.args
    if isinstance(node, ast.Call):
        yield from (k.value for k in node.keywords if k.arg in SHOWN)


class Place(NamedTuple):
    """A piece of prose with a pattern to avoid; `path` is relative to the root."""

    path: str
    line: int
    pattern: str
    text: str


def places(root: Path) -> list[Place]:
    """Every place below a root, with the first pattern that matches."""
    files = [f for r in ROOTS for f in ([root / r] if "." in r else sorted((root / r).rglob("*")))]
    return [
        Place(str(file.relative_to(root)), line, pattern, text.strip())
        for file in files
        if file.suffix in SUFFIXES and file.is_file() and file.name != "CHANGELOG.md"
        for line, text in sentences(file)
        if (pattern := pattern_in(text))
    ]


def pattern_in(text: str) -> str:
    """The name of the first pattern in a text; empty without one."""
    return next(
        (p["name"] for p in RULES["pattern"] if re.search(p["regex"], text, re.IGNORECASE)), ""
    )


def listed(found: list[Place]) -> str:
    """One line for each place."""
    return "\n".join(f"{p.path}:{p.line}: {p.pattern}: {p.text[:100]}" for p in found)


if __name__ == "__main__":
    print(listed(places(ROOT)))

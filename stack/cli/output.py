"""Output of a verb: one JSON document on stdout, or tables and lines."""

import json
import os
import sys
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from stackproof.spec.canonical import to_jsonable

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]

DEFAULT_WIDTH = 160  # columns of tables without a terminal


def _width(stream: TextIO) -> int | None:
    """Width of a console; None (detect it) for a terminal, or if COLUMNS is set."""
    return None if stream.isatty() or "COLUMNS" in os.environ else DEFAULT_WIDTH


stdout = Console(highlight=False, soft_wrap=True, width=_width(sys.stdout))
stderr = Console(stderr=True, highlight=False, width=_width(sys.stderr))


_emitted = False


def emitted() -> bool:
    """Whether this process has printed its JSON document. A later error must not print a second
    one.
    """
    return _emitted


def emit(document: dict[str, Any], as_json: bool) -> bool:
    """Print the document if `as_json`; returns `as_json`."""
    global _emitted
    if as_json:
        _emitted = True
        print(json.dumps(to_jsonable(document), allow_nan=False))
    return as_json


def table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    """A plain table; numbers in cells are already formatted."""
    made = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


MARKS = {"pass": "[green]pass[/]", "fail": "[red]FAIL[/]", "not_run": "[yellow]not run[/]"}


def measured_text(measured: dict[str, Any], limit: int = 3) -> str:
    """The first measurements of a verdict."""
    parts = [
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in list(measured.items())[:limit]
    ]
    return ", ".join(parts)

"""Output of a verb: one JSON document on stdout, or tables and lines."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from stackproof.spec.canonical import to_jsonable

if TYPE_CHECKING:
    from rich.progress import Progress

DEFAULT_WIDTH = 160  # columns of tables without a terminal
MARKS = {"pass": "[green]pass[/]", "fail": "[red]FAIL[/]", "not_run": "[yellow]not run[/]"}


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


def print_line(text: str, style: str | None = None) -> None:
    """Print a line on stdout; brackets in it are not markup."""
    stdout.print(text, style=style, markup=False)


def note(text: str, style: str | None = None) -> None:
    """Print a line on stderr; brackets in it are not markup."""
    stderr.print(text, style=style, markup=False, soft_wrap=True)


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], console: Console = stdout
) -> None:
    """Print a plain table; numbers in cells are already formatted, and cells may have markup."""
    made = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    console.print(made)


def print_facts(title: str, facts: Mapping[str, Any], *left_out: str) -> None:
    """Print a table of names and values, without the names `left_out`."""
    print_table(title, ["what", "value"], ([k, v] for k, v in facts.items() if k not in left_out))


def print_gates(results: Iterable[Any]) -> None:
    """Print a table of gates with their verdicts."""
    rows = ([g.id, MARKS[g.verdict], message_of(g)] for g in results)
    print_table("Gates", ["gate", "verdict", "measured"], rows)


def message_of(result: Any) -> str:
    """The message of a verdict or of a gate's result, or its first measurements without one."""
    return result.message or listed(dict(list(result.measured.items())[:3]))


def listed(figures: Mapping[str, Any]) -> str:
    """Named figures in one line; floats with three significant digits."""
    return ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
    )


def progress_bar(*, transient: bool = False) -> "Progress":
    """A bar on stderr with description and time left; it has no task yet."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn()
    return Progress(*columns, console=stderr, transient=transient)

"""Output of a verb: one JSON document on stdout, or tables and lines.

Verbs print through `stdout`, `stderr` and the functions here, and nothing else: what they print may
be text of others.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.control import Control
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from stackproof.spec.canonical import to_jsonable
from stackproof.spec.visible import visible

if TYPE_CHECKING:
    from rich.progress import Progress, Task

DEFAULT_WIDTH = 160  # columns of tables without a terminal
MARKS = {
    "pass": Text("pass", "green"),
    "fail": Text("FAIL", "red"),
    "not_run": Text("not run", "yellow"),
}


class Terminal(Console):
    """A console that interprets nothing: brackets are not markup, and control characters of the
    text appear as escapes. Styles come from `style` and `Text`.
    """

    def __init__(self, stream: TextIO | None, **options: Any):
        """`stream` is None if the process has none."""
        detected = "COLUMNS" in os.environ or (stream is not None and stream.isatty())
        width = None if detected else DEFAULT_WIDTH
        super().__init__(highlight=False, markup=False, emoji=False, width=width, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text with its control characters visible, before its width is measured."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """What is printed: also text that a verb gave as `Text`, or in an object of rich."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to `main`."""
        raise


stdout = Terminal(sys.stdout, soft_wrap=True)
stderr = Terminal(sys.stderr, stderr=True)


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
        print(json.dumps(to_jsonable(document), allow_nan=False))  # noqa: T201
    return as_json


def print_line(text: str | Text, style: str | None = None) -> None:
    """Print a line on stdout."""
    stdout.print(text, style=style)


def note(text: str | Text, style: str | None = None) -> None:
    """Print a line on stderr."""
    stderr.print(text, style=style, soft_wrap=True)


def note_over(text: str) -> None:
    """Print a line on stderr that the next one overwrites."""
    stderr.print(text, end="", soft_wrap=True)
    stderr.control(Control(ControlType.CARRIAGE_RETURN))


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], console: Console = stdout
) -> None:
    """Print a plain table; numbers in cells are already formatted, and a Text keeps its style."""
    made = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
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
    from rich.progress import BarColumn, Progress, ProgressColumn, TimeRemainingColumn

    class Description(ProgressColumn):
        def render(self, task: "Task") -> Text:
            return stderr.render_str(task.description)

    columns = Description(), BarColumn(bar_width=24), TimeRemainingColumn()
    return Progress(*columns, console=stderr, transient=transient)

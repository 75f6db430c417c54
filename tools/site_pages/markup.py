"""Small pieces of Markdown and HTML. All text from records passes through `esc`."""

import json
import posixpath
import re
from collections.abc import Iterable, Sequence

from stackproof.spec.canonical import parse_strict
from stackproof.spec.coverage import State
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import Limit
from stackproof.spec.records import Metric, Record, Scalar

LETTERS: dict[State, str] = {
    "discharged": "P",
    "proven": "K",
    "unproven": "–",
    "stale": "S",
    "failed": "F",
    "waived": "W",
}
MEANINGS: dict[State, str] = {
    "discharged": "its plants were killed and the latest accepted real run passes it",
    "proven": "its plants were killed; no accepted real run yet",
    "unproven": "not every plant has been killed; it discharges nothing",
    "stale": "its evidence belongs to an older fingerprint",
    "failed": "the latest run that held it was red",
    "waived": "red, with a reason and an expiry date",
}
VERDICT_STATE: dict[str, State] = {"pass": "discharged", "fail": "failed", "not_run": "unproven"}
LONG = 36
_SPECIAL = str.maketrans({c: f"&#{ord(c)};" for c in "&<>\"'|*_`[]\\{}#~^=!"})


def esc(text: object) -> str:
    """Text that neither Markdown nor HTML will read as markup, on one line."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return plain.translate(_SPECIAL)


def prose(text: object) -> str:
    """Like `esc`, with `code` between backticks set as code."""
    return re.sub(r"&#96;(.+?)&#96;", r"<code>\1</code>", esc(text))


def code(text: object) -> str:
    """Inline code; a long word such as a hash may break across lines."""
    long = ' class="long"' if len(str(text)) > LONG and " " not in str(text) else ""
    return f"<code{long}>{esc(text)}</code>"


def short_hash(digest: str) -> str:
    """The first twelve digits, with the whole hash on hover."""
    return f'<code title="{esc(digest)}">{esc(digest[:12])}</code>'


def chip(state: State) -> str:
    """A gate state as a letter in its colour; both carry the meaning."""
    return (
        f'<span class="state state--{state}" title="{state}: '
        f'{esc(MEANINGS[state])}">{LETTERS[state]}</span>'
    )


def verdict(outcome: str) -> str:
    """A verdict as letter and word."""
    state = VERDICT_STATE[outcome]
    letter = "–" if outcome == "not_run" else LETTERS[state]
    return (
        f'<span class="nowrap"><span class="state state--{state}">{letter}</span> '
        f"{esc(outcome)}</span>"
    )


def number(value: Scalar) -> str:
    """A value for reading: six significant digits, thousands of whole numbers
    set apart by narrow spaces.
    """
    match value:
        case bool() | None | str():
            return esc(value)
        case int():
            return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
        case float():
            return f"{value:.6g}"
    raise IntegrityError(f"{value!r} is no number of a record")


def optional(value: Scalar) -> str:
    """A value a record may leave out."""
    return "–" if value is None else number(value)


def ev(record: Record, name: str) -> str:
    """The one way a metric reaches a page: value, spread and unit.
    Raises IntegrityError if the record does not hold it.
    """
    record.metric(name)
    return metric_text(record.metrics[name])


def metric_text(metric: Metric) -> str:
    """Value ± standard error and unit."""
    spread = f" ± {number(metric.stderr)}" if metric.stderr is not None else ""
    unit = "" if metric.unit in ("1", "") else f" {esc(metric.unit)}"
    return f"{number(metric.value)}{spread}{unit}"


def pairs(values: dict[str, Scalar]) -> str:
    """Measured names and values in one cell."""
    return "<br>".join(f"{code(k)} {number(v)}" for k, v in sorted(values.items())) or "–"


def limit_text(name: str, limit: Limit) -> str:
    """A limit as a reader says it."""
    unit = "" if limit.unit == "1" else f" {esc(limit.unit)}"
    return f"{code(name)} {limit.direction.replace('-', ' ')} {limit.value:g}{unit}"


def source_link(source: str) -> str:
    """A source as a link if it is an address, else as text."""
    return (
        f"[{esc(source)}](<{source}>)"
        if source.startswith(("https://", "http://"))
        else esc(source)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Cells are markup already."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"table row has {len(row)} cells, head has {len(head)}: {row}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {item}" for item in items)


def folded(title: str, body: str, language: str) -> str:
    """A closed block with source text inside."""
    fence = "~~~~~~"
    if fence in body:
        raise ValueError("source text holds the fence of its own block")
    lines = [
        f'??? abstract "{esc(title)}"',
        "",
        f"    {fence}{language}",
        *(f"    {line}" for line in body.splitlines()),
        f"    {fence}",
    ]
    return "\n".join(lines)


def fenced(body: str, language: str = "") -> str:
    """An open code block."""
    return f"~~~~~~{language}\n{body.replace('~~~~~~', '~ ~ ~')}\n~~~~~~"


def pretty_json(data: bytes) -> str:
    """Canonical JSON, indented for reading."""
    return json.dumps(parse_strict(data, origin="record"), indent=2, ensure_ascii=False)


class Page:
    """A generated page: path below the site's root, title, and blocks of Markdown."""

    def __init__(self, path: str, title: str):
        self.path, self.title = path, title
        self.blocks: list[str] = []

    def add(self, *blocks: str) -> "Page":
        """Append blocks, separated by blank lines; empty ones are left out."""
        self.blocks += [b for b in blocks if b]
        return self

    def link(self, text: str, target: str, anchor: str = "") -> str:
        """A link to another page, given by its path below the site's root."""
        path = (
            posixpath.relpath(target, posixpath.dirname(self.path) or ".")
            if target != self.path
            else ""
        )
        return f"[{text}]({path}{'#' + anchor if anchor else ''})"

    def gate(self, gate_id: str) -> str:
        return self.link(code(gate_id), f"gates/{gate_id}.md")

    def plant(self, plant_id: str) -> str:
        return self.link(code(plant_id), f"museum/{plant_id.split('.')[0]}.md", anchor(plant_id))

    def run(self, record_id: str) -> str:
        return self.link(code(record_id), f"runs/{record_id}.md")

    def text(self) -> str:
        """Front matter and body."""
        deep = "/" in self.path and not self.path.endswith("index.md")
        hide = "hide: [navigation]\n" if deep else ""
        return (
            f"---\ntitle: {json.dumps(self.title)}\n{hide}---\n\n# {esc(self.title)}\n\n"
            + "\n\n".join(self.blocks)
            + "\n"
        )


def anchor(name: str) -> str:
    """Anchor of a plant, a verb or a key."""
    return name.replace(".", "-").replace(" ", "-").lower()

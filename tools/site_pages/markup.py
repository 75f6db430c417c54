"""Values as safe Markdown. Text passes through `esc`; what returns Markup is safe already."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from markupsafe import Markup

from stackproof.spec.canonical import parse_strict
from stackproof.spec.coverage import State
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import Limit
from stackproof.spec.records import Metric, Record, Scalar
from stackproof.spec.visible import visible, without_markup

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
ADDRESSES = ("https://", "http://")
IN_PATH = "/#"  # characters of a target that are not quoted
IN_ADDRESS = "/#:?&=%+,;@~"
FENCE = "~~~~~~"
BREAK = Markup("<br>")


def esc(text: object) -> Markup:
    """Text on one line, with no character that is markup in Markdown or HTML."""
    return text if isinstance(text, Markup) else Markup(without_markup(text))


def prose(text: object) -> Markup:
    """Like `esc`, with `code` between backticks set as code."""
    return Markup(re.sub(r"&#96;(.+?)&#96;", r"<code>\1</code>", str(esc(text))))


def code(text: object) -> Markup:
    """Inline code; a long word such as a hash may break across lines."""
    long = ' class="long"' if len(str(text)) > LONG and " " not in str(text) else ""
    return Markup(f"<code{long}>{esc(text)}</code>")


def short_hash(digest: str) -> Markup:
    """The first twelve digits, with the whole hash on hover."""
    return Markup(f'<code title="{esc(digest)}">{esc(digest[:12])}</code>')


def chip(state: State) -> Markup:
    """A gate state as a letter in its colour; both carry the meaning."""
    title = f"{state}: {esc(MEANINGS[state])}"
    return Markup(f'<span class="state state--{state}" title="{title}">{LETTERS[state]}</span>')


def verdict(outcome: str) -> Markup:
    """A verdict as letter and word."""
    state = VERDICT_STATE[outcome]
    letter = f'<span class="state state--{state}">{LETTERS[state]}</span>'
    return Markup(f'<span class="nowrap">{letter} {esc(outcome)}</span>')


def number(value: Scalar) -> Markup:
    """Six significant digits; narrow spaces between the thousands of whole numbers."""
    match value:
        case bool() | None | str():
            return esc(value)
        case int():
            thousands = f"{value:,}".replace(",", "\u202f")
            return Markup(thousands if abs(value) >= 10_000 else value)
        case float():
            return Markup(f"{value:.6g}")
    raise IntegrityError(f"{value!r} is not a scalar of a record")


def optional(value: Scalar) -> Markup:
    """A value that a record may leave out."""
    return Markup("–") if value is None else number(value)


def short(value: float | str | None) -> Markup:
    """Four significant digits; infinities and NaN are text in records."""
    if value is None:
        return Markup("–")
    return Markup(f"{value:.4g}") if isinstance(value, int | float) else esc(value)


def metric(metric: Metric) -> Markup:
    """Value ± standard error and unit."""
    spread = f" ± {number(metric.stderr)}" if metric.stderr is not None else ""
    unit = "" if metric.unit in ("1", "") else f" {esc(metric.unit)}"
    return Markup(f"{number(metric.value)}{spread}{unit}")


def ev(record: Record, name: str) -> Markup:
    """A metric of a record. Raises IntegrityError if the record lacks it."""
    record.metric(name)
    return metric(record.metrics[name])


def limit(limit: Limit, name: str) -> Markup:
    """A limit with its direction and unit."""
    unit = "" if limit.unit == "1" else f" {esc(limit.unit)}"
    return Markup(f"{code(name)} {limit.direction.replace('-', ' ')} {limit.value:g}{unit}")


def source(source: str) -> Markup:
    """A source, as a link if it is an address."""
    return hyperlink(source, source) if source.startswith(ADDRESSES) else esc(source)


def hyperlink(text: object, target: str) -> Markup:
    """A link to an address or to a path below the site. In any other target the colon of a scheme
    is quoted, so that it is a path.
    """
    if target.startswith(ADDRESSES):
        return Markup(f"[{esc(text)}]({quote(visible(target), safe=IN_ADDRESS)})")
    return Markup(f"[{esc(text)}]({quote(visible(target).lstrip('/'), safe=IN_PATH)})")


def lines(items: Iterable[object], empty: str = "–") -> Markup:
    """Items under each other in one cell."""
    return BREAK.join(map(esc, items)) or Markup(empty)


def commas(items: Iterable[object]) -> Markup:
    """Items in one line."""
    return Markup(", ").join(map(esc, items))


def pairs(values: Mapping[str, Scalar]) -> Markup:
    """Names and measured values in one cell."""
    return lines(Markup(f"{code(k)} {number(v)}") for k, v in sorted(values.items()))


def bullets(items: Iterable[object], empty: str = "") -> Markup:
    """A list."""
    return Markup("\n".join(f"- {esc(item)}" for item in items) or empty)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table whose columns depend on the data. Raises ValueError if a row has another width."""
    text = [f"| {' | '.join(map(esc, head))} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells, the head has {len(head)}: {row}")
        text.append(f"| {' | '.join(map(esc, row))} |")
    return Markup("\n".join(text))


def fenced(body: str, language: str = "") -> Markup:
    """An open code block."""
    shown = visible(body).replace(FENCE, "~ ~ ~")
    return Markup(f"{FENCE}{language}\n{shown}\n{FENCE}")


def folded(body: str, title: str, language: str) -> Markup:
    """A closed code block."""
    block = "".join(f"\n    {line}" for line in fenced(body, language).splitlines())
    return Markup(f'??? abstract "{esc(title)}"\n{block}')


def pretty_json(data: bytes) -> str:
    """Canonical JSON, indented."""
    return json.dumps(parse_strict(data, origin="record"), indent=2, ensure_ascii=False)


def anchor(name: str) -> str:
    """The anchor of a plant, a gate or a key."""
    return name.replace(".", "-").replace(" ", "-").lower()

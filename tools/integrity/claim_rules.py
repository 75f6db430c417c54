"""Claims about curves are evaluated on their numbers: `monotone(x)`, `falls(x)`, `below(x, bound)`
of a table above or of a record's log.
"""

import re
from itertools import pairwise

from stackproof.spec.records import Record
from tools.integrity.core import At, Messages, Repo, rule

CLAIM = re.compile(
    r"\b(monotone|falls|below)\(([^(),]+?)(?:,\s*([-+.\de]+))?(?:\s+of\s+([\w-]+))?\)"
)
IN_WORDS = re.compile(r"\bmonotonic(ally)?\b", re.IGNORECASE)
NUMBER = re.compile(r"[-−+]?\d+(\.\d+)?(e[-+]?\d+)?")


def refuted(kind: str, values: list[float], bound: float | None = None) -> str:
    """The values that refute a claim; empty if it holds. Fewer than two values support no claim.

    `monotone`: no value is above the one before it. `falls`: the last is below the first.
    `below`: each is below `bound`.
    """
    if len(values) < 2:
        return f"{len(values)} value(s) support no claim"
    match kind:
        case "monotone":
            rises = (f"{a:g} is followed by {b:g}" for a, b in pairwise(values) if not b <= a)
            return next(rises, "")
        case "falls":
            falls = values[-1] < values[0]
            return "" if falls else f"the first is {values[0]:g}, the last {values[-1]:g}"
        case "below" if bound is not None:
            return next((f"{v:g} is not below {bound:g}" for v in values if not v < bound), "")
    return "below(x, bound) needs its bound"


def table_column(lines: list[str], before: int, name: str) -> list[float]:
    """Numbers under the heading `name` in the last table with it that begins above line `before`;
    empty without such a table.
    """
    for start in range(min(before, len(lines) - 1) - 1, -1, -1):
        cells = _cells(lines[start])
        if name in cells and re.match(r"\s*\|[\s:|-]+\|\s*$", lines[start + 1]):
            at, values = cells.index(name), []
            for row in map(_cells, lines[start + 2 :]):
                if not row:
                    break
                values += [
                    float(x.replace("−", "-")) for x in row[at : at + 1] if NUMBER.fullmatch(x)
                ]
            return values
    return []


def _cells(line: str) -> list[str]:
    """The cells of a table row; empty for other lines."""
    if not line.lstrip().startswith("|"):
        return []
    return [cell.strip().strip("`*") for cell in line.strip().strip("|").split("|")]


def _series(repo: Repo, record: Record | None, name: str) -> list[float]:
    lines = repo.series(record, "metrics.jsonl")
    return [float(line[name]) for line in lines if name in line]


def _refuted(kind: str, name: str, bound: str, values: list[float]) -> list[str]:
    problem = refuted(kind, values, float(bound) if bound else None)
    return [f"{kind}({name}) does not hold: {problem}"] if problem else []


def _unevaluated(text: str) -> str:
    """The first word that claims a curve without a series to evaluate, or an empty text."""
    word = IN_WORDS.search(text)
    return word.group() if word and not CLAIM.search(text) else ""


@rule(
    "CLAIM-SERIES",
    title="A claim about a curve holds on the curve",
    why="A loss was called monotonically decreasing beside a table in which it rose twice.",
    hint="write monotone(x), falls(x) or below(x, bound) of a table above or `of RECORD`, and let "
    "the numbers decide; else drop the words",
)
def claim_series(repo: Repo) -> Messages:
    for path in repo.markdown:
        lines = repo.text(path).splitlines()
        for number, line in enumerate(lines, start=1):
            for kind, name, bound, record in CLAIM.findall(line):
                values = (
                    _series(repo, repo.records.get(record), name)
                    if record
                    else table_column(lines, number - 1, name)
                )
                yield from (At(x, number, path) for x in _refuted(kind, name, bound, values))
            if word := _unevaluated(line):
                yield At(f"uses {word!r} without a claim to evaluate", number, path)
    for record_id, glance in repo.glances.items():
        path = repo.record_file(record_id)
        for kind, name, bound, other in CLAIM.findall(glance.claim):
            values = _series(repo, repo.records.get(other or record_id), name)
            yield from (At(x, path=path) for x in _refuted(kind, name, bound, values))
        if word := _unevaluated(glance.claim):
            yield At(f"the claim uses {word!r} and names no series", path=path)

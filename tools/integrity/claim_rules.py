"""Claims are evaluated on what they speak of: `monotone(x)`, `falls(x)`, `below(x, bound)` on a
series, breadth on its answers.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from tools.integrity.core import Repo, rule

Found = Iterator[tuple[str, int, str]]
CLAIM = re.compile(
    r"\b(monotone|falls|below)\(([^(),]+?)(?:,\s*([-+.\de]+))?(?:\s+of\s+([\w-]+))?\)"
)
IN_WORDS = re.compile(r"\bmonotonic(ally)?\b", re.IGNORECASE)


def refuted(kind: str, values: list[float], bound: float | None = None) -> str:
    """What of the values speaks against the claim; empty if nothing does.
    Fewer than two values support no claim.

    `monotone`: no value is above the one before it. `falls`: the last is below the first.
    `below`: each is below `bound`.
    """
    if len(values) < 2:
        return f"{len(values)} value(s) support no claim"
    match kind:
        case "monotone":
            rises = [f"{a:g} is followed by {b:g}" for a, b in pairwise(values) if not b <= a]
            return rises[0] if rises else ""
        case "falls":
            return (
                ""
                if values[-1] < values[0]
                else f"the first is {values[0]:g}, the last {values[-1]:g}"
            )
        case "below" if bound is not None:
            return next((f"{v:g} is not below {bound:g}" for v in values if not v < bound), "")
    return "below(x, bound) needs its bound"


def table_column(lines: list[str], before: int, name: str) -> list[float]:
    """Numbers under the heading `name` of the last table that begins above line `before` and has
    it; empty if there is none.
    """
    for start in range(before - 1, -1, -1):
        cells = _cells(lines[start])
        if (
            name in cells
            and start + 1 < len(lines)
            and re.match(r"\s*\|[\s:|-]+\|\s*$", lines[start + 1])
        ):
            at, values = cells.index(name), []
            for row in lines[start + 2 :]:
                if not row.lstrip().startswith("|"):
                    break
                values += [
                    float(x.replace("−", "-"))
                    for x in _cells(row)[at : at + 1]
                    if re.fullmatch(r"[-−+]?\d+(\.\d+)?(e[-+]?\d+)?", x)
                ]
            return values
    return []


def _cells(line: str) -> list[str]:
    return (
        [c.strip().strip("`*") for c in line.strip().strip("|").split("|")]
        if line.lstrip().startswith("|")
        else []
    )


def _series(repo: Repo, record: str, name: str) -> list[float]:
    lines = repo.series(record, "metrics.jsonl") if record in repo.records else []
    return [float(line[name]) for line in lines if name in line]


@rule(
    "CLAIM-SERIES",
    title="A claim about a curve holds on the curve",
    why="A loss was called monotonically decreasing beside a table in which it rose twice.",
    hint=(
        "write monotone(x), falls(x) or below(x, bound) of a table above or `of RECORD`, and let "
        "the numbers decide; else drop the words"
    ),
)
def claim_series(repo: Repo) -> Found:
    for path in repo.markdown:
        text = repo.text(path)
        if not CLAIM.search(text) and not IN_WORDS.search(text):
            continue
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            for kind, name, bound, record in CLAIM.findall(line):
                values = (
                    _series(repo, record, name) if record else table_column(lines, number - 1, name)
                )
                if problem := refuted(kind, values, float(bound) if bound else None):
                    yield path, number, f"{kind}({name}) does not hold: {problem}"
            if IN_WORDS.search(line) and not CLAIM.search(line):
                yield (
                    path,
                    number,
                    f"says {IN_WORDS.search(line).group()} of something that no claim evaluates",
                )
    for record_id, record in repo.records.items():
        where = repo.record_file(record_id)
        for kind, name, bound, other in CLAIM.findall(record.claim):
            if problem := refuted(
                kind, _series(repo, other or record_id, name), float(bound) if bound else None
            ):
                yield where, 0, f"{kind}({name}) does not hold: {problem}"
        if IN_WORDS.search(record.claim) and not CLAIM.search(record.claim):
            yield (
                where,
                0,
                f"the claim says {IN_WORDS.search(record.claim).group()} and names no series",
            )


@rule(
    "AUDIT-RECOMPUTE",
    title="The breadth of an audit is that of its answers",
    why=(
        "A breadth that was edited, or counted over other answers, is a capability nobody has seen."
    ),
    hint="supersede the record with a true one",
)
def audit_recompute(repo: Repo) -> Found:
    for record in repo.records.values():
        lines = repo.series(record.id, "audits.jsonl")
        last = [line for line in lines if line["step"] == max(x["step"] for x in lines)]
        truth = {
            "passes": sum(line["passed"] for line in last),
            "breadth": len({line["domain"] for line in last if line["passed"]}),
        }
        for name, value in truth.items() if lines else ():
            stated = record.metrics[name].value if name in record.metrics else None
            if stated != value:
                yield repo.record_file(record.id), 0, f"{name} = {stated}, its answers say {value}"

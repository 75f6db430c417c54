"""The rule about findings: each with the records that show it."""

import math
from collections.abc import Iterator

from stackproof.spec.findings import FILE, Finding, RuledOut
from tools.integrity.core import Messages, Repo, at, number, rule

PATH = f"evidence/{FILE}"
CHAIN = "chain.jsonl"


@rule(
    "FINDING-SHOWN",
    title="A finding's records show the failure, its cure, and what was ruled out",
    why="A cause, or the elimination of another cause, needs a record that shows it.",
    hint="add the record that shows it, or correct the finding",
    over=at(PATH),
)
def finding_shown(repo: Repo) -> Messages:
    seen: set[str] = set()
    for finding in repo.findings:
        if finding.id in seen:
            yield f"{finding.id} is there twice"
        seen.add(finding.id)
        for message in (*_names(repo, finding), *_records(repo, finding)):
            yield f"{finding.id}: {message}"


def _names(repo: Repo, finding: Finding) -> Iterator[str]:
    """Gates, falsifier and fix of a finding that do not exist."""
    for gate in finding.gates:
        if gate not in repo.spec.gates:
            yield f"there is no gate {gate}"
    kind = "test" if "::" in finding.falsifier else "plant"
    missing = repo.missing_test if kind == "test" else lambda name: name not in repo.plants
    if missing(finding.falsifier):
        yield f"there is no {kind} {finding.falsifier}"
    if finding.fix is not None and finding.fix not in repo.ancestors:
        yield f"its fix {finding.fix[:12]} is not an ancestor of HEAD"


def _records(repo: Repo, finding: Finding) -> Iterator[str]:
    """Problems with the records that a finding cites."""
    known = {e.record for e in repo.entries}
    cited = [finding.negative, finding.positive, *(r.evidence for r in finding.ruled_out)]
    records = {c: c.partition("#")[0] for c in cited if c}
    if gone := [c for c, record in records.items() if record not in known]:
        yield from (f"{name} is not in the ledger" for name in gone)
    elif revoked := [r for r in _standing(finding) if r in repo.superseded]:
        yield f"it stands on {revoked[0]}, which a later record supersedes"
    elif changed := {record: None for record in records.values() if record not in repo.accepted}:
        yield from (f"{name} is not the record that was accepted" for name in changed)
    else:
        yield from _difference(repo, finding)
        for suspect in finding.ruled_out:
            yield from _unshown(repo, suspect)


def _standing(finding: Finding) -> list[str]:
    """Records that a finding stands on. The one that shows the failure may be superseded by one
    without it.
    """
    shown = [finding.positive, *(suspect.evidence for suspect in finding.ruled_out)]
    records = [cited.partition("#")[0] for cited in shown if cited]
    return [r for r in records if r != finding.negative.partition("#")[0]]


def _difference(repo: Repo, finding: Finding) -> Iterator[str]:
    """Problems with the figure that must be better in the finding's positive record."""
    cited = [c for c in (finding.negative, finding.positive) if c]
    figures = [_figure(repo, c, finding.metric) for c in cited]
    for record, figure in zip(cited, figures):
        if figure is None:
            yield f"{record} has no metric {finding.metric}"
            return
    if not finding.positive:
        return
    metrics = (repo.accepted[c.partition("#")[0]].metrics[finding.metric] for c in cited)
    stated = {metric.better for metric in metrics} - {"neither"}
    ways = sorted(stated | ({finding.better} if finding.better else set()))
    if len(ways) != 1:
        named = f"is {' and '.join(ways)}" if ways else "is not stated to be lower or higher"
        records = " and ".join(sorted(stated)) or "nothing"
        yield (
            f"the better {finding.metric} {named}: its records state {records}, the finding "
            f"{finding.better or 'nothing'}"
        )
    elif not _is_better(figures[1], figures[0], ways[0]):
        yield (
            f"{finding.metric} is {figures[0]} in its negative record and {figures[1]} in its "
            f"positive one, where {ways[0]} is better"
        )


def _is_better(after: float, before: float, way: str) -> bool:
    """Any number is better than NaN, the loss of a run that diverged."""
    if math.isnan(after) or math.isnan(before):
        return math.isnan(before) and not math.isnan(after)
    return after < before if way == "lower" else after > before


def _figure(repo: Repo, cited: str, metric: str) -> float | None:
    """A metric of a record; None if the record lacks it."""
    return number(repo.accepted[cited.partition("#")[0]], metric)


def _unshown(repo: Repo, suspect: RuledOut) -> Iterator[str]:
    """Why a record, or the link of its chain, does not eliminate a suspected cause."""
    record, _, link = suspect.evidence.partition("#")
    claim = f"{suspect.evidence} does not eliminate that {suspect.hypothesis}"
    if not link:
        held = _figure(repo, record, suspect.metric)
        if held != suspect.value:
            yield f"{claim}: its {suspect.metric} is {held}, not {suspect.value:g}"
        return
    found = [x for x in repo.series(repo.accepted.get(record), CHAIN) if x.get("id") == link]
    eliminated = [x.get("hypothesis") for x in found if x.get("verdict") == "eliminated"]
    if not found:
        yield f"{claim}: its chain holds no such link"
    elif not eliminated:
        yield f"{claim}: the link's verdict is {found[0].get('verdict')}"
    elif eliminated[0] != suspect.hypothesis:
        yield f"{claim}: the link's hypothesis is that {eliminated[0]}"

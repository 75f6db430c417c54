"""Rules about findings: what was wrong, why, and the records that show it."""

import math

from stackproof.spec.findings import FILE, Finding, RuledOut
from stackproof.spec.records import Metric
from tools.integrity.core import Repo, rule
from tools.integrity.evidence_rules import number
from tools.integrity.foreign import Found

PATH = f"evidence/{FILE}"
CHAIN = "chain.jsonl"


@rule(
    "FINDING-SHOWN",
    title="A finding's records show the failure, its cure, and what was ruled out",
    why="A cause that no record shows is a story; so is a suspect that nobody eliminated.",
    hint="add the record that shows it, or correct the finding",
)
def finding_shown(repo: Repo) -> Found:
    seen: set[str] = set()
    for finding in repo.findings:
        if finding.id in seen:
            yield PATH, 0, f"{finding.id} is there twice"
        seen.add(finding.id)
        for message in (*_names(repo, finding), *_records(repo, finding)):
            yield PATH, 0, f"{finding.id}: {message}"


def _names(repo: Repo, finding: Finding) -> list[str]:
    """What is wrong with the gates, the falsifier and the fix that a finding names."""
    wrong = [f"there is no gate {gate}" for gate in finding.gates if gate not in repo.spec.gates]
    path, test, name = finding.falsifier.partition("::")
    if test and (
        (repo.root / path).is_file() is False
        or name.partition("[")[0] not in repo.python_functions(path)
    ):
        wrong.append(f"there is no test {finding.falsifier}")
    if not test and finding.falsifier not in repo.plants:
        wrong.append(f"there is no plant {finding.falsifier}")
    if finding.fix is not None and finding.fix not in repo.ancestors:
        wrong.append(f"its fix {finding.fix[:12]} is not an ancestor of HEAD")
    return wrong


def _records(repo: Repo, finding: Finding) -> list[str]:
    """What is wrong with the records that a finding cites."""
    known = {e.record for e in repo.entries}
    cited = [
        finding.negative,
        *([finding.positive] if finding.positive else []),
        *(r.evidence for r in finding.ruled_out),
    ]
    records = [c.partition("#")[0] for c in cited]
    if gone := [c for c, record in zip(cited, records) if record not in known]:
        return [f"{name} is not in the ledger" for name in gone]
    if changed := [record for record in dict.fromkeys(records) if record not in repo.accepted]:
        return [f"{name} is not the record that was accepted" for name in changed]
    return [
        *_difference(repo, finding),
        *filter(None, (_unshown(repo, r) for r in finding.ruled_out)),
    ]


def _difference(repo: Repo, finding: Finding) -> list[str]:
    """What is wrong with the figure that a finding says is better in its positive record."""
    before = _figure(repo, finding.negative, finding.metric)
    if before is None:
        return [f"{finding.negative} has no metric {finding.metric}"]
    if not finding.positive:
        return []
    after = _figure(repo, finding.positive, finding.metric)
    if after is None:
        return [f"{finding.positive} has no metric {finding.metric}"]
    stated = {
        _metric(repo, cited, finding.metric).better
        for cited in (finding.negative, finding.positive)
    } - {"neither"}
    ways = stated | ({finding.better} if finding.better else set())
    if len(ways) != 1:
        said = (
            f"is said to be better {' and '.join(sorted(ways))}"
            if ways
            else "is not said to be better lower or higher"
        )
        records = " and ".join(sorted(stated)) or "nothing"
        return [
            (
                f"{finding.metric} {said}: its records say {records}, the finding "
                f"{finding.better or 'nothing'}"
            )
        ]
    (way,) = ways
    said = (
        f"{finding.metric} is {before} in its negative record and {after} in its positive one, "
        f"where {way} is better"
    )
    return [] if _is_better(after, before, way) else [said]


def _is_better(after: float, before: float, way: str) -> bool:
    """Any number is better than none, as after a run whose loss was NaN."""
    if math.isnan(after) or math.isnan(before):
        return math.isnan(before) and not math.isnan(after)
    return after < before if way == "lower" else after > before


def _metric(repo: Repo, cited: str, metric: str) -> Metric | None:
    return repo.accepted[cited.partition("#")[0]].metrics.get(metric)


def _figure(repo: Repo, cited: str, metric: str) -> float | None:
    """A figure of a record; None if it does not state it, or it is no number."""
    try:
        return number(repo.accepted[cited.partition("#")[0]], metric)
    except ValueError:
        return None


def _unshown(repo: Repo, suspect: RuledOut) -> str:
    """Why a record, or the link of its chain, does not eliminate a suspicion, or nothing."""
    record, _, link = suspect.evidence.partition("#")
    says = f"{suspect.evidence} does not eliminate that {suspect.hypothesis}"
    if not link:
        held = _figure(repo, record, suspect.metric)
        return (
            ""
            if held == suspect.value
            else f"{says}: its {suspect.metric} is {held}, not {suspect.value:g}"
        )
    found = [x for x in repo.series(record, CHAIN) if x.get("id") == link]
    if not any(x.get("verdict") == "eliminated" for x in found):
        return (
            f"{says}: its chain holds no such link"
            if not found
            else f"{says}: the link's verdict is {found[0].get('verdict')}"
        )
    said = next(x.get("hypothesis") for x in found if x.get("verdict") == "eliminated")
    return "" if said == suspect.hypothesis else f"{says}: the link's hypothesis is that {said}"

"""Rules about findings: what was wrong, why, and the records that show it."""

from spec.findings import FILE, Finding
from spec.records import Record
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
    if test and ((repo.root / path).is_file() is False or name.partition("[")[0] not in repo.python_functions(path)):
        wrong.append(f"there is no test {finding.falsifier}")
    if not test and finding.falsifier not in repo.plants:
        wrong.append(f"there is no plant {finding.falsifier}")
    if finding.fix is not None and finding.fix not in repo.ancestors:
        wrong.append(f"its fix {finding.fix[:12]} is not an ancestor of HEAD")
    return wrong


def _records(repo: Repo, finding: Finding) -> list[str]:
    """What is wrong with the records that a finding cites."""
    known = {e.record for e in repo.entries}
    cited = [finding.negative, *([finding.positive] if finding.positive else []), *(r.evidence for r in finding.ruled_out)]
    if gone := [c for c in cited if c.partition("#")[0] not in known]:
        return [f"{name} is not in the ledger" for name in gone]
    wrong = [f"{r.evidence} does not eliminate that {r.hypothesis}" for r in finding.ruled_out if not _eliminated(repo, r.evidence)]
    before = _figure(repo, finding.negative, finding.metric)
    after = _figure(repo, finding.positive, finding.metric) if finding.positive else None
    if before is None:
        wrong.append(f"{finding.negative} has no metric {finding.metric}")
    elif finding.positive and (after is None or after == before):
        wrong.append(f"{finding.metric} is {before} in its negative record and {after} in its positive one")
    return wrong


def _figure(repo: Repo, cited: str, metric: str) -> float | None:
    record: Record | None = repo.accepted.get(cited.partition("#")[0])
    return None if record is None else number(record, metric)


def _eliminated(repo: Repo, cited: str) -> bool:
    """Whether a record is there, or the link of its chain is, and was eliminated."""
    record, _, link = cited.partition("#")
    if not link:
        return True
    return any(x["id"] == link and x["verdict"] == "eliminated" for x in repo.series(record, CHAIN))

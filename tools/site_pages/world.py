"""Everything the pages are written from, read once per build."""

import datetime as dt
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stackproof.spec.archive import Archived
from stackproof.spec.canonical import parse_strict
from stackproof.spec.coverage import GateState, coverage
from stackproof.spec.errors import IntegrityError
from stackproof.spec.findings import FILE as FINDINGS
from stackproof.spec.findings import Finding, read_findings
from stackproof.spec.gates import Spec, load_spec
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import GateResult, Kill, Record
from stackproof.spec.registry import Release, read_registry
from tools.site_pages.exhibits import Exhibit, read_exhibits


@dataclass(frozen=True)
class World:
    """A repository and its ledger at build time.

    `superseded` maps an old record's id to the one that replaced it; `unread` are archived records
    that the build cannot read for want of history.
    """

    root: Path
    ledger: Ledger
    spec: Spec
    records: dict[str, Record]
    superseded: dict[str, str]
    unread: list[Archived]
    states: dict[str, GateState]
    plants: dict[str, Exhibit]
    releases: list[Release]
    findings: list[Finding]
    cli: dict | None
    commit: str
    clean: bool | None
    built: dt.datetime

    @property
    def live(self) -> list[Record]:
        """Accepted records that nothing supersedes, in ledger order."""
        return [r for r in self.records.values() if r.id not in self.superseded]

    def record(self, record_id: str) -> Record:
        """An accepted record. Raises IntegrityError if the ledger does not hold it."""
        if record_id not in self.records:
            raise IntegrityError(
                f"the ledger holds no record {record_id}",
                next_step="stack evidence add DIR, or correct the reference",
            )
        return self.records[record_id]

    def results_of(self, gate_id: str) -> list[tuple[Record, GateResult]]:
        """Every run that held a gate, newest last."""
        return [(r, g) for r in self.live for g in r.gates if g.id == gate_id]

    def kills_of(
        self, *, gate: str | None = None, plant: str | None = None
    ) -> list[tuple[Record, Kill]]:
        """Every kill of a gate or a plant, newest last."""
        kills = [(r, k) for r in self.live for k in r.kills]
        return [(r, k) for r, k in kills if gate in (None, k.gate) and plant in (None, k.plant)]

    def series(self, record: Record, name: str, *keys: str) -> list[dict]:
        """Lines of a JSON-lines file beside a record, checked against its hash;
        empty if the record names no such file.

        Raises IntegrityError if the file is missing or changed, or a line lacks one of `keys`.
        """
        declared = next((s for s in record.series if s.path == name), None)
        if declared is None:
            return []
        path = self.ledger.record_path(record.id).with_name(name)
        data = self.ledger.series(record, declared)
        lines = [parse_strict(x, origin=str(path)) for x in data.splitlines() if x.strip()]
        for number, line in enumerate(lines, start=1):
            if missing := [k for k in keys if k not in line]:
                raise IntegrityError(
                    f"{path}:{number} lacks {', '.join(missing)}",
                    allowed=f"every line has {', '.join(keys)}",
                )
        return lines


def load_world(root: Path, evidence: Path) -> World:
    """Read spec, ledger, registry, museum and command line of a repository.
    Raises IntegrityError on any contradiction.
    """
    spec = load_spec(root)
    ledger = Ledger(evidence)
    if problems := ledger.problems():
        raise IntegrityError(f"{ledger.path}:{problems[0][0]}: {problems[0][1]}")
    built = _build_time()
    commit, clean = _git_state(root)
    cli, findings = root / "spec" / "cli.json", read_findings(evidence / FINDINGS)
    return World(
        root=root,
        ledger=ledger,
        spec=spec,
        records=ledger.accepted(),
        superseded={e.supersedes: e.record for e in ledger.entries() if e.supersedes},
        unread=[ledger.archive.by_record[name] for name in ledger.unread()],
        states=coverage(spec, ledger.records(), built.date(), findings),
        plants=read_exhibits(root),
        releases=read_registry(evidence / "registry.toml"),
        findings=findings,
        cli=json.loads(cli.read_text("utf-8")) if cli.is_file() else None,
        commit=commit,
        clean=clean,
        built=built,
    )


def _build_time() -> dt.datetime:
    """Now, or SOURCE_DATE_EPOCH, so that the same tree can give the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return dt.datetime.fromtimestamp(int(epoch), dt.UTC) if epoch else dt.datetime.now(dt.UTC)


def _git_state(root: Path) -> tuple[str, bool | None]:
    """Commit and cleanliness; (`unknown`, None) outside a checkout or before the first commit."""
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown", None
    if head.returncode or status.returncode:
        return "unknown", None
    return head.stdout.strip(), not status.stdout.strip()

"""The data of all pages, read once per build."""

import datetime as dt
import os
from dataclasses import dataclass
from pathlib import Path

from stackproof.spec.archive import Archived
from stackproof.spec.coverage import GateState, coverage
from stackproof.spec.errors import IntegrityError
from stackproof.spec.failures import Catalogue, load_catalogue
from stackproof.spec.findings import FILE as FINDINGS
from stackproof.spec.findings import Finding, read_findings
from stackproof.spec.gates import Gate, Spec, load_spec
from stackproof.spec.git import run_git
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import GateResult, Kill, Record
from stackproof.spec.registry import Release, read_registry
from stackproof.spec.series import parse_series
from tools.exhibits import Exhibit, read_exhibits


@dataclass(frozen=True)
class World:
    """A repository and its ledger at build time.

    `superseded` maps an old record's id to the one that replaced it. `unread` are archived records
    that are not in the git history of the checkout.
    """

    root: Path
    ledger: Ledger
    spec: Spec
    catalogue: Catalogue
    records: dict[str, Record]
    superseded: dict[str, str]
    unread: list[Archived]
    states: dict[str, GateState]
    plants: dict[str, Exhibit]
    releases: list[Release]
    findings: list[Finding]
    commit: str
    clean: bool | None
    built: dt.datetime

    @property
    def live(self) -> list[Record]:
        """Accepted records that no other one supersedes, in ledger order."""
        return [r for r in self.records.values() if r.id not in self.superseded]

    def record(self, record_id: str) -> Record:
        """An accepted record. Raises IntegrityError if the ledger lacks it."""
        if record_id not in self.records:
            raise IntegrityError(
                f"the ledger holds no record {record_id}",
                next_step="stack evidence add DIR, or correct the reference",
            )
        return self.records[record_id]

    def gates(self, subsystem: str) -> list[Gate]:
        """The gates of a subsystem."""
        return [g for g in self.spec.gates.values() if g.subsystem == subsystem]

    def results_of(self, gate_id: str) -> list[tuple[Record, GateResult]]:
        """Every result of a gate with its run, newest last."""
        return [(r, g) for r in self.live for g in r.gates if g.id == gate_id]

    def kills_of(self, gate: str | None = None) -> list[tuple[Record, Kill]]:
        """Every kill of a gate, or of all, newest last."""
        return [(r, k) for r in self.live for k in r.kills if gate in (None, k.gate)]

    def is_current(self, gate_id: str, fingerprint: str) -> bool:
        """Whether a fingerprint is that of the gate as the spec defines it."""
        return gate_id in self.spec.gates and fingerprint in self.spec.fingerprints(gate_id)

    def series(self, record: Record, name: str, *keys: str) -> list[dict]:
        """Lines of a JSON-lines file beside a record; empty if the record names no such file, or
        if the file is archived and the checkout lacks the history.

        Raises IntegrityError if the file does not match its hash, or if a line lacks one of `keys`
        or has one of another type.
        """
        declared = next((s for s in record.series if s.path == name), None)
        if declared is None or (record.id, name) in self.ledger.unread_series():
            return []
        path = self.ledger.record_path(record.id).with_name(name)
        data = self.ledger.series(record, declared)
        lines = parse_series(data, name, origin=str(path))
        for number, line in enumerate(lines, start=1):
            if missing := [k for k in keys if k not in line]:
                raise IntegrityError(
                    f"{path}:{number} lacks {', '.join(missing)}",
                    allowed=f"every line has {', '.join(keys)}",
                )
        return lines


def load_world(root: Path, evidence: Path) -> World:
    """Read spec, ledger, registry and museum of a repository.
    Raises IntegrityError if they contradict each other.
    """
    spec = load_spec(root)
    ledger = Ledger(evidence)
    if problems := ledger.problems():
        raise IntegrityError(f"{ledger.path}:{problems[0][0]}: {problems[0][1]}")
    built = _build_time()
    head, changes = run_git(root, "rev-parse", "HEAD"), run_git(root, "status", "--porcelain")
    findings = read_findings(evidence / FINDINGS)
    return World(
        root=root,
        ledger=ledger,
        spec=spec,
        catalogue=load_catalogue(root),
        records=dict(ledger.accepted()),
        superseded={e.supersedes: e.record for e in ledger.entries() if e.supersedes},
        unread=[ledger.archive.by_record[name] for name in ledger.unread()],
        states=coverage(spec, ledger.records(), built.date(), findings),
        plants=read_exhibits(root),
        releases=read_registry(evidence / "registry.toml"),
        findings=findings,
        commit=head.decode().strip() if head else "unknown",
        clean=not changes if head and changes is not None else None,
        built=built,
    )


def _build_time() -> dt.datetime:
    """Now, or SOURCE_DATE_EPOCH for a reproducible build."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return dt.datetime.fromtimestamp(int(epoch), dt.UTC) if epoch else dt.datetime.now(dt.UTC)

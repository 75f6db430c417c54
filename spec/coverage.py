"""The state of every gate, computed from the ledger.
This module is the only source of the states proven and discharged.
"""

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from stackproof.spec.findings import Finding, bypassed
from stackproof.spec.gates import Spec
from stackproof.spec.records import GateResult, Record

State = Literal["unproven", "proven", "discharged", "stale", "failed", "waived"]
STATES: tuple[State, ...] = ("unproven", "proven", "discharged", "stale", "failed", "waived")


class GateState(NamedTuple):
    """State of a gate, its reason, and the records that support it."""

    state: State
    reason: str
    kill_records: tuple[str, ...] = ()
    run_records: tuple[str, ...] = ()


def _may_discharge(record: Record) -> bool:
    return (
        record.succeeded
        and record.compute == "real"
        and not record.code.dirty
        and record.code.commit != "unknown"
    )


@dataclass
class _Seen:
    """What the records so far hold about one gate."""

    current: frozenset[str]
    killed: dict[str, str] = field(default_factory=dict)  # plant to record
    missed: dict[str, str] = field(default_factory=dict)  # plant to why, of its newest proof
    newest_kills: dict[str, str] = field(default_factory=dict)  # plant to fingerprint
    newest_plants: dict[str, str] = field(default_factory=dict)  # plant to its sha256
    has_old_kills: bool = False
    has_old_runs: bool = False
    last: tuple[str, GateResult] | None = None
    passing: list[str] = field(default_factory=list)


class Coverage:
    """The state of gates from records that are added one by one, in ledger order; no record is
    kept.

    proven: every plant of the gate was killed, with a green control, at the current fingerprint.
    discharged: proven, and the latest real, clean, finished run that held the gate passed it at the
    current fingerprint. Only runs of the kinds that the gate names count.
    failed: the latest run is red, or the latest proof missed a plant.
    """

    def __init__(self, spec: Spec, gate_ids: Iterable[str] | None = None):
        self.spec = spec
        chosen = spec.gates if gate_ids is None else gate_ids
        self._seen = {gate_id: _Seen(spec.fingerprints(gate_id)) for gate_id in chosen}

    def add(self, record: Record) -> None:
        """Count the kills and verdicts of the next record."""
        for kill in record.kills if record.kind == "falsification" else ():
            if (seen := self._seen.get(kill.gate)) is None:
                continue
            seen.newest_kills[kill.plant] = kill.fingerprint
            seen.newest_plants[kill.plant] = kill.plant_sha256
            if kill.fingerprint not in seen.current:
                seen.has_old_kills = True
            elif kill.outcome == "killed" and kill.control == "pass" and not record.code.dirty:
                seen.killed[kill.plant] = record.id
                seen.missed.pop(kill.plant, None)
            else:
                seen.killed.pop(kill.plant, None)
                if kill.outcome == "missed" or kill.control == "fail":
                    how = f"the plant was {kill.outcome}, the control was {kill.control}"
                    seen.missed[kill.plant] = f"record {record.id}: {how}"
        may_discharge = _may_discharge(record)
        for result in record.gates:
            if (seen := self._seen.get(result.id)) is None or result.verdict == "not_run":
                continue
            if record.kind not in self.spec.gates[result.id].kinds:
                continue
            if result.fingerprint not in seen.current:
                seen.has_old_runs = True
                continue
            seen.last = (record.id, result)
            if result.verdict == "pass" and may_discharge:
                seen.passing.append(record.id)

    def newest_kills(self, gate_id: str) -> dict[str, str]:
        """Fingerprint of the newest kill of each plant of a gate."""
        return self._seen[gate_id].newest_kills

    def newest_plants(self, gate_id: str) -> dict[str, str]:
        """The sha256 of each plant of a gate in its newest kill."""
        return self._seen[gate_id].newest_plants

    def state(self, gate_id: str, today: dt.date | None = None) -> GateState:
        """State of one gate from the records so far."""
        gate, seen, today = self.spec.gates[gate_id], self._seen[gate_id], today or dt.date.today()
        kill_records = tuple(sorted(set(seen.killed.values())))
        if seen.last is not None and seen.last[1].verdict == "fail":
            return _failed(*seen.last, kill_records, today)
        if missed := [p for p in gate.plants if p in seen.missed]:
            return GateState("failed", f"{missed[0]}: {seen.missed[missed[0]]}", kill_records)
        missing = [p for p in gate.plants if p not in seen.killed]
        if not gate.plants or missing:
            if seen.has_old_kills and not seen.killed:
                return GateState("stale", "its kills are of an older fingerprint", kill_records)
            return GateState(
                "unproven", f"no kill yet for {', '.join(missing) or 'any plant'}", kill_records
            )
        if passing := tuple(seen.passing):
            reason = f"{len(passing)} real run(s) pass it"
            return GateState("discharged", reason, kill_records, passing)
        if seen.has_old_runs:
            return GateState("stale", "its run record is of an older fingerprint", kill_records)
        return GateState("proven", "killed all its plants; no accepted real run yet", kill_records)

    def states(
        self, today: dt.date | None = None, findings: Sequence[Finding] = ()
    ) -> dict[str, GateState]:
        """State of every gate. A finding with `route_around` keeps its gates at `proven`, even if
        their runs pass.
        """
        states = {gate_id: self.state(gate_id, today) for gate_id in self._seen}
        for gate_id, finding in bypassed(findings).items():
            if gate_id in states and states[gate_id].state == "discharged":
                states[gate_id] = states[gate_id]._replace(
                    state="proven",
                    reason=f"finding {finding}: its cause was bypassed, not fixed",
                )
        return states


def _failed(
    record_id: str, result: GateResult, kill_records: tuple[str, ...], today: dt.date
) -> GateState:
    """The state of a gate whose latest run is red."""
    waiver = result.waiver
    if waiver and dt.date.fromisoformat(waiver.expires) >= today:
        reason = f"{waiver.reason} (until {waiver.expires})"
        return GateState("waived", reason, kill_records, (record_id,))
    reason = f"record {record_id}: {result.message}"
    return GateState("failed", reason, kill_records, (record_id,))


def gate_state(
    spec: Spec, gate_id: str, records: Mapping[str, Record], today: dt.date | None = None
) -> GateState:
    """State of one gate, from accepted records in ledger order."""
    return _of(spec, records, (gate_id,)).state(gate_id, today)


def coverage(
    spec: Spec,
    records: Mapping[str, Record],
    today: dt.date | None = None,
    findings: Sequence[Finding] = (),
) -> dict[str, GateState]:
    """State of every gate of the spec, from accepted records in ledger order; see Coverage."""
    return _of(spec, records).states(today, findings)


def _of(
    spec: Spec, records: Mapping[str, Record], gate_ids: Iterable[str] | None = None
) -> Coverage:
    made = Coverage(spec, gate_ids)
    for record in records.values():
        made.add(record)
    return made


def tally(states: dict[str, GateState]) -> dict[State, int]:
    """Number of gates by state. States without gates have 0."""
    counts = Counter(s.state for s in states.values())
    return {state: counts.get(state, 0) for state in STATES}

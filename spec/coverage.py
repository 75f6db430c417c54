"""The state of every gate, computed from the ledger.
This module is the only source of the states proven and discharged.
"""

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from stackproof.spec.findings import Finding, bypassed
from stackproof.spec.gates import Spec
from stackproof.spec.records import Record

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


def gate_state(
    spec: Spec, gate_id: str, records: dict[str, Record], today: dt.date | None = None
) -> GateState:
    """State of one gate, from accepted records in ledger order.

    proven: every plant of the gate was killed, with a green control, at the current fingerprint.
    discharged: proven, and the latest real, clean, finished run that held the gate passed it at the
    current fingerprint.
    """
    today = today or dt.date.today()
    gate, current = spec.gates[gate_id], spec.fingerprints(gate_id)
    killed: dict[str, str] = {}
    old_kills = False
    for record in records.values():
        for kill in record.kills:
            if kill.gate != gate_id:
                continue
            if kill.fingerprint not in current:
                old_kills = True
            elif kill.outcome == "killed" and kill.control == "pass" and not record.code.dirty:
                killed[kill.plant] = record.id
            else:
                killed.pop(kill.plant, None)
    runs = [
        (r, g)
        for r in records.values()
        for g in r.gates
        if g.id == gate_id and g.verdict != "not_run"
    ]
    fresh = [(r, g) for r, g in runs if g.fingerprint in current]
    kill_records = tuple(sorted(set(killed.values())))
    if fresh:
        record, result = fresh[-1]
        if result.verdict == "fail":
            if result.waiver and dt.date.fromisoformat(result.waiver.expires) >= today:
                return GateState(
                    "waived",
                    f"{result.waiver.reason} (until {result.waiver.expires})",
                    kill_records,
                    (record.id,),
                )
            return GateState(
                "failed", f"record {record.id}: {result.message}", kill_records, (record.id,)
            )
    missing = [p for p in gate.plants if p not in killed]
    if not gate.plants or missing:
        if old_kills and not killed:
            return GateState("stale", "its kills are of an older fingerprint", kill_records)
        return GateState(
            "unproven", f"no kill yet for {', '.join(missing) or 'any plant'}", kill_records
        )
    passing = tuple(r.id for r, g in fresh if g.verdict == "pass" and _may_discharge(r))
    if passing:
        return GateState("discharged", f"{len(passing)} real run(s) pass it", kill_records, passing)
    if any(g.fingerprint not in current for _, g in runs):
        return GateState("stale", "its run record is of an older fingerprint", kill_records)
    return GateState("proven", "killed all its plants; no accepted real run yet", kill_records)


def coverage(
    spec: Spec,
    records: dict[str, Record],
    today: dt.date | None = None,
    findings: Sequence[Finding] = (),
) -> dict[str, GateState]:
    """State of every gate of the spec.
    A finding with `route_around` keeps its gates at `proven`, even if their runs pass.
    """
    states = {gate_id: gate_state(spec, gate_id, records, today) for gate_id in spec.gates}
    for gate_id, finding in bypassed(findings).items():
        if gate_id in states and states[gate_id].state == "discharged":
            states[gate_id] = states[gate_id]._replace(
                state="proven", reason=f"finding {finding}: its cause was bypassed, not fixed"
            )
    return states


def tally(states: dict[str, GateState]) -> dict[State, int]:
    """Number of gates by state. States without gates have 0."""
    counts = Counter(s.state for s in states.values())
    return {state: counts.get(state, 0) for state in STATES}

"""Blocks of the home page: verdict line, gate matrix, last run, what no record covers.
And the machine-readable files.
"""

import json

from stackproof.spec.coverage import State, tally
from stackproof.spec.gates import SUBSYSTEMS
from stackproof.spec.records import Record
from tools.site_pages.markup import (
    LETTERS,
    MEANINGS,
    Page,
    bullets,
    chip,
    code,
    esc,
    ev,
    prose,
    short_hash,
    table,
)
from tools.site_pages.runs import HEADLINE, chart_of, headline
from tools.site_pages.world import World

READING_ORDER: tuple[State, ...] = ("discharged", "proven", "failed", "stale", "waived", "unproven")
REQUIRED_KINDS = ("falsification", "train", "evaluate", "resume", "rerun")


def verdict(world: World, page: Page) -> str:
    """Counts by state, each with its letter, with links to the failing gates; then commit,
    tree and build date.
    """
    counts = tally(world.states)
    cells = [
        f"{chip(s)} {counts[s]} {s}"
        for s in READING_ORDER
        if counts[s] or s in ("discharged", "failed")
    ]
    red = [
        page.gate(g) for g, s in world.states.items() if s.state in ("failed", "stale", "waived")
    ]
    tree = {True: "clean", False: "dirty", None: "unknown tree"}[world.clean]
    commit = short_hash(world.commit) if world.commit != "unknown" else "unknown"
    lines = [
        f"**{len(world.states)} gates**: {' · '.join(cells)}\n{{: .verdict }}",
        (
            f"Failed, stale or waived: {', '.join(red) or 'none'}. All states with their reasons: "
            f"{page.link('coverage', 'coverage.md')}."
        ),
        f"Spec {esc(world.spec.version)} · commit {commit} · {tree} · built "
        f"{world.built:%Y-%m-%d %H:%M} UTC · {len(world.live)} accepted records{_unread(world)}, "
        f"{page.link('all runs', 'runs/index.md')}",
    ]
    return "\n\n".join(lines)


def _unread(world: World) -> str:
    """How many records are archived and not in this build, if any."""
    return (
        f" and {len(world.unread)} archived ones that this build could not verify"
        if world.unread
        else ""
    )


def matrix(world: World, page: Page) -> str:
    """Gates by subsystem: moment, severity, state, latest record."""
    rows = []
    for subsystem in SUBSYSTEMS:
        gates = [g for g in world.spec.gates.values() if g.subsystem == subsystem]
        for i, gate in enumerate(gates):
            state = world.states[gate.id]
            room = f"**{subsystem}**" if i == 0 else ""
            name = page.link(f"{code(gate.id)}<br>{esc(gate.title)}", f"gates/{gate.id}.md")
            shown = page.link(chip(state.state), "coverage.md", f"{gate.id.replace('.', '-')}")
            rows.append(
                [room, name, gate.moment, gate.severity, shown, latest_record(world, page, gate.id)]
            )
    legend = " · ".join(f"{chip(s)} {s}: {MEANINGS[s]}" for s in READING_ORDER)
    return (
        table(["subsystem", "gate", "moment", "severity", "state", "latest record"], rows)
        + f"\n\n{legend}\n{{: .legend }}"
    )


def latest_record(world: World, page: Page, gate_id: str) -> str:
    """The newest accepted record that held the gate or killed one of its plants."""
    holding = [
        r
        for r in world.live
        if any(g.id == gate_id for g in r.gates) or any(k.gate == gate_id for k in r.kills)
    ]
    return page.run(holding[-1].id) if holding else "none"


def last_run(world: World, page: Page) -> str:
    """The newest training record as a card with its curve."""
    runs = [r for r in world.live if r.kind in ("train", "tune", "resume")]
    if not runs:
        return "No training record has been accepted yet."
    record = runs[-1]
    facts = (
        " · ".join(f"{code(n)} {ev(record, n)}" for n in headline(record))
        or f"no metric among {', '.join(HEADLINE)}"
    )
    return "\n\n".join(
        [
            (
                f"{page.run(record.id)} · {record.status}: {esc(record.end_reason)} · finished "
                f"{esc(record.finished_at)}"
            ),
            f"> {prose(record.claim)}",
            facts,
            chart_of(world, record),
        ]
    )


def uncovered(world: World, page: Page) -> str:
    """Gates without any record, kinds of records that are missing,
    and what the newest run says it does not cover.
    """
    silent = [g for g in world.spec.gates if latest_record(world, page, g) == "none"]
    kinds = [k for k in REQUIRED_KINDS if not any(r.kind == k for r in world.live)]
    items = []
    if kinds:
        items.append(f"Kinds of record not in the ledger: {', '.join(kinds)}.")
    if silent:
        items.append(
            f"Gates that no record speaks of ({len(silent)}): "
            f"{', '.join(page.gate(g) for g in silent)}."
        )
    runs: list[Record] = [r for r in world.live if r.kind in ("train", "tune", "resume")]
    items += [f"{prose(text)} ({page.run(r.id)})" for r in runs[-1:] for text in r.not_covered]
    return (
        bullets(items)
        if items
        else "Every gate has a record, and the newest run names nothing it leaves out."
    )


BLOCKS = {"verdict": verdict, "matrix": matrix, "last-run": last_run, "uncovered": uncovered}


def evidence_json(world: World) -> str:
    """States and records for machines."""
    return json.dumps(
        {
            "schema": "stackproof/site-evidence/1",
            "spec": {"version": world.spec.version, "sha256": world.spec.sha256},
            "commit": world.commit,
            "clean": world.clean,
            "built_at": f"{world.built:%Y-%m-%dT%H:%M:%SZ}",
            "counts": tally(world.states),
            "gates": {
                gate_id: {
                    "state": s.state,
                    "reason": s.reason,
                    "fingerprint": world.spec.fingerprint(gate_id),
                    "kill_records": s.kill_records,
                    "run_records": s.run_records,
                }
                for gate_id, s in world.states.items()
            },
            "not_verified": [a.record for a in world.unread],
            "records": [
                {
                    "id": r.id,
                    "kind": r.kind,
                    "status": r.status,
                    "sha256": r.sha256,
                    "superseded_by": world.superseded.get(r.id),
                }
                | {
                    "finished_at": r.finished_at,
                    "metrics": {n: m.model_dump() for n, m in r.metrics.items()},
                }
                for r in world.records.values()
            ],
        },
        indent=1,
        sort_keys=True,
    )


def badge_json(world: World) -> str:
    """Counts by letter for a badge; never a percentage."""
    counts = tally(world.states)
    message = (
        " · ".join(f"{LETTERS[s]} {counts[s]}" for s in READING_ORDER if counts[s]) or "no gates"
    )
    colour = (
        "red"
        if counts["failed"]
        else "yellow"
        if counts["stale"] or counts["waived"] or counts["unproven"]
        else "blue"
    )
    return json.dumps(
        {
            "schemaVersion": 1,
            "label": f"{len(world.states)} gates",
            "message": message,
            "color": colour,
        }
    )

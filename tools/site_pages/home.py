"""Blocks of the home page, and the machine-readable files."""

import json
from collections.abc import Callable

from markupsafe import Markup

from stackproof.spec.coverage import State, tally
from stackproof.spec.gates import SUBSYSTEMS
from stackproof.spec.records import Record
from tools.site_pages.markup import LETTERS
from tools.site_pages.mutants import trend
from tools.site_pages.render import render
from tools.site_pages.runs import HEADLINE, chart_of, headline
from tools.site_pages.world import World

READING_ORDER: tuple[State, ...] = ("discharged", "proven", "failed", "stale", "waived", "unproven")
REQUIRED_KINDS = ("falsification", "train", "evaluate", "resume", "rerun")
TREES = {True: "clean", False: "dirty", None: "unknown tree"}


def verdict(world: World, here: str) -> Markup:
    """Gates by state with links to the failing ones; commit, tree and build date."""
    counts = tally(world.states)
    shown = {s: counts[s] for s in READING_ORDER if counts[s] or s in ("discharged", "failed")}
    red = [g for g, s in world.states.items() if s.state in ("failed", "stale", "waived")]
    tree = TREES[world.clean]
    return render("home_verdict.md.j2", here, world=world, counts=shown, red=red, tree=tree)


def matrix(world: World, here: str) -> Markup:
    """Gates by subsystem: moment, severity, state, latest record."""
    gates = [g for subsystem in SUBSYSTEMS for g in world.gates(subsystem)]
    latest = _latest_records(world)
    shown = {"states": READING_ORDER, "latest": latest}
    return render("home_matrix.md.j2", here, world=world, gates=gates, **shown)


def _latest_records(world: World) -> dict[str, str]:
    """The newest accepted record that holds a gate or a kill by it, by gate."""
    return {
        gate: record.id
        for record in world.live
        for gate in (*(g.id for g in record.gates), *(k.gate for k in record.kills))
    }


def _runs(world: World) -> list[Record]:
    return [r for r in world.live if r.kind in ("train", "tune", "resume")]


def last_run(world: World, here: str) -> Markup:
    """The newest training record with its curve."""
    if not (runs := _runs(world)):
        return Markup("No training record has been accepted yet.")
    record, chart = runs[-1], chart_of(world, runs[-1])
    facts = {"headline": headline(record), "known": HEADLINE}
    return render("home_run.md.j2", here, record=record, chart=chart, **facts)


def uncovered(world: World, here: str) -> Markup:
    """Gates without a record, missing kinds of records, and the limits of the newest run."""
    latest = _latest_records(world)
    return render(
        "home_uncovered.md.j2",
        here,
        kinds=[k for k in REQUIRED_KINDS if not any(r.kind == k for r in world.live)],
        silent=[g for g in world.spec.gates if g not in latest],
        not_covered=[(text, r.id) for r in _runs(world)[-1:] for text in r.not_covered],
    )


BLOCKS: dict[str, Callable[[World, str], Markup]] = {
    "verdict": verdict,
    "matrix": matrix,
    "last-run": last_run,
    "uncovered": uncovered,
    "mutants": trend,
}


def evidence_json(world: World) -> str:
    """States and records for machines."""
    document = {
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
            r.model_dump(include={"id", "kind", "status", "finished_at", "metrics"})
            | {"sha256": r.sha256, "superseded_by": world.superseded.get(r.id)}
            for r in world.records.values()
        ],
    }
    return json.dumps(document, indent=1, sort_keys=True)


def badge_json(world: World) -> str:
    """Counts by letter for a badge; never a percentage."""
    counts = tally(world.states)
    letters = [f"{LETTERS[s]} {counts[s]}" for s in READING_ORDER if counts[s]]
    if counts["failed"]:
        colour = "red"
    elif counts["stale"] or counts["waived"] or counts["unproven"]:
        colour = "yellow"
    else:
        colour = "blue"
    document = {
        "schemaVersion": 1,
        "label": f"{len(world.states)} gates",
        "message": " · ".join(letters) or "no gates",
        "color": colour,
    }
    return json.dumps(document)

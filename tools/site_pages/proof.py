"""Pages of what the proof of the gates shows: which gates turn red on which plant, the margins of
limits, the latency of kills, and the documented failures.
"""

import math
from collections import Counter

from markupsafe import Markup

from stackproof.spec.failures import Catalogue, Failure, answering_gates
from stackproof.spec.margins import margins
from stackproof.spec.records import Kill
from tools.site_pages.render import Page, page, render
from tools.site_pages.world import World

MATRIX = "matrix.jsonl"
CLASSES = (
    "before step 1",
    "within 5 steps",
    "later in the run",
    "at checkpoint",
    "at evaluation",
    "at export",
)


def newest_kills(world: World) -> dict[str, Kill]:
    """The last kill of every plant by its own gate, at the gate's present fingerprint."""
    return {
        k.plant: k
        for _, k in world.kills_of()
        if world.is_current(k.gate, k.fingerprint) and k.plant in world.spec.gates[k.gate].plants
    }


def margins_page(world: World) -> Page:
    """Every limit with the distance to the clean stack and to its weakest plant."""
    found = margins(world.spec, newest_kills(world).values())
    rows = sorted(found, key=lambda m: min(m.room, m.reach))
    return page("margins.md", "Margins", "margins.md.j2", margins=rows, times=_times)


def _times(ratio: float, bound: float) -> str:
    """A ratio to a limit. At a limit of 0 it is infinite and the comparison exact."""
    return f"{ratio:.3g}×" if math.isfinite(ratio) else ("exact" if bound == 0 else "∞")


def matrix_page(world: World) -> Page:
    """The gates that turn red on each plant, from the newest record with a row of the plant."""
    rows, records = _newest_rows(world)
    first = {
        r["plant"]: min(r["red"], key=lambda g: r["red"][g]["seconds"], default=None) for r in rows
    }
    red = Counter(g for row in rows for g in row["red"])
    alone = Counter(next(iter(row["red"])) for row in rows if len(row["red"]) == 1)
    return page(
        "kill-matrix.md",
        "Kill matrix",
        "matrix.md.j2",
        rows=rows,
        records=records,
        n_plants=len(world.plants),
        seconds=sum(r["seconds"] for r in rows),
        first=first,
        gates=[(g, n, alone[g], list(first.values()).count(g)) for g, n in red.most_common()],
    )


def _newest_rows(world: World) -> tuple[list[dict], list[str]]:
    """The newest row of every plant, and the ids of its records: one matrix may be in several."""
    rows: dict[str, dict] = {}
    records = []
    keys = ("plant", "gate", "red", "raised", "asked", "seconds")
    for record in reversed(world.live):
        found = world.series(record, MATRIX, *keys)
        new = {row["plant"]: row for row in found if row["plant"] not in rows}
        rows |= new
        records += [record.id] if new else []
    return sorted(rows.values(), key=lambda row: (row["gate"], row["plant"])), records


def latency_class(kill: Kill) -> str | None:
    """The class of a kill's latency; None for older records, which lack it."""
    if kill.latency_steps is not None and kill.moment == "within k steps":
        return "within 5 steps" if kill.latency_steps <= 5 else "later in the run"
    return kill.moment if kill.moment in CLASSES else None


def latency_histogram(world: World) -> Markup:
    """The latencies of the newest kills as bars; empty if no record has them."""
    killed = (k for k in newest_kills(world).values() if k.outcome == "killed")
    counts = Counter(c for k in killed if (c := latency_class(k)))
    shown = {name: counts[name] for name in CLASSES}
    return render("latency.svg.j2", counts=shown) if counts else Markup()


def failures_page(world: World) -> Page:
    """Every documented failure with its state and its plants, rules and tests."""
    kills, failures = newest_kills(world), world.catalogue.failures.values()
    states = {f.id: failure_state(world.catalogue, f, kills) for f in failures}
    return page(
        "failures.md",
        "Known failures",
        "failures.md.j2",
        world=world,
        states=states,
        counts=[
            (state, n, sum(len(f.plants) for f in failures if states[f.id] == state))
            for state, n in sorted(Counter(states.values()).items())
        ],
        subsystems=list(dict.fromkeys(f.subsystem for f in failures)),
        answering={f.id: answering_gates(world.spec, f) for f in failures},
    )


def symptoms_page(world: World) -> Page:
    """The symptoms of the documented failures."""
    failures = sorted(world.catalogue.failures.values(), key=lambda f: f.symptom.lower())
    rows = [(f, answering_gates(world.spec, f)) for f in failures]
    return page("symptoms.md", "By symptom", "symptoms.md.j2", rows=rows)


def failure_state(catalogue: Catalogue, failure: Failure, kills: dict[str, Kill]) -> str:
    """`awaiting`; `killed` if all its plants were, at the present fingerprints, else `planted`;
    without plants `held by rules and tests`.
    """
    if catalogue.awaits(failure):
        return "awaiting"
    if not failure.plants:
        return "held by rules and tests"
    found = [kills.get(p) for p in failure.plants]
    done = all(k and k.outcome == "killed" and k.control == "pass" for k in found)
    return "killed" if done else "planted"

"""Pages of what the proof of the gates shows: who sees what, how far limits stand, how late bugs
are seen, which failures are known.
"""

import html
import math
from collections import Counter

from stackproof.spec.failures import Catalogue, Failure, answering_gates, load_catalogue
from stackproof.spec.margins import margins
from stackproof.spec.records import Kill
from tools.site_pages.markup import Page, bullets, code, esc, number, source_link, table
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
    """The last kill of every plant under its own gate, of the gate as it is now."""
    found = {}
    for _, kill in world.kills_of():
        gate = world.spec.gates.get(kill.gate)
        if (
            gate
            and kill.plant in gate.plants
            and kill.fingerprint in world.spec.fingerprints(kill.gate)
        ):
            found[kill.plant] = kill
    return found


def _times(ratio: float, bound: float) -> str:
    """A ratio; beside a limit of 0 there is none, and nothing is as far as one pleases from 0."""
    return f"{ratio:.3g}×" if math.isfinite(ratio) else ("exact" if bound == 0 else "∞")


def margins_page(world: World) -> Page:
    """Every limit between the clean stack and its weakest plant."""
    page = Page("margins.md", "Margins")
    page.add(
        "Every limit stands between two worlds. **Room** is how many times as far the limit is as "
        "the worst that the clean stack measured; **reach** how many times beyond it the weakest "
        "plant lies that it caught. A limit with little room gives false alarms, one with little "
        "reach lets small bugs pass. Left out are limits for which a check reports no number, and "
        "those that only count together with another one, which the clean stack may go past.",
    )
    found = margins(world.spec, newest_kills(world).values())
    if not found:
        return page.add(
            "No accepted record holds kills with their controls' measurements yet: `stack gates "
            "prove`, then `stack evidence add`."
        )
    rows = [
        [
            page.gate(m.gate),
            code(m.limit),
            f"{m.direction.replace('-', ' ')} {m.bound:g}",
            number(m.clean),
            _times(m.room, m.bound),
            f"{number(m.value)} {page.plant(m.weakest)}",
            _times(m.reach, m.bound),
            str(m.plants),
        ]
        for m in sorted(found, key=lambda m: min(m.room, m.reach))
    ]
    return page.add(
        table(
            ["gate", "limit", "bound", "clean, worst", "room", "weakest plant", "reach", "plants"],
            rows,
        )
    )


def matrix_page(world: World) -> Page:
    """Which gates turn red on which plant, of each plant from the newest
    record whose matrix has it.
    """
    page = Page("kill-matrix.md", "Kill matrix")
    page.add(
        "Every plant meets every gate that applies, not only its own. What turns red besides, and "
        "what sees it at the least cost."
    )
    rows, records = _newest_rows(world)
    if not rows:
        return page.add(
            "No accepted record holds a matrix yet: `stack gates prove --matrix`, then `stack "
            "evidence add`."
        )
    seconds = number(sum(r["seconds"] for r in rows))
    page.add(
        f"{len(rows)} of {len(world.plants)} plants, {seconds} s; from "
        f"{', '.join(map(page.run, records))}."
    )
    body = []
    for row in rows:
        others = [g for g in row["red"] if g != row["gate"]]
        cheapest = min(row["red"], key=lambda g, row=row: row["red"][g]["seconds"], default=None)
        seconds = (
            f"{page.gate(cheapest)} {row['red'][cheapest]['seconds']:.3g} s" if cheapest else "–"
        )
        raised = f"<br>raised: {esc(', '.join(row['raised']))}" if row["raised"] else ""
        own = page.gate(row["gate"]) + ("" if row["gate"] in row["red"] else " **not red here**")
        body.append(
            [
                page.plant(row["plant"]),
                own,
                "<br>".join(map(page.gate, others)) + raised or "none",
                seconds,
                str(row["asked"]),
            ]
        )
    page.add(
        "## Plants",
        table(["plant", "its gate", "also red", "seen at the least cost", "asked"], body),
    )
    return page.add("## Gates", _by_gate(page, rows))


def _newest_rows(world: World) -> tuple[list[dict], list[str]]:
    """The newest row of every plant, and the ids of the records they are from.
    A matrix may be made in parts, by gates.
    """
    rows: dict[str, dict] = {}
    records = []
    for record in reversed(world.live):
        found = (
            world.series(record, MATRIX, "plant", "gate", "red", "raised", "asked", "seconds") or []
        )
        new = [row for row in found if row["plant"] not in rows]
        rows |= {row["plant"]: row for row in new}
        records += [record.id] if new else []
    return sorted(rows.values(), key=lambda row: (row["gate"], row["plant"])), records


def _by_gate(page: Page, rows: list[dict]) -> str:
    red = Counter(g for row in rows for g in row["red"])
    alone = Counter(next(iter(row["red"])) for row in rows if len(row["red"]) == 1)
    first = Counter(
        min(row["red"], key=lambda g, row=row: row["red"][g]["seconds"])
        for row in rows
        if row["red"]
    )
    body = [
        [page.gate(g), str(n), str(alone[g]), str(first[g])]
        for g, n in sorted(red.items(), key=lambda item: -item[1])
    ]
    return table(
        ["gate", "plants it is red on", "plants only it sees", "plants it sees at the least cost"],
        body,
    )


def latency_class(kill: Kill) -> str | None:
    """In which of the classes a kill came; None for records of before this was written."""
    if kill.latency_steps is not None and kill.moment == "within k steps":
        return "within 5 steps" if kill.latency_steps <= 5 else "later in the run"
    return kill.moment if kill.moment in CLASSES else None


def latency_histogram(world: World) -> str:
    """How late the newest kills came, as bars with their numbers; empty if none says so."""
    counts = Counter(
        c for k in newest_kills(world).values() if k.outcome == "killed" and (c := latency_class(k))
    )
    if not counts:
        return ""
    most, height = max(counts.values()), 24
    bars = []
    for i, name in enumerate(CLASSES):
        width, y = 480 * counts[name] / most, 6 + i * height
        bars.append(
            f'<text x="130" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="140" y="{y}" width="{width:.0f}" height="16" fill="var(--series-0)"/>'
            f'<text x="{148 + width:.0f}" y="{y + 13}">{counts[name]}</text>'
        )
    label = "Kills by how late they came: " + ", ".join(
        f"{name} {counts[name]}" for name in CLASSES
    )
    return "\n".join(
        [
            '<figure class="chart">',
            (
                f'<svg viewBox="0 0 720 {len(CLASSES) * height + 12}" role="img" '
                f'aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
            ),
            *bars,
            "</svg>",
            (
                "<figcaption>Steps are counted from the first in which the planted line "
                "ran.</figcaption>"
            ),
            "</figure>",
        ]
    )


def failures_page(world: World) -> Page:
    """Every documented failure: what stands for it, and whether it was killed, awaits a part of the
    stack or is held another way.
    """
    page, catalogue = Page("failures.md", "Known failures"), load_catalogue(world.root)
    kills = newest_kills(world)
    states = {f.id: failure_state(catalogue, f, kills) for f in catalogue.failures.values()}
    counts = Counter(states.values())
    page.add(
        f"{len(states)} failures of language-model training that other people have documented. "
        "What could happen here has been planted: a gate, a rule of integrity or a test turns red "
        "on it. What belongs to a part that is not built yet is awaiting, and never counts as "
        "killed.",
        table(["state", "failures"], [[state, str(n)] for state, n in sorted(counts.items())]),
    )
    if not catalogue.failures:
        return page
    for subsystem in dict.fromkeys(f.subsystem for f in catalogue.failures.values()):
        page.add(f"## {subsystem}")
        page.add(
            *(
                block
                for f in catalogue.failures.values()
                if f.subsystem == subsystem
                for block in _failure(world, page, f, states[f.id])
            )
        )
    return page


def symptoms_page(world: World) -> Page:
    """What a person may see, and which documented failures look like that."""
    page, catalogue = Page("symptoms.md", "By symptom"), load_catalogue(world.root)
    page.add(
        "What you may see in a run that went wrong, if you see anything, and what has looked like "
        "that before."
    )
    body = [
        [
            esc(f.symptom),
            page.link(esc(f.name), "failures.md", f.id.lower()),
            "<br>".join(map(page.gate, answering_gates(world.spec, f))) or "–",
        ]
        for f in sorted(catalogue.failures.values(), key=lambda f: f.symptom.lower())
    ]
    return page.add(table(["what you see", "what it has been", "which gates ask"], body))


def failure_state(catalogue: Catalogue, failure: Failure, kills: dict[str, Kill]) -> str:
    """killed: every plant of it, at the present fingerprint; awaiting; held by a rule or a test;
    else planted.
    """
    if catalogue.awaits(failure):
        return "awaiting"
    if failure.plants:
        done = all(
            p in kills and kills[p].outcome == "killed" and kills[p].control == "pass"
            for p in failure.plants
        )
        return "killed" if done else "planted"
    return "held by rules and tests"


def _failure(world: World, page: Page, failure: Failure, state: str) -> list[str]:
    due = f"within {failure.steps} steps" if failure.steps else failure.latency
    gates = [page.gate(g) for g in answering_gates(world.spec, failure)]
    stands = [
        page.plant(p) if p in world.plants else f"{code(p)} (not built)" for p in failure.plants
    ]
    stands += [f"rule {code(r)}" for r in failure.rules] + [code(t) for t in failure.tests]
    facts = [
        f"{esc(failure.mechanism)}",
        f"what you see: {esc(failure.symptom)}",
        f"state **{state}**"
        + (f", for want of {esc(failure.awaiting)}" if state == "awaiting" else ""),
        f"seen {due} at the latest; severity {failure.severity} of 5",
        *([f"stands for it: {', '.join(stands)}"] if stands else []),
        *([f"answered by {', '.join(gates)}"] if gates else []),
        "sources: " + ", ".join(source_link(s) for s in failure.sources),
    ]
    return [
        f"### {esc(failure.name)} {{ #{failure.id.lower()} }}",
        f"{code(failure.id)}",
        bullets(facts),
    ]


def failures_of(world: World, page: Page, plant_id: str) -> str:
    """Documented failures a plant realises, as links with their mechanism."""
    found = load_catalogue(world.root).of_plant(plant_id)
    return "<br>".join(
        f"{page.link(esc(f.name), 'failures.md', f.id.lower())}: {esc(f.mechanism)}" for f in found
    )

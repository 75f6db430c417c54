"""Pages of the spec: the list of gates, one page per gate, and the table of states."""

import ast
from pathlib import Path

from stackproof.spec.coverage import STATES, tally
from stackproof.spec.failures import load_catalogue
from stackproof.spec.fingerprint import check_source
from stackproof.spec.gates import SUBSYSTEMS, Gate
from tools.site_pages.markup import (
    MEANINGS,
    Page,
    bullets,
    chip,
    code,
    esc,
    folded,
    limit_text,
    number,
    pairs,
    prose,
    source_link,
    table,
    verdict,
)
from tools.site_pages.world import World

MOMENTS = {
    "preflight": "before step 1, on the user's own model, data, device and kernels",
    "runtime": "inside the run, on every event it watches",
    "artifact": "on a finished checkpoint, export or data set",
    "repository": "on the repository itself",
}


def gates_index(world: World) -> Page:
    """All gates by subsystem with statement and limits."""
    page = Page("gates/index.md", "Gates")
    page.add(
        f"Spec {esc(world.spec.version)}: {esc(world.spec.title)}. {esc(world.spec.scope)}",
        f"How gates, plants and kills work: {page.link('the guide', 'gates-guide.md')}. "
        f"States with reasons: {page.link('coverage', 'coverage.md')}.",
    )
    for subsystem in SUBSYSTEMS:
        gates = [g for g in world.spec.gates.values() if g.subsystem == subsystem]
        rows = [
            [
                page.gate(g.id),
                esc(g.title),
                g.moment,
                g.severity,
                chip(world.states[g.id].state),
                _limits_cell(g),
                str(len(g.plants)),
            ]
            for g in gates
        ]
        if rows:
            page.add(
                f"## {subsystem}",
                table(["gate", "title", "moment", "severity", "state", "limits", "plants"], rows),
            )
    return page


def _limits_cell(gate: Gate) -> str:
    return "<br>".join(limit_text(name, limit) for name, limit in gate.limits.items()) or "–"


def gate_page(world: World, gate: Gate) -> Page:
    """One gate: what it promises, how it is decided, what it has killed and what it has said."""
    page, state = Page(f"gates/{gate.id}.md", gate.title), world.states[gate.id]
    page.add(
        f"{page.link('Gates', 'gates/index.md')} · {gate.subsystem} · {code(gate.id)}",
        f"{chip(state.state)} **{state.state}**: {esc(state.reason)}",
        f"> {prose(gate.statement)}",
        table(
            ["", ""],
            [
                ["moment", f"{gate.moment}: {MOMENTS[gate.moment]}"],
                ["severity", gate.severity],
                ["installed in", esc(", ".join(gate.kinds)) + _when(gate)],
                ["since spec", esc(gate.since)],
                ["fingerprint", code(world.spec.fingerprint(gate.id))],
            ],
        ),
        *(
            ["## When it is red", esc(gate.hint[0].upper() + gate.hint[1:]) + "."]
            if gate.hint
            else []
        ),
        "## Limits",
        _limits(gate),
        *_rates(world, gate),
        "## Check",
        *_check(world, gate),
        "## Plants",
        _plants(world, gate, page),
        "## Kills",
        _kills(world, gate, page),
        "## Records",
        _records(world, gate, page),
        "## Tests",
        bullets(code(t) for t in gate.tests) or "None named.",
        "## Sources",
        bullets(source_link(s) for s in gate.sources) or "None named.",
    )
    return page


def _when(gate: Gate) -> str:
    """The configuration a run needs for the gate to be installed."""
    values = {
        key: " or ".join(value) if isinstance(value, tuple) else str(value).lower()
        for key, value in gate.when.items()
    }
    set_ = "".join(f", where {code(key)} is set" for key in gate.needs)
    return set_ + "".join(f", where {code(f'{key} = {value}')}" for key, value in values.items())


def _limits(gate: Gate) -> str:
    rows = [
        [code(n), x.direction.replace("-", " "), f"{x.value:g}", esc(x.unit), prose(x.why)]
        for n, x in gate.limits.items()
    ]
    return (
        table(["limit", "direction", "value", "unit", "why"], rows)
        if rows
        else "This gate has no number; its statement is all."
    )


def _rates(world: World, gate: Gate) -> list[str]:
    """How often a statistical gate is wrong in either direction, or why chance has no say in it."""
    if (rates := gate.rates) is None:
        return ["## Rates", f"None: {prose(world.spec.certain.get(gate.id, 'not stated'))}"]
    rows = [
        [f"false alarms per {rates.per}", f"{rates.false_alarm:g}"],
        ["power", f"{rates.power:g}"],
        ["effect", esc(rates.effect)],
        ["measured by", code(rates.measured_by)],
    ]
    return ["## Rates", table(["", ""], rows)]


def _check(world: World, gate: Gate) -> list[str]:
    module, name = gate.check.split(":")
    path = world.root / (module.replace(".", "/") + ".py")
    place = f"{path.relative_to(world.root).as_posix()}:{_line_of(path, name)}"
    text = (
        "The fingerprint covers what the text below computes: the check and every definition that "
        "it reaches, without comments, docstrings, local names and the words of messages."
    )
    return [
        f"{code(gate.check)} at {code(place)}. {text}",
        folded(f"Source of {name}", check_source(gate.check, world.root), "python"),
    ]


def _line_of(path: Path, name: str) -> int:
    """Line of a top-level definition; 1 if the module only passes it on."""
    nodes = ast.parse(path.read_text("utf-8")).body
    return next(
        (
            n.lineno
            for n in nodes
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name
        ),
        1,
    )


def _plants(world: World, gate: Gate, page: Page) -> str:
    if not gate.plants:
        return "None. A gate without a plant stays unproven."
    rows = [
        [
            page.plant(p),
            esc(world.plants[p].title) if p in world.plants else "**not in the museum**",
        ]
        for p in gate.plants
    ]
    return table(["plant", "what it breaks"], rows)


def _kills(world: World, gate: Gate, page: Page) -> str:
    current = world.spec.fingerprints(gate.id)
    rows = [
        [
            page.run(r.id),
            page.plant(k.plant),
            k.outcome,
            k.control,
            esc(k.latency),
            pairs(k.measured),
            _age(k.fingerprint, current),
        ]
        for r, k in reversed(world.kills_of(gate=gate.id))
    ]
    head = ["record", "plant", "outcome", "control", "latency", "measured", "fingerprint"]
    return table(head, rows) if rows else "No accepted record holds a kill of this gate."


def _age(fingerprint: str, current: frozenset[str]) -> str:
    return "current" if fingerprint in current else "older"


def _records(world: World, gate: Gate, page: Page) -> str:
    current = world.spec.fingerprints(gate.id)
    rows = [
        [
            page.run(r.id),
            verdict(g.verdict),
            number(g.checks),
            pairs(g.measured),
            _age(g.fingerprint, current),
        ]
        for r, g in reversed(world.results_of(gate.id))
    ]
    return (
        table(["record", "verdict", "checks", "measured", "fingerprint"], rows)
        if rows
        else "No accepted record held this gate."
    )


def coverage_page(world: World) -> Page:
    """State of every gate with its reason."""
    page = Page("coverage.md", "Coverage")
    counts = tally(world.states)
    page.add(
        "States are computed from the ledger at build time. Nobody types them.",
        table(
            ["state", "gates", "meaning"],
            [[f"{chip(s)} {s}", str(counts[s]), MEANINGS[s]] for s in STATES],
        ),
    )
    catalogue = load_catalogue(world.root)
    page.add(
        f"{len(catalogue.failures)} documented failures are in the "
        f"{page.link('catalogue', 'failures.md')}; {len(catalogue.awaiting())} of them await a "
        "part of the stack that is not built, and are counted as such."
    )
    rows = []
    for gate_id, state in world.states.items():
        records = [page.run(r) for r in dict.fromkeys((*state.kill_records, *state.run_records))]
        name = f'<span id="{gate_id.replace(".", "-")}"></span>{page.gate(gate_id)}'
        rows.append(
            [
                name,
                f"{chip(state.state)} {state.state}",
                esc(state.reason),
                "<br>".join(records) or "–",
            ]
        )
    return page.add("## Gates", table(["gate", "state", "why", "stands on"], rows))

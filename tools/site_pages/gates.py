"""Pages of the spec: the list of gates, a page for each gate, and the table of states."""

from stackproof.spec.coverage import tally
from stackproof.spec.fingerprint import check_source
from stackproof.spec.gates import SUBSYSTEMS, Gate
from tools.exhibits import source_of
from tools.site_pages.render import Page, page
from tools.site_pages.world import World
from tools.source import definitions

MOMENTS = {
    "preflight": "before step 1, on the user's own model, data, device and kernels",
    "runtime": "inside the run, on every event it watches",
    "artifact": "on a finished checkpoint, export or data set",
    "repository": "on the repository itself",
}


def gates_index(world: World) -> Page:
    """All gates by subsystem with title, state and limits."""
    return page("gates/index.md", "Gates", "gates.md.j2", world=world, subsystems=SUBSYSTEMS)


def gate_page(world: World, gate: Gate) -> Page:
    """A gate: its statement, limits and check, its plants and kills, and its results."""
    path, name = source_of(world.root, gate.check)[0], gate.check.partition(":")[2]
    found = definitions(world.root / path).get(name)
    return page(
        f"gates/{gate.id}.md",
        gate.title,
        "gate.md.j2",
        world=world,
        gate=gate,
        moment=MOMENTS[gate.moment],
        when={
            k: " or ".join(v) if isinstance(v, tuple) else str(v).lower()
            for k, v in gate.when.items()
        },
        place=f"{path}:{found.line if found else 1}",
        check=name,
        source=check_source(gate.check, world.root),
    )


def coverage_page(world: World) -> Page:
    """The state of every gate with its reason."""
    return page(
        "coverage.md", "Coverage", "coverage.md.j2", world=world, counts=tally(world.states)
    )

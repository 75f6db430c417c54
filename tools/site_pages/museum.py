"""The museum and its rooms: every deliberate bug with its story, what it changes, which gate killed
it, how late and by which numbers.
"""

from stackproof.spec.records import Scalar
from tools.site_pages.exhibits import Exhibit, plant_diff
from tools.site_pages.markup import (
    Page,
    anchor,
    bullets,
    code,
    esc,
    folded,
    number,
    prose,
    source_link,
    table,
)
from tools.site_pages.proof import failures_of, latency_histogram
from tools.site_pages.world import World


def museum_page(world: World) -> Page:
    """Who was killed by whom and how late; the way to the rooms."""
    page = Page("museum.md", "Museum")
    page.add(
        "A plant is a deliberate bug. Each one here is put into the real stack for the length of "
        "a test, and a gate must turn red on it and green without it. "
        f"{page.link('How this works', 'gates-guide.md')}.",
        f"Who else turns red: {page.link('kill matrix', 'kill-matrix.md')}. How far limits stand: "
        f"{page.link('margins', 'margins.md')}. What other people's runs have died of: "
        f"{page.link('known failures', 'failures.md')}, {page.link('by symptom', 'symptoms.md')}.",
    )
    if histogram := latency_histogram(world):
        page.add("## How late", histogram)
    if not world.plants:
        return page.add("The museum is empty.")
    page.add(
        "## Rooms",
        bullets(
            f"{page.link(room, f'museum/{room}.md')}: {len(plants)} plants"
            for room, plants in _rooms(world).items()
        ),
    )
    head = ["plant", "gate", "outcome", "control", "latency", "record"]
    page.add("## Plants and their gates")
    return page.add(
        table(
            head,
            [
                [page.plant(p.id), page.gate(p.gate), *_last(world, p, page)]
                for p in world.plants.values()
            ],
        )
    )


def room_pages(world: World) -> list[Page]:
    """A page for every subsystem, with one section per plant."""
    pages = []
    for room, plants in _rooms(world).items():
        page = Page(f"museum/{room}.md", f"Museum: {room}")
        page.add(
            f"{page.link('Museum', 'museum.md')} · {len(plants)} plants",
            bullets(f"{page.plant(p.id)} {esc(p.title)}" for p in plants),
        )
        for plant in plants:
            page.add(*_exhibit(world, plant, page))
        pages.append(page)
    return pages


def _rooms(world: World) -> dict[str, list[Exhibit]]:
    """Plants by subsystem, which is the first word of their ids."""
    rooms: dict[str, list[Exhibit]] = {}
    for plant in world.plants.values():
        rooms.setdefault(plant.id.split(".")[0], []).append(plant)
    return rooms


def _last(world: World, plant: Exhibit, page: Page) -> list[str]:
    kills = world.kills_of(gate=plant.gate, plant=plant.id)
    if not kills:
        return ["none yet", "–", "–", "–"]
    record, kill = kills[-1]
    stale = (
        ""
        if plant.gate in world.spec.gates
        and kill.fingerprint in world.spec.fingerprints(plant.gate)
        else " (older fingerprint)"
    )
    return [f"{kill.outcome}{stale}", kill.control, esc(kill.latency), page.run(record.id)]


def _exhibit(world: World, plant: Exhibit, page: Page) -> list[str]:
    outcome, control, latency, record = _last(world, plant, page)
    kills = world.kills_of(gate=plant.gate, plant=plant.id)
    kill = kills[-1][1] if kills else None
    measured = (
        f"<br>measured on the plant: {_line(kill.measured)}" if kill and kill.measured else ""
    )
    measured += (
        f"<br>measured without it: {_line(kill.control_measured)}"
        if kill and kill.control_measured
        else ""
    )
    measured += f"<br>{esc(kill.message)}" if kill and kill.message else ""
    diff = plant_diff(world.root, plant.plant)
    return [
        f"## {esc(plant.title)} {{ #{anchor(plant.id)} }}",
        f"{code(plant.id)} must be caught by {page.gate(plant.gate)}",
        prose(plant.plant.story),
        failures_of(world, page, plant.id),
        f"Last kill: {outcome}, control {control}, latency {latency}, record {record}{measured}",
        bullets(source_link(s) for s in plant.plant.sources),
        f"Defined at {code(f'{plant.path}:{plant.line}')}.",
        folded("What it changes", diff, "diff")
        if diff
        else folded("What puts it in place", plant.source, "python"),
    ]


def _line(measured: dict[str, Scalar]) -> str:
    return ", ".join(f"{code(k)} {number(v)}" for k, v in sorted(measured.items()))

"""The museum: every deliberate bug with its story, and the matrix of which gate killed it."""

from tools.site_pages.exhibits import Exhibit
from tools.site_pages.markup import Page, anchor, bullets, code, esc, folded, pairs, prose, source_link, table
from tools.site_pages.world import World


def museum_page(world: World) -> Page:
    """Kill matrix, then one section per plant."""
    page = Page("museum.md", "Museum")
    page.add(
        "A plant is a deliberate bug. Each one here is put into the real stack for the length of a test, "
        f"and a gate must turn red on it and green without it. {page.link('How this works', 'gates-guide.md')}.",
        "## Kill matrix",
    )
    if not world.plants:
        return page.add("The museum is empty.")
    head = ["plant", "gate", "outcome", "control", "latency", "record"]
    page.add(table(head, [[page.plant(p.id), page.gate(p.gate), *_last(world, p, page)] for p in world.plants.values()]))
    room = ""
    for plant in world.plants.values():
        if plant.path != room:
            room = plant.path
            page.add(f"## Room: {room.rsplit('/', 1)[-1].removesuffix('.py')}")
        page.add(*_exhibit(world, plant, page))
    return page


def _last(world: World, plant: Exhibit, page: Page) -> list[str]:
    kills = world.kills_of(gate=plant.gate, plant=plant.id)
    if not kills:
        return ["none yet", "–", "–", "–"]
    record, kill = kills[-1]
    stale = "" if plant.gate in world.spec.gates and kill.fingerprint == world.spec.fingerprint(plant.gate) else " (older fingerprint)"
    return [f"{kill.outcome}{stale}", kill.control, esc(kill.latency), page.run(record.id)]


def _exhibit(world: World, plant: Exhibit, page: Page) -> list[str]:
    outcome, control, latency, record = _last(world, plant, page)
    kills = world.kills_of(gate=plant.gate, plant=plant.id)
    measured = f"<br>measured: {pairs(kills[-1][1].measured)}" if kills and kills[-1][1].measured else ""
    return [
        f"### {esc(plant.title)} {{ #{anchor(plant.id)} }}",
        f"{code(plant.id)} must be caught by {page.gate(plant.gate)}",
        prose(plant.story),
        f"Last kill: {outcome}, control {control}, latency {latency}, record {record}{measured}",
        bullets(source_link(s) for s in plant.sources),
        folded(f"{plant.path}:{plant.line}", plant.source, "python"),
    ]

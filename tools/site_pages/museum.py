"""The museum and its rooms: every plant with its story, its diff and its last kill."""

from stackproof.spec.records import Kill, Record
from tools.exhibits import Exhibit, plant_diff
from tools.site_pages.proof import latency_histogram
from tools.site_pages.render import Page, page
from tools.site_pages.world import World


def museum_page(world: World) -> Page:
    """All plants with the outcome of their last kill, and links to the rooms."""
    return page(
        "museum.md",
        "Museum",
        "museum.md.j2",
        world=world,
        rooms=_rooms(world),
        histogram=latency_histogram(world),
        last=_last_kills(world),
    )


def room_pages(world: World) -> list[Page]:
    """A page for every subsystem, with one section per plant."""
    last = _last_kills(world)
    return [
        page(
            f"museum/{room}.md",
            f"Museum: {room}",
            "museum_room.md.j2",
            world=world,
            plants=plants,
            last=last,
            diffs={p.id: plant_diff(world.root, p) for p in plants},
        )
        for room, plants in _rooms(world).items()
    ]


def _rooms(world: World) -> dict[str, list[Exhibit]]:
    """Plants by subsystem, which is the first word of their ids."""
    rooms: dict[str, list[Exhibit]] = {}
    for plant in world.plants.values():
        rooms.setdefault(plant.id.partition(".")[0], []).append(plant)
    return rooms


def _last_kills(world: World) -> dict[str, tuple[Record, Kill]]:
    """The newest kill of each plant by its own gate."""
    gates = {p.id: p.gate for p in world.plants.values()}
    return {k.plant: (r, k) for r, k in world.kills_of() if gates.get(k.plant) == k.gate}

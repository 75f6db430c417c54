"""Page of the benchmarks: every ratio to a peer with its spread, date and machine."""

from stackproof.spec.records import Record
from tools.site_pages.render import Page, page
from tools.site_pages.world import World

RATIO, WANTED, VERSION = "ratio_to_", "wanted_ratio_to_", "peer_"


def benchmarks_page(world: World) -> Page:
    """All accepted benchmarks, newest first."""
    records = [r for r in reversed(world.live) if r.kind == "benchmark"]
    return page(
        "benchmarks.md",
        "Benchmarks",
        "benchmarks.md.j2",
        benchmarks=[(r, str(r.config.get("benchmark", r.id)), _versions(r)) for r in records],
        ratios=ratios,
    )


def ratios(record: Record) -> list[tuple[str, float, float, float, float | None]]:
    """(peer, median, minimum and maximum over the rounds, target) of every ratio to a peer."""
    value = {name: float(m.value) for name, m in record.metrics.items()}
    peers = [n.removeprefix(RATIO) for n in value if n.startswith(RATIO) and f"{n}_min" in value]
    return [
        (
            peer,
            *(value[f"{RATIO}{peer}{end}"] for end in ("", "_min", "_max")),
            value.get(WANTED + peer),
        )
        for peer in peers
    ]


def _versions(record: Record) -> str:
    environment = record.environment.items()
    peers = {k.removeprefix(VERSION): v for k, v in environment if k.startswith(VERSION)}
    return ", ".join(f"{peer} {version}" for peer, version in peers.items())

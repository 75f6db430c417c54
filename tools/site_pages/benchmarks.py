"""Page of the benchmarks: every ratio to a peer, measured in one run, with its spread,
date and machine.
"""

from stackproof.spec.records import Record
from tools.site_pages.markup import Page, esc, table
from tools.site_pages.world import World

RATIO, WANTED = "ratio_to_", "wanted_ratio_to_"


def benchmarks_page(world: World) -> Page:
    """All accepted benchmarks, newest first."""
    page = Page("benchmarks.md", "Benchmarks")
    page.add(
        "Rates next to those of installed peers, on the same data and in the same run, one after "
        "the other in turn. A ratio above 1 says that the stack was faster; the spread is that of "
        "the rounds."
    )
    records = [r for r in reversed(world.live) if r.kind == "benchmark"]
    if not records:
        return page.add("The ledger holds no benchmark yet.")
    for record in records:
        facts = (
            f"{record.started_at[:10]} · {esc(record.environment.get('cpu', ''))}, "
            f"{record.environment.get('cpu_count', '?')} cores"
        )
        title = str(record.config.get("benchmark", record.id))
        page.add(
            f"## {esc(title[0].upper() + title[1:])}",
            f"{page.run(record.id)} · {facts} · {esc(_versions(record))}",
            ratios(record),
        )
    return page


def ratios(record: Record) -> str:
    """The table of a record: median ratio to every peer, its spread over the rounds,
    and what was wanted.
    """
    value = {name: float(m.value) for name, m in record.metrics.items()}
    peers = [
        n.removeprefix(RATIO) for n in record.metrics if n.startswith(RATIO) and f"{n}_min" in value
    ]
    rows = []
    for peer in peers:
        ratio, wanted = value[RATIO + peer], value.get(WANTED + peer)
        spread = f"{value[f'{RATIO}{peer}_min']:.2f} – {value[f'{RATIO}{peer}_max']:.2f}"
        goal = (
            "–"
            if wanted is None
            else f"≥ {wanted:.3g}: {'reached' if ratio >= wanted else 'missed'}"
        )
        rows.append([esc(peer.replace("_", " ")), f"{ratio:.2f}", spread, goal])
    return table(["peer", "ratio", "spread", "wanted"], rows)


def _versions(record: Record) -> str:
    return ", ".join(
        f"{k.removeprefix('peer_')} {v}"
        for k, v in record.environment.items()
        if k.startswith("peer_")
    )

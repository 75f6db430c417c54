"""Pages of data: the data sets with their sources, and what a run read of its sources."""

from collections import Counter

from markupsafe import Markup

from stackproof.spec.records import Record
from tools.site_pages.render import Page, page, render
from tools.site_pages.world import World

SOURCES, DRAWS = "sources.jsonl", "curriculum.jsonl"


def data_index(world: World) -> Page:
    """All accepted data sets, newest first, each with its sources."""
    records = [(r, sources(world, r)) for r in reversed(world.live) if r.kind == "data"]
    return page("data/index.md", "Data sets", "data.md.j2", records=records)


def sources(world: World, record: Record) -> Markup:
    """Sources of a data record with the documents that were dropped, by reason."""
    keys = ("name", "license", "documents_in", "documents_out", "dropped", "tokens")
    rows = world.series(record, SOURCES, *keys)
    reasons = sorted({reason for row in rows for reason in row["dropped"]})
    return render("sources.md.j2", rows=rows, reasons=reasons) if rows else Markup()


def draws(world: World, record: Record) -> Markup:
    """The rows that a run read of each source, and the turns of its bandit."""
    lines = world.series(record, DRAWS, "step", "event")
    rows: Counter[str] = Counter()
    for line in lines:
        rows.update(line.get("rows", {}))
    turns = Counter(line["focus"] for line in lines if line["event"] == "turn")
    return render("draws.md.j2", rows=rows, turns=turns) if rows else Markup()

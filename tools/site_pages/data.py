"""Pages of what was eaten: the table of data sets, the sources of each,
and what a run drew from its sources.
"""

from stackproof.spec.records import Record
from tools.site_pages.markup import Page, code, esc, ev, number, table
from tools.site_pages.world import World

SOURCES, DRAWS = "sources.jsonl", "curriculum.jsonl"


def data_index(world: World) -> Page:
    """All accepted data sets, newest first, each with its sources."""
    page = Page("data/index.md", "Data sets")
    page.add(
        "What accepted data sets were made of: every document that came in, and the reason for "
        f"every one that did not come out. How to build one: {page.link('Data', 'data.md')}."
    )
    records = [r for r in reversed(world.live) if r.kind == "data"]
    if not records:
        return page.add("The ledger holds no data set yet.")
    for record in records:
        facts = (
            f"{ev(record, 'documents_out')} of {ev(record, 'documents_in')} stayed; "
            f"{ev(record, 'train_tokens')} to train on"
        )
        page.add(f"## {record.id}", f"{page.run(record.id)} · {facts}", *sources(world, record))
    return page


def sources(world: World, record: Record) -> list[str]:
    """Sources of a data record: what they are, what came in and out,
    and the documents dropped by reason.
    """
    rows = world.series(
        record, SOURCES, "name", "license", "documents_in", "documents_out", "dropped", "tokens"
    )
    if not rows:
        return []
    reasons = sorted({reason for row in rows for reason in row["dropped"]})
    shown = [
        [
            code(r["name"]),
            esc(r["license"]),
            *(number(r[k]) for k in ("weight", "cap", "floor", "documents_in", "documents_out")),
        ]
        + [number(r["dropped"].get(reason, {}).get("documents", 0)) for reason in reasons]
        + [number(r["tokens"][split]) for split in ("train", "validation")]
        for r in rows
    ]
    head = [
        "source",
        "licence",
        "weight",
        "cap",
        "floor",
        "in",
        "out",
        *reasons,
        "train tokens",
        "held-out tokens",
    ]
    return ["### Sources", table(head, shown)]


def draws(world: World, record: Record) -> list[str]:
    """What a run read of each source, and the turns of its bandit."""
    lines = world.series(record, DRAWS, "step", "event")
    rows: dict[str, int] = {}
    for line in lines:
        for source, n in line.get("rows", {}).items():
            rows[source] = rows.get(source, 0) + n
    if not rows:
        return []
    total = sum(rows.values())
    turns = [line for line in lines if line["event"] == "turn"]
    focus = {source: sum(t["focus"] == source for t in turns) for source in rows}
    body = [
        [code(s), number(n), f"{n / total:.1%}", number(focus[s]) if turns else "–"]
        for s, n in sorted(rows.items())
    ]
    return ["## Sources drawn", table(["source", "rows", "share", "turns in focus"], body)]

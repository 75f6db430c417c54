"""What the gates caught of drawn mutants: the sections of a record, and the trend over records."""

from markupsafe import Markup

from stackproof.spec.mutants import KEYS, SERIES, SHARES, UNANSWERED, is_blaming, tallies, tally
from stackproof.spec.records import Record
from tools.site_pages.render import render
from tools.site_pages.world import World

COLUMNS = (*KEYS, "outcome", "effect", "ending")


def mutants(world: World, record: Record) -> Markup:
    """The sections of a record's page about mutants; empty if it has none."""
    rows = world.series(record, SERIES, *COLUMNS, "target", "line", "diff")
    if not rows:
        return Markup()
    return render(
        "mutants.md.j2",
        whole=tally(rows),
        shares=SHARES,
        by={key: tallies(rows, key) for key in KEYS},
        unanswered=[row for row in rows if row["outcome"] in UNANSWERED],
        blaming=[row for row in rows if is_blaming(row)],
    )


def trend(world: World, here: str) -> Markup:
    """The shares of every record of a draw, newest first."""
    draws = [
        (record, tally(rows))
        for record in reversed(world.live)
        if (rows := world.series(record, SERIES, *COLUMNS))
    ]
    return render("home_mutants.md.j2", here, draws=draws, shares=SHARES[:2])

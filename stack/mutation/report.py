"""The record of a draw of mutants, and what is shown of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackproof.mutation.mutate import Judged
from stackproof.spec.building import RecordBuilder
from stackproof.spec.canonical import canonical_lines
from stackproof.spec.files import write_atomically
from stackproof.spec.mutants import KEYS, SERIES, UNANSWERED, is_blaming, metrics, tallies, tally
from stackproof.spec.records import Record

CLAIM = (
    "Small random changes of the code that ran were made one at a time; of those that changed what "
    "a user gets and raised no error, the gates halted the stated share."
)
NOT_COVERED = (
    "code that these configurations do not run, that torch compiles, or that runs on a GPU",
    "mistakes that take more than one place, and mistakes in the gates themselves",
    "other configurations than the small ones named here",
)


def document(judged: Sequence[Judged]) -> dict[str, Any]:
    """The tally of a draw, in all and by package, scenario and operator, with the mutants that no
    gate halted and the refusals that name another cause.
    """
    rows = [j.row() for j in judged]
    named = {
        "unanswered": [r for r in rows if r["outcome"] in UNANSWERED],
        "blaming": [r for r in rows if is_blaming(r)],
    }
    return tally(rows) | {key: tallies(rows, key) for key in KEYS} | named


def mutation_record(judged: Sequence[Judged], builder: RecordBuilder, directory: Path) -> Record:
    """Write the record of a draw, with a line for each mutant beside it."""
    rows = [j.row() for j in judged]
    write_atomically(directory / SERIES, canonical_lines(rows))
    for name, (value, unit, n) in metrics(rows).items():
        better = {"better": "lower" if name.startswith("blaming") else "higher"} if n else {}
        builder.metric(name, value, unit, n=n, **better)
    found = tally(rows)["caught_frac"]
    reason = f"{found['k']} of {found['n']} mutants that change a result silently were caught"
    return builder.finish(
        directory, status="completed", exit_code=0, end_reason=reason, series=[SERIES]
    )

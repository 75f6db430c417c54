"""The rates at which gates caught a draw of mutants, with intervals, and their record."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stackproof.mutation.mutate import OUTCOMES, Judged
from stackproof.spec.building import RecordBuilder
from stackproof.spec.canonical import canonical_lines
from stackproof.spec.files import write_atomically
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
SERIES = "mutants.jsonl"
Z_95 = 1.959964  # the normal quantile of a two-sided interval of 95 %


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `k` in `n` (Wilson 1927); 0 and 1 if n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = k / n, Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(judged: Iterable[Judged]) -> dict[str, Any]:
    """Counts by outcome, and the share that the gates caught.

    `caught_frac` counts mutants that change weights, losses, samples, scores, data or shipped files
    silently. `caught_or_stated_frac` counts those too that only change a record or a log.
    `early_frac` is the share of the caught that were caught before step 1.
    """
    rows = list(judged)
    counts = Counter(j.outcome for j in rows)
    caught = counts["caught"]
    silent = caught + counts["survivor"] + counts["warned"]
    early = sum(j.outcome == "caught" and j.ending.moment == "before step 1" for j in rows)
    return {
        "counts": {o: counts[o] for o in OUTCOMES},
        "caught_frac": _share(caught, silent),
        "caught_or_stated_frac": _share(caught, silent + counts["statement"]),
        "early_frac": _share(early, caught),
    }


def _share(k: int, n: int) -> dict[str, Any]:
    low, high = wilson(k, n)
    return {"k": k, "n": n, "value": k / n if n else None, "low": low, "high": high}


def by(judged: Sequence[Judged], key: str) -> dict[str, dict[str, Any]]:
    """The tally of each package, scenario or operator."""
    of = {
        "package": lambda j: j.mutant.package,
        "scenario": lambda j: j.scenario,
        "operator": lambda j: j.mutant.operator,
    }[key]
    return {name: tally(j for j in judged if of(j) == name) for name in sorted({*map(of, judged)})}


def mutation_record(judged: Sequence[Judged], builder: RecordBuilder, directory: Path) -> Record:
    """Write the record of a draw, with a line for each mutant beside it."""
    write_atomically(directory / SERIES, canonical_lines(j.row() for j in judged))
    whole = tally(judged)
    for outcome, n in whole["counts"].items():
        builder.metric(f"n_{outcome}", n, "mutants")
    for share in ("caught_frac", "caught_or_stated_frac", "early_frac"):
        _add(builder, share, whole[share])
    for package, own in by(judged, "package").items():
        _add(builder, f"caught_frac_{package}", own["caught_frac"])
    share = whole["caught_frac"]
    reason = f"{share['k']} of {share['n']} silent mutants were caught"
    return builder.finish(
        directory, status="completed", exit_code=0, end_reason=reason, series=[SERIES]
    )


def _add(builder: RecordBuilder, name: str, share: Mapping[str, Any]) -> None:
    if share["n"]:
        builder.metric(name, share["value"], "1", n=share["n"], better="higher")
        builder.metric(f"{name}_low", share["low"], "1", n=share["n"], better="higher")
        builder.metric(f"{name}_high", share["high"], "1", n=share["n"], better="higher")

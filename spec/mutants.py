"""What follows from the outcomes of drawn mutants: counts, and rates with intervals."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OUTCOMES = (
    "caught",  # a gate halted the commands, and without gates something differs silently
    "warned",  # a gate was red and did not halt
    "survivor",  # nothing was red, and weights, losses, samples, scores, data or files differ
    "statement",  # the same, but only records, logs and what is printed differ
    "refused",  # an error that names the user, the data or the machine
    "crashed",
    "hung",
    "equivalent",  # nothing differs
    "alarm",  # a gate was red, and without gates nothing differs where it was tried
)
LOUD = ("refused", "crashed", "hung")
SILENT = ("caught", "warned", "survivor", "statement")
UNANSWERED = ("survivor", "warned", "statement", "alarm")  # those to look at
BLAMING = (2, 3, 7)  # exit codes that name the user, the data or the machine as the cause
BEFORE, AT_END = "before step 1", "at the end"
MOMENTS = (BEFORE, "at a step", AT_END, "after training")
KEYS = ("package", "scenario", "operator")
SHARES = ("caught_frac", "caught_or_stated_frac", "early_frac", "blaming_frac")
SERIES = "mutants.jsonl"
Z_95 = 1.959964  # the normal quantile of a two-sided interval of 95 %

Row = Mapping[str, Any]  # a line of SERIES


def share(k: int, n: int) -> dict[str, Any]:
    """`k` of `n` with the 95 % interval (Wilson 1927); without `value`, from 0 to 1, if n is 0."""
    if n == 0:
        return {"k": 0, "n": 0, "value": None, "low": 0.0, "high": 1.0}
    found, z2 = k / n, Z_95**2
    middle = (found + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(found * (1 - found) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"k": k, "n": n, "value": found, "low": low, "high": high}


def moment(row: Row) -> str:
    """The moment of MOMENTS at which a mutant was caught."""
    when = row["ending"].get("moment", "")
    if when.startswith("step "):
        return "at a step"
    return when if when in MOMENTS else "after training"


def is_blaming(row: Row) -> bool:
    """Whether a user sees an error that blames the user, the data or the machine for the mutant."""
    return row["outcome"] == "refused" and row["ending"].get("exit_code") in BLAMING


def tally(rows: Iterable[Row]) -> dict[str, Any]:
    """Counts by outcome and moment, and the shares.

    `caught_frac` is that of mutants which change a result silently: weights, losses, samples,
    scores, data or shipped files. `caught_or_stated_frac` counts those too that change only a
    record, a log or what is printed. `early_frac` is the share of the caught that were caught
    before step 1, and `blaming_frac` that of the loud which blame the user, the data or the
    machine.
    """
    rows = list(rows)
    counts = Counter(r["outcome"] for r in rows)
    silent = [r for r in rows if r["outcome"] in SILENT]
    changing = [r for r in silent if r["effect"] == "result"]
    moments = Counter(moment(r) for r in rows if r["outcome"] == "caught")
    return {
        "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
        "moments": {when: moments[when] for when in MOMENTS},
        "caught_frac": share(_caught(changing), len(changing)),
        "caught_or_stated_frac": share(counts["caught"], len(silent)),
        "early_frac": share(moments[BEFORE], counts["caught"]),
        "blaming_frac": share(sum(map(is_blaming, rows)), sum(counts[o] for o in LOUD)),
    }


def _caught(rows: Iterable[Row]) -> int:
    return sum(r["outcome"] == "caught" for r in rows)


def tallies(rows: Sequence[Row], key: str) -> dict[str, dict[str, Any]]:
    """The tally of each value of a key of KEYS."""
    names = sorted({r[key] for r in rows})
    return {name: tally(r for r in rows if r[key] == name) for name in names}


def metrics(rows: Sequence[Row]) -> dict[str, tuple[float, str, int | None]]:
    """The metrics that the record of a draw states: value, unit and the count it is of."""
    whole = tally(rows)
    found: dict[str, tuple[float, str, int | None]] = {
        f"n_{outcome}": (n, "mutants", None) for outcome, n in whole["counts"].items()
    }
    named = {name: whole[name] for name in SHARES}
    for key in KEYS[:2]:
        own = {f"{key}_{n}": t["caught_frac"] for n, t in tallies(rows, key).items()}
        named |= {f"caught_frac_{name}": one for name, one in own.items()}
    for name, one in named.items():
        if n := one["n"]:
            for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high")):
                found[f"{name}{suffix}"] = (one[key], "1", n)
    return found

"""`stack evidence rerun` of a trace: run its command again and compare the result with the
record.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackproof.spec.canonical import parse_lines, sha256_file
from stackproof.spec.errors import IntegrityError
from stackproof.spec.records import Record, read_record

# Traces of the released model with one thread and with two differed by up to 1.4e-7, because the
# order of summation differs. Rounding errors measured by a comparison differ between processors and
# are reported as differences.
REL_TOLERANCE = 1e-4
# The rounding error of a sum with cancellation, such as a mean near zero, scales with the values.
IN_UNITS = re.compile(r"(.*\.(?:stats|grad|update))\.(?:mean|std|min|max|absmax|quantiles\..*)")
# Descriptions may be reworded, and durations differ.
NOT_COMPARED = ("operation", "read_by", "seconds")
WRITES_TO = ("--run-dir", "--csv")


def rerun_trace(record: Record, folder: Path, run_dir: Path | None) -> dict[str, Any]:
    """Run the `stack trace` command of a record again, and compare inputs by
    hash and series by value.

    `folder` holds the series. Raises IntegrityError if one is missing or changed,
    or if the command fails.
    """
    for series in record.series:
        file = folder / series.path
        if not file.is_file() or sha256_file(file) != series.sha256:
            raise IntegrityError(
                f"{series.path} of record {record.id} is missing or was changed since it was "
                "recorded",
                value=str(folder),
                next_step="stack evidence add",
            )
    directory = run_dir or Path("runs") / f"rerun-{record.id}"
    options = [*_without_files(record.command[1:]), "--run-dir", str(directory), "--json"]
    command = [sys.executable, "-m", "stackproof", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise IntegrityError(
            f"the command of {record.id} fails here with exit code {done.returncode}",
            value=done.stderr.strip().splitlines()[0] if done.stderr.strip() else None,
            next_step=f"run it where its inputs are: {shlex.join(record.command)}",
        )
    again = read_record(directory / "metadata.json")
    compared = [
        {"what": f"input {a.name}", "recorded": a.sha256, "now": b.sha256}
        | {"equal": a.sha256 == b.sha256}
        for a, b in zip(record.inputs, again.inputs)
    ]
    for series in record.series:
        now = directory / series.path
        worst, where = (
            largest_difference(folder / series.path, now) if now.is_file() else (math.inf, "gone")
        )
        row = {"what": f"{series.path} ({where})", "recorded": f"within {REL_TOLERANCE:g}"}
        compared.append(row | {"now": worst, "equal": worst <= REL_TOLERANCE})
    ok = all(row["equal"] for row in compared) and len(record.inputs) == len(again.inputs)
    ids = {"record": record.id, "rerun": again.id, "run_dir": str(directory)}
    return {"ok": ok, **ids, "compared": compared}


def _without_files(arguments: tuple[str, ...]) -> list[str]:
    """The command without the options that name files to write."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in WRITES_TO:
            kept.append(argument)
        skip = argument in WRITES_TO and not skip
    return kept


def largest_difference(recorded: Path, now: Path) -> tuple[float, str]:
    """The largest relative difference between two series, and its path;
    infinite if keys or text differ.

    Statistics in the units of the values are relative to at least the rms,
    a robust z to at least 1.
    """
    before, after = (
        dict(_leaves(parse_lines(p.read_bytes(), origin=str(p)))) for p in (recorded, now)
    )
    if before.keys() != after.keys():
        return math.inf, next(iter(before.keys() ^ after.keys()))
    apart = {
        path: _difference(value, after[path], _least(path, before))
        for path, value in before.items()
    }
    worst = max(apart, key=apart.__getitem__, default="")
    return apart.get(worst, 0.0), worst if apart.get(worst) else "all equal"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    match tree:
        case dict():
            for key, value in tree.items():
                if key not in NOT_COMPARED:
                    yield from _leaves(value, f"{path}.{key}" if path else key)
        case list():
            for i, value in enumerate(tree):
                name = value["point"] if isinstance(value, dict) and "point" in value else str(i)
                yield from _leaves(value, f"{path}.{name}" if path else name)
        case _:
            yield path, tree


def _least(path: str, figures: dict[str, Any]) -> float:
    """The minimum that a difference is relative to."""
    if path.endswith(".robust_z"):
        return 1.0
    found = IN_UNITS.fullmatch(path)
    rms = figures.get(f"{found[1]}.rms") if found else None
    return rms if isinstance(rms, int | float) else 0.0


def _difference(a: Any, b: Any, least: float) -> float:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    if a == b or not numbers:
        return 0.0 if a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b), least)

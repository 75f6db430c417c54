"""`stack evidence rerun` of a trace: run its command again and compare the result with the
record.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from typer import BadParameter
from typer.main import get_command

from stackproof.cli.trace import app
from stackproof.spec.canonical import parse_lines, sha256_bytes
from stackproof.spec.errors import IntegrityError, UsageError
from stackproof.spec.files import read_bytes, remedy
from stackproof.spec.records import Record, Series, read_record

# Newer versions of typer include a copy of click.
ClickException = next(c for c in BadParameter.__mro__ if c.__name__ == "ClickException")

# Traces of the released model with one thread and with two differed by up to 1.4e-7, because the
# order of summation differs. Rounding errors measured by a comparison differ between processors and
# are reported as differences.
REL_TOLERANCE = 1e-4
# The rounding error of a sum with cancellation, such as a mean near zero, scales with the values.
IN_UNITS = re.compile(r"(.*\.(?:stats|grad|update))\.(?:mean|std|min|max|absmax|quantiles\..*)")
# Descriptions may be reworded, and durations differ.
NOT_COMPARED = ("operation", "read_by", "seconds")
# What a rerun states itself or leaves out: files to write, and the form of the output.
REPLACED = frozenset(("run_dir", "csv", "json"))
# Options that run a program.
RUNS_CODE = frozenset(("check",))


def series_of_run(folder: Path, record: Record, series: Series) -> bytes:
    """The bytes of a series in a run directory. Raises IntegrityError if it is missing, changed,
    too large or not a regular file.
    """
    what, found = f"{series.path} of record {record.id}", None
    try:
        found = read_bytes(folder / series.path)
    except FileNotFoundError:
        pass
    except OSError as e:
        next_step = f"{remedy(e)}, then give the same command again"
        raise IntegrityError(f"{what} cannot be read: {e}", next_step=next_step) from e
    if found is None or sha256_bytes(found) != series.sha256:
        raise IntegrityError(
            f"{what} is missing or was changed since it was recorded",
            value=str(folder),
            next_step="stack evidence add",
        )
    return found


def rerun_trace(
    record: Record, read: Callable[[Record, Series], bytes], run_dir: Path | None
) -> dict[str, Any]:
    """Run the `stack trace` command of a record again, and compare inputs by
    hash and series by value.

    `read` gives a recorded series, and raises IntegrityError if it is missing or changed. Raises
    IntegrityError also if the command is not one of `stack trace`, or if it fails.
    """
    repeated = trace_command(record)
    for series in record.series:
        read(record, series)
    directory = run_dir or Path("runs") / f"rerun-{record.id}"
    # -P: no module of the working directory is imported
    program = [sys.executable, "-P", "-m", "stackproof", "trace", repeated[0]]
    written = [f"--run-dir={directory}", "--json"]
    done = subprocess.run([*program, *written, *repeated[1:]], capture_output=True, text=True)
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
            largest_difference(read(record, series), read_bytes(now), series.path)
            if now.is_file()
            else (math.inf, "gone")
        )
        row = {"what": f"{series.path} ({where})", "recorded": f"within {REL_TOLERANCE:g}"}
        compared.append(row | {"now": worst, "equal": worst <= REL_TOLERANCE})
    ok = all(row["equal"] for row in compared) and len(record.inputs) == len(again.inputs)
    ids = {"record": record.id, "rerun": again.id, "run_dir": str(directory)}
    return {"ok": ok, **ids, "compared": compared}


def trace_command(record: Record) -> list[str]:
    """The arguments of a record's `stack trace`, for another run of it: the command, its options as
    `--name=value`, and its arguments behind `--`, without the files that it wrote.

    A record is data: what the command line of `stack trace` does not declare, or what runs a
    program, is refused with IntegrityError.
    """
    group: Any = get_command(app)
    program, verb, *words = (*record.command, "", "")[: max(len(record.command), 2)]
    try:
        if (program, verb) != ("stack", "trace") or not words:
            raise UsageError("it is not a command of stack trace")
        name, *words = words if words[0] in group.commands else group.routed(words)
        command = group.commands[name]
        parser = command.make_parser(command.context_class(command, info_name=name))
        given, arguments, _ = parser.parse_args(args=words)
    except (UsageError, ClickException) as e:
        raise _refused(record, str(e)) from e
    options = {p.name: p for p in command.params if p.param_type_name == "option"}
    if programs := sorted(RUNS_CODE & given.keys()):
        raise _refused(record, f"--{programs[0]} runs a program")
    if unknown := sorted(given.keys() - options.keys() - {p.name for p in command.params}):
        raise _refused(record, f"{unknown[0]} is unknown to stack trace {name}")
    kept = [
        text
        for key in (k for k in options if k in given.keys() - REPLACED)
        for text in _as_text(options[key], given[key])
    ]
    positional = [
        word
        for p in command.params
        if p.param_type_name == "argument" and given.get(p.name) is not None
        for word in ([given[p.name]] if isinstance(given[p.name], str) else given[p.name])
    ]
    return [name, *kept, "--", *positional, *arguments]


def _as_text(option: Any, value: Any) -> list[str]:
    """An option as it was given, each value joined to its name."""
    flag = max(option.opts, key=len)
    if option.is_flag:
        return [flag]
    return [f"{flag}={v}" for v in (value if isinstance(value, list) else [value])]


def _refused(record: Record, why: str) -> IntegrityError:
    return IntegrityError(
        f"the command of record {record.id} is not repeated: {why}",
        value=shlex.join(record.command)[:200],
        allowed="the commands and options of stack trace, without a program",
        next_step="read the command, and run it yourself if you trust it",
    )


def largest_difference(recorded: bytes, now: bytes, name: str) -> tuple[float, str]:
    """The largest relative difference between two forms of the series `name`, and its path;
    infinite if keys or text differ.

    Statistics in the units of the values are relative to at least the rms,
    a robust z to at least 1.
    """
    before, after = (dict(_leaves(parse_lines(data, origin=name))) for data in (recorded, now))
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

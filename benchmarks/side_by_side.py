"""Rates of several contestants in one run, in turn, and their ratios round by round.
What the benchmarks of this folder share.
"""

import importlib
import json
import os
import platform
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PEER_PACKAGES = (
    "tokenizers",
    "tiktoken",
    "litdata",
    "mosaicml-streaming",
    "transformers",
    "litgpt",
    "safetensors",
)
IMPORT_NAME = {"mosaicml-streaming": "streaming"}


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work: `open` makes it ready and returns what is timed; `goal` is the
    least wanted ratio of rates, ours / it.
    """

    name: str
    package: str
    open: Callable[..., Callable]
    goal: float | None = None


@dataclass(frozen=True)
class Row:
    """A contestant's rates of all rounds in `unit`, or why there are none.
    `ratio` is ours / it, round by round: median, min, max.
    """

    name: str
    unit: str
    rates: tuple[float, ...] = ()
    missing: str = ""
    ratio: tuple[float, float, float] | None = None
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median ratio reaches the goal; None where there is no goal or no figure."""
        return None if self.goal is None or self.ratio is None else self.ratio[0] >= self.goal


def why_not(package: str) -> str:
    """Empty if the package can be imported, else what to print in the place of a figure."""
    try:
        if package:
            importlib.import_module(package)
    except ModuleNotFoundError as e:
        return "not installed" if e.name == package else f"not importable: no module {e.name}"
    except Exception as e:
        # a package may fail in any way where it does not fit what is installed beside it
        return f"not importable: {type(e).__name__}"
    return ""


def facts(packages: tuple[str, ...]) -> dict:
    """The machine and the versions of packages; None for those that are not installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def alternate(
    work: dict[str, Callable[[], float]], rounds: int, *, thrown_away: int = 1
) -> dict[str, tuple[float, ...]]:
    """Rates of every contestant over `rounds` rounds A B C A B C …,
    after some that are thrown away.
    """
    rates: dict[str, list[float]] = {name: [] for name in work}
    for number in range(thrown_away + rounds):
        for name, once in work.items():
            rate = once()
            if number >= thrown_away:
                rates[name].append(rate)
    return {name: tuple(r) for name, r in rates.items()}


def against(ours: str, rows: list[Row]) -> list[Row]:
    """Rows with their ratio to ours, taken within each round and then summarised."""
    base = next(r for r in rows if r.name == ours).rates
    return [
        replace(r, ratio=spread([a / b for a, b in zip(base, r.rates)]))
        if r.rates and r.name != ours
        else r
        for r in rows
    ]


def spread(values: list[float] | tuple[float, ...]) -> tuple[float, float, float]:
    """(median, min, max)."""
    return statistics.median(values), min(values), max(values)


def show(title: str, rows: list[Row]) -> None:
    """Print rows as a table."""
    width = max(34, *(len(r.name) + 1 for r in rows))
    print(f"\n{title}\n{'':{width}}{'median [min – max]':>32}  {'ours / this':>22}  wanted")
    for r in rows:
        rate = (
            "{:.4g} [{:.4g} – {:.4g}] {}".format(*spread(r.rates), r.unit) if r.rates else r.missing
        )
        ratio = "{:.2f} [{:.2f} – {:.2f}]".format(*r.ratio) if r.ratio else ""
        goal = (
            ""
            if r.goal is None
            else f"≥ {r.goal:.3g}" + {True: " reached", False: " missed", None: ""}[r.met]
        )
        print(f"{r.name:{width}}{rate:>32}  {ratio:>22}  {goal}")


def as_json(rows: list[Row]) -> list[dict]:
    """Rows as they are written to the file."""
    return [
        asdict(r)
        | {"rate": spread(r.rates) if r.rates else None, "rounds": len(r.rates), "met": r.met}
        for r in rows
    ]


def write_json(path: Path | None, document: dict) -> None:
    if path:
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def plain(value):
    """A setting as JSON can hold it."""
    return value if isinstance(value, str | int | float | bool) else str(value)


def open_record(options: Namespace, name: str):
    """The record of a benchmark, opened before anything is measured;
    None if nobody asked for one.
    """
    if options.run_dir is None:
        return None
    from stackproof.spec.building import RecordBuilder
    from stackproof.spec.gates import load_spec
    from stackproof.spec.provenance import environment

    machine = facts(tuple(c for c in PEER_PACKAGES if not why_not(IMPORT_NAME.get(c, c))))
    versions = {f"peer_{k}": v for k, v in machine.pop("versions").items()}
    given = {
        k: v for k, v in vars(options).items() if k not in ("json", "run_dir") and v is not None
    }
    settings = {
        k: [plain(p) for p in v] if isinstance(v, list) else plain(v) for k, v in given.items()
    }
    return RecordBuilder(
        kind="benchmark",
        spec=load_spec(),
        config={"benchmark": name, **settings},
        command=("python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]),
        claim=(
            f"On this machine, in one run and on the same data, {name} had these rates relative "
            "to its peers."
        ),
        not_covered=(
            "other machines, data and versions",
            "absolute rates: other work may have run beside this",
        ),
        environment=environment()
        | {k: v for k, v in machine.items() if k in ("cpus", "load_average_1min")}
        | versions,
    )


def metric_key(name: str) -> str:
    """A contestant's name as part of a metric's."""
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def close_record(
    builder,
    run_dir: Path | None,
    rows: list[Row],
    extra: dict[str, tuple[float, str]],
    series: tuple[str, ...] = (),
) -> None:
    """Write the record: the ratio to every peer with its spread, further figures as (value, unit),
    and series that lie in the folder.
    """
    if builder is None:
        return
    for row in rows:
        key = metric_key(row.name)
        if row.rates:
            builder.metric(
                f"rate_{key}", spread(row.rates)[0], row.unit, n=len(row.rates), better="higher"
            )
        if row.ratio:
            for part, value in zip(("", "_min", "_max"), row.ratio):
                builder.metric(
                    f"ratio_to_{key}{part}", value, "1", n=len(row.rates), better="higher"
                )
        if row.ratio and row.goal is not None:
            builder.metric(f"wanted_ratio_to_{key}", row.goal, "1")
    for key, (value, unit) in extra.items():
        builder.metric(key, value, unit)
    run_dir.mkdir(parents=True, exist_ok=True)
    missed = [r.name for r in rows if r.met is False]
    reached = (
        "every wanted ratio reached"
        if any(r.met for r in rows)
        else "measured; no ratio was wanted"
    )
    reason = f"below the wanted ratio: {', '.join(missed)}" if missed else reached
    builder.finish(run_dir, status="completed", end_reason=reason, exit_code=0, series=series)
    print(f"record {run_dir / 'metadata.json'}")

"""Which site a comparison and a bisection name for operations that were changed on purpose,
and in how many forwards.

    python benchmarks/trace_plants.py [--run-dir DIR]

The plants are those of `tests/trace/test_plants.py`, one wrong operation in layer 1 of 3 of a copy
of one model, and those of the museum that a forward shows, `tests/trace/museum.py`. A comparison
takes three forwards. A record holds one line for each plant; exit code 1 if a comparison names
another point first.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import close_record, open_record

COLUMNS = ("plant", "planted", "compared", "added_err", "bisected", "runs")


def cases() -> Iterator[tuple]:
    """Name of a plant, the point that it is at, ids, and a function that makes both sides anew."""
    from stackproof.museum.plant import load_museum
    from stackproof.trace import variant
    from tests.trace import models
    from tests.trace.museum import EXHIBITS, Found
    from tests.trace.test_plants import PLANTS, planted

    for name in PLANTS:
        yield (
            name,
            planted(name)[2],
            models.ids(),
            lambda name=name: tuple(map(variant, planted(name)[:2])),
        )
    museum = load_museum()
    for name, exhibit in EXHIBITS.items():
        if isinstance(exhibit, Found):
            ids = models.ids() if exhibit.ids is None else exhibit.ids
            yield name, exhibit.point, ids, partial(exhibit.sides, museum[name])


def row(name: str, point: str, ids: Any, sides: Callable[[], tuple]) -> dict:
    """What is named for one plant."""
    from stackproof.trace import bisect, compare

    first = compare(*sides(), ids).first_divergence
    found = bisect(*sides(), ids)
    named = [p.name for p in found.guilty]
    seen = None if first is None else first.point.name
    return dict(
        zip(
            COLUMNS,
            (name, point, seen, None if first is None else first.added_err, named, found.runs),
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    builder = open_record(options, "planted operations")
    rows = [row(*case) for case in cases()]
    for r in rows:
        compared, bisected = r["compared"] or "nothing", ", ".join(r["bisected"])
        print(
            f"{r['plant']:32} {r['planted']:26} compared {compared:26} bisected {bisected} in "
            f"{r['runs']} runs"
        )
    named = sum(r["compared"] == r["planted"] for r in rows)
    print(f"{named} of {len(rows)} named first by comparison")
    if builder is not None:
        from stackproof.spec.canonical import canonical_json

        builder.claim = (
            "For each operation that was changed on purpose, comparison and bisection name these "
            "points."
        )
        builder.not_covered = ("other models", "several wrong operations at once")
        options.run_dir.mkdir(parents=True, exist_ok=True)
        (options.run_dir / "plants.jsonl").write_bytes(
            b"".join(canonical_json(r) + b"\n" for r in rows)
        )
        figures = {
            "plants": (len(rows), "plants"),
            "named_by_comparison": (named, "plants"),
            "most_runs": (max(r["runs"] for r in rows), "runs"),
        }
        close_record(builder, options.run_dir, [], figures, series=("plants.jsonl",))
    return 0 if named == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

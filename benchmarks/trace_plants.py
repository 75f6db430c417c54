"""Which site a comparison and a bisection name for operations that were changed on purpose, and in how many forwards.

    python benchmarks/trace_plants.py [--run-dir DIR]

The plants are those of `tests/trace/test_plants.py`: one wrong operation in layer 1 of 3 of a copy of one model. A comparison takes three
forwards. A record holds one line for each plant; exit code 1 if a comparison names another point first.
"""

import argparse
import sys
from pathlib import Path

from side_by_side import close_record, open_record

COLUMNS = ("plant", "planted", "compared", "added_err", "bisected", "runs")


def row(name: str) -> dict:
    """What is named for one plant."""
    from stack.trace import bisect, compare, side
    from tests.trace import models
    from tests.trace.test_plants import planted

    good, bad, point = planted(name)
    first = compare(side(good), side(bad), models.ids()).first_divergence
    found = bisect(side(good), side(bad), models.ids())
    named = [p.name for p in found.guilty]
    seen = None if first is None else first.point.name
    return dict(zip(COLUMNS, (name, point, seen, None if first is None else first.added_err, named, found.runs)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.trace.test_plants import PLANTS

    builder = open_record(options, "planted operations")
    rows = [row(name) for name in PLANTS]
    for r in rows:
        print(f"{r['plant']:28} {r['planted']:26} compared {r['compared']:26} bisected {', '.join(r['bisected'])} in {r['runs']} runs")
    named = sum(r["compared"] == r["planted"] for r in rows)
    print(f"{named} of {len(rows)} named first by comparison")
    if builder is not None:
        from spec.canonical import canonical_json

        builder.claim = "For each operation that was changed on purpose, comparison and bisection name these points."
        builder.not_covered = ("other models", "several wrong operations at once")
        options.run_dir.mkdir(parents=True, exist_ok=True)
        (options.run_dir / "plants.jsonl").write_bytes(b"".join(canonical_json(r) + b"\n" for r in rows))
        figures = {
            "plants": (len(rows), "plants"),
            "named_by_comparison": (named, "plants"),
            "most_runs": (max(r["runs"] for r in rows), "runs"),
        }
        close_record(builder, options.run_dir, [], figures, series=("plants.jsonl",))
    return 0 if named == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

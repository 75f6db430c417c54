"""The tables of ratios of all benchmark records below a folder.

python benchmarks/tables.py runs/bench
"""

import argparse
import sys
from pathlib import Path

from stackproof.spec.records import Record, read_record

RATIO, WANTED = "ratio_to_", "wanted_ratio_to_"


def ratios(record: Record) -> list[tuple[str, float, float, float, float | None]]:
    """(peer, median, least, most, wanted) of every ratio that has a spread."""
    value = {name: float(m.value) for name, m in record.metrics.items()}
    peers = [n.removeprefix(RATIO) for n in value if n.startswith(RATIO) and f"{n}_min" in value]
    return [
        (p, *(value[f"{RATIO}{p}{part}"] for part in ("", "_min", "_max")), value.get(WANTED + p))
        for p in peers
    ]


def show(record: Record) -> None:
    """Print one record's table."""
    print(
        f"\n{record.config.get('benchmark', record.id)} · {record.started_at[:10]} · "
        f"{record.environment.get('cpu', '')}"
    )
    for peer, median, least, most, wanted in ratios(record):
        goal = (
            ""
            if wanted is None
            else f"wanted ≥ {wanted:.3g}: {'reached' if median >= wanted else 'missed'}"
        )
        print(
            f"  ours / {peer.replace('_', ' '):44}{median:7.2f} [{least:.2f} – {most:.2f}]  {goal}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    records = [
        read_record(path) for path in sorted(parser.parse_args().folder.glob("*/metadata.json"))
    ]
    for record in (r for r in records if ratios(r)):
        show(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

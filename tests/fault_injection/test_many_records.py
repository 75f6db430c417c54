"""A large evidence folder is read record by record: memory does not grow with their number."""

import sys
from pathlib import Path

import pytest

from tests.fault_injection.scale import scaled
from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence_folder

MAX_BYTES = 256 * 2**20
# of records that would all be held, 1,000 more take 130 MB more
MAX_GROWTH_BYTES = 32 * 2**20
CHECK = (str(ROOT / "tools/check_integrity.py"), "--json", "--root", ".")


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory) -> dict[int, Path]:
    """A checkout with few records, and one with many."""
    folder = tmp_path_factory.mktemp("records")
    numbers = (20, scaled(200, 10_000))
    for n in numbers:
        evidence_folder.write_checkout(folder / str(n), n)
    return {n: folder / str(n) for n in numbers}


@pytest.mark.parametrize("name", [*evidence_folder.COMMANDS, "check_integrity"])
def test_memory_does_not_grow_with_the_records(name, checkouts):
    command = evidence_folder.COMMANDS.get(name, CHECK)
    few, many = (evidence_folder.measured(folder, *command) for folder in checkouts.values())
    print({n: row["cpu_s"] for n, row in zip(checkouts, (few, many))})
    # the check finds that these records are not those in history
    expected = 6 if name == "check_integrity" else 0
    assert few["code"] == many["code"] == expected, (few, many)
    assert many["peak_bytes"] <= MAX_BYTES
    assert many["peak_bytes"] - few["peak_bytes"] <= MAX_GROWTH_BYTES, (few, many)

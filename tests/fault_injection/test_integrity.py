"""No rule of the integrity check crashes, whatever a record, a series or a registry holds."""

import shutil
from contextlib import suppress

import pytest
import rfc8785

from stackproof.spec.canonical import canonical_json
from tests.fault_injection.mutations import of_json, of_lines, of_toml, of_value
from tests.fault_injection.scale import SEED, chance, scaled
from tools.integrity.all_rules import check
from tools.tampers import small_repo
from tools.tampers.breaks import folder, nothing, rechain
from tools.tampers.small_repo import write

KINDS = ("train", "evaluate", "resume", "falsification")
ROUNDS = scaled(6, 20_000)  # of each of five documents


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    root = tmp_path_factory.mktemp("valid") / "repo"
    small_repo.build(root)
    return root


def damage(value, draw):
    """Change a part of a dictionary or a list in place. Text without a UTF-8 form is drawn again:
    it has no canonical form, and `raw_record` writes it.
    """
    while True:
        other = of_value(value, draw)
        with suppress(rfc8785.CanonicalizationError):
            canonical_json(other)
            break
    if type(other) is type(value):
        value.clear()
        value.update(other) if isinstance(value, dict) else value.extend(other)


def record(root, draw):
    """A record with other values, and all hashes after it fitted."""
    rechain(root, draw.choice(KINDS), lambda d: damage(d, draw))


def series(root, draw):
    """A log with other values, with its hash in the record."""
    rechain(root, "train", nothing, series=lambda lines: damage(lines, draw))


def ledger(root, draw):
    path = root / "evidence/ledger.jsonl"
    path.write_bytes(of_lines(path.read_bytes(), draw))


def registry(root, draw):
    path = root / "evidence/registry.toml"
    path.write_bytes(of_toml(path.read_bytes(), draw))


def raw_record(root, draw):
    """A record that is no record any more."""
    name = folder(root, draw.choice(KINDS)).name
    path = root / "evidence" / name / "metadata.json"
    write(root, f"evidence/{name}/metadata.json", of_json(path.read_bytes(), draw))


@pytest.mark.parametrize("tamper", [record, series, ledger, registry, raw_record])
def test_no_rule_crashes(valid, tmp_path, tamper):
    draw = chance(f"integrity {tamper.__name__}")
    for number in range(ROUNDS):
        root = tmp_path / "repo"
        shutil.copytree(valid, root, symlinks=True)
        tamper(root, draw)
        small_repo.forget()
        crashes = [f.message for f in check(root) if f.code == "INTERNAL"]
        assert crashes == [], f"SEED={SEED}, round {number}: {crashes}"
        shutil.rmtree(root)

"""Schema, limits, fingerprints and computed states."""

import datetime as dt

import pytest

from stackproof.spec.coverage import STATES, Coverage, coverage, gate_state, tally
from stackproof.spec.errors import ConfigError, IntegrityError
from stackproof.spec.fingerprint import check_source, code_below
from stackproof.spec.gates import ROOT, Gate, Limit, load_spec
from stackproof.spec.records import Record
from tools.tampers import small_repo

WHY = "because it was measured"


def limit(value: float, direction: str) -> Limit:
    return Limit(value=value, unit="1", direction=direction, why=WHY)


def test_limits_are_two_sided_and_never_admit_nan():
    assert limit(1, "at-most").allows(1) and not limit(1, "at-most").allows(1.01)
    assert limit(1, "at-least").allows(1) and not limit(1, "at-least").allows(0.99)
    assert limit(1, "exactly").allows(1) and not limit(1, "exactly").allows(0.99)
    assert not any(limit(1, d).allows(float("nan")) for d in ("at-most", "at-least", "exactly"))


def test_looser_is_seen_in_every_direction():
    assert limit(2, "at-most").looser_than(limit(1, "at-most")) and not limit(
        1, "at-most"
    ).looser_than(limit(2, "at-most"))
    assert limit(1, "at-least").looser_than(limit(2, "at-least")) and not limit(
        2, "at-least"
    ).looser_than(limit(1, "at-least"))
    assert limit(1, "at-most").looser_than(limit(1, "at-least"))


def test_the_spec_loads_and_names_only_known_subsystems(spec):
    assert len(spec.gates) >= 18 and all(
        g.plants and g.tests and g.sources for g in spec.gates.values()
    )
    assert all(len(v.why) >= 10 for g in spec.gates.values() for v in g.limits.values())


def test_unknown_keys_and_subsystems_are_refused(spec):
    good = spec.gates["loss.golden"].model_dump()
    with pytest.raises(ValueError, match="extra"):
        Gate.model_validate(good | {"severty": "halt"})
    with pytest.raises(ValueError, match="not a subsystem"):
        Gate.model_validate(good | {"id": "lost.golden"})


def test_a_gate_yields_to_gates_that_exist(small):
    path = small / "spec/gates/loss.toml"
    for other in ("loss.gone", "loss.golden"):
        path.write_text(
            path.read_text().replace(
                'since = "1.0.0"', f'since = "1.0.0"\nyields_to = ["{other}"]', 1
            )
        )
        with pytest.raises(IntegrityError, match=f"yields to {other}, which is not another gate"):
            fresh(small)
        path.write_text(path.read_text().replace(f'\nyields_to = ["{other}"]', ""))


STONE = """[[tombstone]]
id = "{id}"
successors = ["{successor}"]
retired = "2.0.0"
why = "it was a twin"
"""


def test_a_retired_gate_names_its_successor(small):
    (small / "spec/tombstones.toml").write_text(
        STONE.format(id="loss.old", successor="loss.golden")
    )
    small_repo._load_spec.cache_clear()
    with pytest.raises(ConfigError, match=r"loss\.old is retired since spec 2\.0\.0") as caught:
        load_spec(small).gate("loss.old")
    assert caught.value.allowed == "loss.golden"
    assert load_spec(small).gate("loss.golden").id == "loss.golden"
    with pytest.raises(ConfigError, match=r"no gate loss\.goldn") as caught:
        load_spec(small).gate("loss.goldn")
    assert "loss.golden" in caught.value.allowed


@pytest.mark.parametrize(
    ("stone", "what"),
    [
        ({"id": "loss.golden", "successor": "loss.golden"}, "retired and used again"),
        ({"id": "loss.old", "successor": "loss.none"}, "successor loss.none of loss.old"),
    ],
)
def test_a_tombstone_in_use_or_without_a_successor_is_refused(small, stone, what):
    (small / "spec/tombstones.toml").write_text(STONE.format(**stone))
    small_repo._load_spec.cache_clear()
    with pytest.raises(IntegrityError, match=what):
        load_spec(small)


@pytest.fixture
def small(tmp_path):
    root = tmp_path / "repo"
    small_repo.build(root)
    return root


def fresh(root) -> str:
    small_repo._load_spec.cache_clear()
    code_below.cache_clear()
    return load_spec(root).fingerprint("loss.golden")


@pytest.mark.parametrize(
    ("path", "old", "new", "changes"),
    [
        ("contracts/loss.py", "return x", "return x * 2", True),  # in a helper the check calls
        ("contracts/loss.py", "return helper", "return 0 + helper", True),
        ("spec/gates/loss.toml", "1e-5", "1e-4", True),
        ("spec/gates/loss.toml", '"halt"', '"warn"', True),
        ("spec/gates/loss.toml", "The loss MUST", "The loss SHOULD", True),
        ("spec/gates/loss.toml", "Because it was measured", "Because it was measured twice", False),
        ("spec/gates/loss.toml", "The loss is right", "The loss is quite right", False),
        ("spec/gates/loss.toml", "a paper", "another paper", False),
    ],
)
def test_fingerprint_changes_with_the_meaning_and_only_with_it(small, path, old, new, changes):
    before = fresh(small)
    text = (small / path).read_text()
    assert old in text
    (small / path).write_text(text.replace(old, new, 1))
    assert (fresh(small) != before) is changes


def test_source_of_a_check_holds_what_it_reaches_over_modules(spec):
    source = check_source("contracts.checkpoint:durability", ROOT)
    assert "def _survives" in source and "_DAMAGES" in source and "class Verdict" in source
    with pytest.raises(IntegrityError, match="does not exist"):
        check_source("contracts.loss:nothing", ROOT)


def records_of(root) -> dict[str, Record]:
    from stackproof.spec.ledger import Ledger

    return dict(Ledger(root / "evidence").records())


def test_states_are_computed_from_records(small):
    small_repo._load_spec.cache_clear()
    spec, records = load_spec(small), records_of(small)
    assert gate_state(spec, "loss.golden", records).state == "discharged"
    proof = {i: r for i, r in records.items() if r.kind == "falsification"}
    assert gate_state(spec, "loss.golden", proof).state == "proven"
    assert gate_state(spec, "loss.golden", {}).state == "unproven"
    runs = {i: r for i, r in records.items() if r.kind == "train"}
    assert gate_state(spec, "loss.golden", runs).state == "unproven", (
        "a run without a kill proves nothing"
    )
    assert set(tally(coverage(spec, records))) == set(STATES)


def changed(record: Record, **fields) -> Record:
    return Record.model_validate(record.model_dump(by_alias=True, mode="json") | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"compute": "synthetic"},
        {"code": {"commit": "a" * 40, "dirty": True}},
        {"status": "halted", "exit_code": 4},
    ],
)
def test_only_real_clean_finished_runs_discharge(small, fields):
    small_repo._load_spec.cache_clear()
    spec, records = load_spec(small), records_of(small)
    weaker = {i: changed(r, **fields) if r.kind == "train" else r for i, r in records.items()}
    assert gate_state(spec, "loss.golden", weaker).state == "proven"


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"outcome": "missed"}, "failed"),
        ({"outcome": "crashed"}, "unproven"),
        ({"outcome": "equivalent"}, "unproven"),
        ({"outcome": "awaiting"}, "unproven"),
        ({"control": "fail"}, "failed"),
        ({"control": "not_run"}, "unproven"),
    ],
)
def test_only_a_kill_with_a_green_control_proves(small, fields, state):
    """The newest proof counts: one that misses the plant, and one that kills it afterwards."""
    small_repo._load_spec.cache_clear()
    spec, records = load_spec(small), records_of(small)
    proof = next(r for r in records.values() if r.kind == "falsification")
    later = changed(proof, kills=[k.model_dump() | fields for k in proof.kills])
    assert gate_state(spec, "loss.golden", {proof.id: later}).state == state
    seen = Coverage(spec)
    for record, expected in ((proof, "proven"), (later, state), (proof, "proven")):
        seen.add(record)
        assert seen.state("loss.golden").state == expected


@pytest.mark.parametrize("kind", ["benchmark", "evaluate", "foreign"])
def test_only_the_kinds_that_a_gate_names_prove_and_discharge_it(small, kind):
    small_repo._load_spec.cache_clear()
    spec, records = load_spec(small), records_of(small)
    true = {r.kind: r for r in records.values()}
    forged = {name: changed(r, kind=kind, id=r.id.replace(name, kind)) for name, r in true.items()}
    assert gate_state(spec, "loss.golden", {"a": forged["falsification"]}).state == "unproven"
    proven = {"a": true["falsification"], "b": forged["train"]}
    assert gate_state(spec, "loss.golden", proven).state == "proven"


def test_an_older_fingerprint_is_stale_and_a_waiver_expires(small):
    small_repo._load_spec.cache_clear()
    spec, records = load_spec(small), records_of(small)
    proof = next(r for r in records.values() if r.kind == "falsification")
    old = changed(proof, kills=[k.model_dump() | {"fingerprint": "0" * 64} for k in proof.kills])
    assert gate_state(spec, "loss.golden", {proof.id: old}).state == "stale"
    train = next(r for r in records.values() if r.kind == "train")
    waiver = {"id": "loss.golden", "reason": "known and accepted", "expires": "2026-06-01"}
    gates = [g.model_dump() | {"verdict": "fail", "waiver": waiver} for g in train.gates]
    waived = records | {train.id: changed(train, gates=gates)}
    assert gate_state(spec, "loss.golden", waived, dt.date(2026, 5, 1)).state == "waived"
    assert gate_state(spec, "loss.golden", waived, dt.date(2026, 7, 1)).state == "failed"

"""Gates of a run on several ranks, in real processes."""

import pytest

from stackproof.museum.prove import Prover
from stackproof.spec.gates import load_spec

GATES = [g for g in load_spec().gates.values() if g.subsystem == "distributed"]


@pytest.fixture(scope="module")
def prover(museum_folder, ranks):
    prover = Prover(museum_folder)
    prover._ranks = ranks
    return prover


@pytest.fixture(scope="module")
def clean(prover):
    """Verdicts of all gates in one run without a plant."""
    cfg, gates = prover.config(GATES[0]), tuple(g.id for g in GATES)
    job = cfg, gates, None, prover.root / "cache", prover.run_dir()
    first, second = prover._ranks.run("stackproof.museum.ranks:judge", *job)
    assert not first.raised and not second.raised
    assert not second.value.verdicts  # rank 0 alone has gates
    return first.value.verdicts


@pytest.mark.parametrize("gate", GATES, ids=lambda g: g.id)
def test_gate_is_green_and_red_on_a_plant(prover, clean, gate):
    from stackproof.museum.plant import load_museum

    green, _ = clean[gate.id]
    assert green.outcome == "pass" and green.measured
    seen = prover.planted(gate, load_museum()[gate.plants[0]])
    assert seen.outcome == "killed", seen.verdict.message
    assert seen.touches > 0


def test_a_job_that_fails_is_an_error_and_no_verdict(prover):
    answers = prover._ranks.run("stackproof.museum.ranks:judge", "no configuration")
    assert all("TypeError" in answer.raised for answer in answers)

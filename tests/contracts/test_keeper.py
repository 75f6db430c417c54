"""The Gatekeeper: a check that breaks is no verdict, and hides none."""

import math

import pytest

from stackproof.contracts.callbacks.subject import ComparedReplicas, ComparedWeights
from stackproof.contracts.events import (
    Finished,
    ModuleModes,
    StateCompared,
    StepTaken,
    WeightsUpdated,
)
from stackproof.contracts.gate import RuntimeCheck, judge, resolve
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.subject import Subject
from stackproof.spec.errors import GateFailed
from stackproof.spec.records import Waiver
from tests.subjects import changed

TWO = ("loss.golden", "optim.clip-spike")


def broken(*arguments):
    raise RuntimeError("out of order")


def test_a_check_that_breaks_hides_no_red_gate(spec, subject):
    keeper = Gatekeeper(spec, only=TWO)
    with pytest.raises(GateFailed) as caught:
        keeper.preflight(
            changed(subject, training={"cross_entropy_sum": broken, "clip": lambda model: 1.0})
        )
    assert caught.value.gate_id == "optim.clip-spike" and isinstance(
        caught.value.__cause__, RuntimeError
    )
    said = {r.id: (r.verdict, r.checks, r.message) for r in keeper.results()}
    assert said["loss.golden"] == ("not_run", 0, "the check raised RuntimeError: out of order")
    assert said["optim.clip-spike"][:2] == ("fail", 1)


def test_a_check_that_breaks_alone_is_an_error_and_the_others_were_asked(spec, subject):
    keeper = Gatekeeper(spec, only=TWO)
    with pytest.raises(RuntimeError, match="out of order"):
        keeper.preflight(changed(subject, training={"cross_entropy_sum": broken}))
    assert {r.id: r.verdict for r in keeper.results()} == {
        "loss.golden": "not_run",
        "optim.clip-spike": "pass",
    }


def test_a_consequence_comes_after_its_cause(spec):
    keeper = Gatekeeper(spec, kind="foreign", only=("optim.clip-norm", "runtime.finite"))
    taken = StepTaken(3, math.nan, math.nan, math.nan, 1.0, 1e-3, 8, 8, 0, 0.0, 0.0, 0.0)
    with pytest.raises(GateFailed) as caught:
        keeper.observe(taken)
    assert [s.gate.id for s in keeper.states.values()] == ["optim.clip-norm", "runtime.finite"], (
        "the order of the spec is the other way"
    )
    assert (
        caught.value.gate_id == "runtime.finite"
        and "also red: optim.clip-norm" in caught.value.what
    )
    assert (
        caught.value.next_step.startswith("usual causes: a rate that is too large")
        and "show runtime.finite" in caught.value.next_step
    )
    alone = Gatekeeper(spec, kind="foreign", only=("optim.clip-norm",))
    with pytest.raises(GateFailed) as caught:
        alone.observe(taken)
    assert caught.value.gate_id == "optim.clip-norm"


def test_every_gate_a_foreign_trainer_meets_says_where_to_look(spec):
    assert [g.id for g in spec.gates.values() if "foreign" in g.kinds and len(g.hint) < 30] == []


def test_a_red_artifact_stays_red_when_the_next_one_is_good(spec):
    """The gate is waived, so that the run goes on to its next save."""
    waiver = Waiver(id="checkpoint.reloads", reason="to see what comes after", expires="9999-12-31")
    keeper = Gatekeeper(spec, kind="foreign", only=("checkpoint.reloads",), waivers=(waiver,))
    for step, reloaded in enumerate("abac", start=1):
        saved = ComparedWeights({"w": "a"}, {"w": reloaded}, (False, False))
        keeper.artifact(Subject(saved=saved), step=step)
        (result,) = keeper.results()
        expected = ("pass", None) if step == 1 else ("fail", 2)
        assert (
            result.verdict,
            result.first_failure_step,
        ) == expected and result.checks == result.heartbeat_last_step == step


@pytest.mark.parametrize("outcome", ["pass", "fail"])
def test_an_artifact_that_is_later_not_run_shows_both(spec, outcome):
    """Neither hides the other, in either order."""
    waiver = Waiver(id="checkpoint.reloads", reason="to see what comes after", expires="9999-12-31")
    compared = ComparedWeights({"w": 1}, {"w": 1 if outcome == "pass" else 2}, (False, False))
    alone = ComparedReplicas({"w": 1}, {"w": 1})
    for saves in ((alone, compared), (compared, alone), (alone, compared, alone)):
        keeper = Gatekeeper(spec, kind="foreign", only=("checkpoint.reloads",), waivers=(waiver,))
        for step, saved in enumerate(saves, start=1):
            keeper.artifact(Subject(saved=saved), step=step)
        (result,) = keeper.results()
        last = max(n for n, saved in enumerate(saves, start=1) if saved is alone)
        note = f"{saves.count(alone)} of {len(saves)} checks not_run, last at step {last}: "
        assert (result.verdict, result.checks) == (outcome, len(saves))
        assert note in result.message and "reloaded_checksums" in result.message
    keeper = Gatekeeper(spec, kind="foreign", only=("checkpoint.reloads",))
    keeper.artifact(Subject(saved=alone), step=1)
    keeper.artifact(Subject(saved=alone), step=2)
    (result,) = keeper.results()
    assert (result.verdict, result.checks) == ("not_run", 2), "no verdict was ever reached"


def test_judging_many_gates_stops_at_none_and_keeps_what_was_raised(spec, subject):
    gates = [spec.gates[i] for i in (*TWO, "export.folder")]
    off = changed(subject, training={"cross_entropy_sum": broken})
    found = {gate.id: one for gate, one in judge(gates, off)}
    assert {i: one.verdict.outcome for i, one in found.items()} == {
        "loss.golden": "not_run",
        "optim.clip-spike": "pass",
        "export.folder": "not_run",
    }
    assert [i for i, one in found.items() if one.error is not None] == ["loss.golden"]
    assert all(one.seconds > 0 for one in found.values())


@pytest.mark.parametrize(
    ("gate_id", "half", "rest"),
    [
        (
            "optim.movement",
            StateCompared(1, "evaluation", 3, ()),
            WeightsUpdated(2, 1e-3, 1.0),
        ),
        ("runtime.mode", ModuleModes(1, "evaluation", ()), ModuleModes(2, "training", ())),
    ],
)
def test_a_gate_that_judged_one_half_of_what_it_is_for_is_silent(spec, gate_id, half, rest):
    keeper = Gatekeeper(spec, kind="train", only=(gate_id,))
    keeper.observe(half)
    with pytest.raises(GateFailed, match="without one verdict of this gate on"):
        keeper.observe(Finished(step=2, status="completed"))
    keeper.observe(rest)
    keeper.observe(Finished(step=2, status="completed"))


def test_every_runtime_check_has_the_base_that_names_what_it_has_not_judged(spec):
    checks = {g.id: resolve(g) for g in spec.gates.values() if g.moment == "runtime"}
    without = [i for i, check in checks.items() if not issubclass(check, RuntimeCheck)]
    assert checks and without == []

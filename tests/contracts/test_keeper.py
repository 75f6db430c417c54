"""The Gatekeeper: a check that breaks is no verdict, and hides none. A resume loses none."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest

from stackproof.contracts.callbacks.subject import ComparedReplicas, ComparedWeights
from stackproof.contracts.events import (
    BatchDrawn,
    Finished,
    ModuleModes,
    Resumed,
    Saved,
    Started,
    StateCompared,
    StepTaken,
    WeightsUpdated,
)
from stackproof.contracts.gate import RuntimeCheck, judge, resolve
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.subject import Subject
from stackproof.spec.canonical import canonical_json
from stackproof.spec.errors import CheckpointError, GateFailed
from stackproof.spec.records import Waiver
from tests.subjects import changed

TWO = ("loss.golden", "optim.clip-spike")


FINITE = StepTaken(3, 2.0, 1.0, 1.0, 1.0, 1e-3, 8, 8, 0, 0.0, 0.0, 0.0)
NOT_FINITE = StepTaken(4, math.nan, math.inf, 1.0, 1.0, 1e-3, 8, 8, 0, 0.0, 0.0, 0.0)
DRAWN = BatchDrawn(10, 72, 80, tuple(range(8)), 0, 64)


def broken(*arguments):
    raise RuntimeError("out of order")


def broken_value(event):
    raise ValueError("not a number")


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


@pytest.mark.parametrize("waived", [False, True])
def test_every_checkpoint_that_is_announced_is_judged(spec, waived):
    """A write in the background announces a checkpoint before its verdict."""
    waiver = Waiver(id="checkpoint.reloads", reason="to see what comes after", expires="9999-12-31")
    waivers = (waiver,) if waived else ()
    saved = ComparedWeights({"w": 1}, {"w": 1}, (False, False))
    for judged, ok in (((2, 4), True), ((2,), waived), ((4,), waived), ((), waived)):
        keeper = Gatekeeper(spec, only=("checkpoint.reloads",), waivers=waivers)
        for step in (2, 4):
            keeper.observe(Saved(step, "folder"))
            if step in judged:
                keeper.artifact(Subject(saved=saved), step=step)
        with nullcontext() if ok else pytest.raises(GateFailed, match="saved and not judged"):
            keeper.observe(Finished(4, "completed"))


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


def resumed(spec, state, gate_id, **options):
    keeper = Gatekeeper(spec, only=(gate_id,), **options)
    keeper.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
    return keeper


def without_time(keeper):
    (result,) = json.loads(canonical_json([r.model_dump() for r in keeper.results()]))
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("outcome", ["not_run", "pass", "fail"])
def test_a_resumed_run_continues_with_the_verdicts_of_before(spec, outcome):
    waiver = Waiver(id="runtime.finite", reason="to see what comes after", expires="9999-12-31")
    before = Gatekeeper(spec, only=("runtime.finite",), waivers=(waiver,))
    if outcome != "not_run":
        before.observe(FINITE if outcome == "pass" else NOT_FINITE)
    assert before.results()[0].verdict == outcome
    after = resumed(spec, before.state_dict(), "runtime.finite", waivers=(waiver,))
    assert without_time(after) == without_time(before)
    # The next verdict replaces a green one, and never a red one.
    for keeper in (before, after):
        keeper.observe(replace(FINITE, step=5))
    assert without_time(after) == without_time(before)
    assert after.results()[0].first_failure_step == (4 if outcome == "fail" else None)
    with pytest.raises(GateFailed):
        resumed(spec, before.state_dict(), "runtime.finite").observe(replace(NOT_FINITE, step=6))


def test_a_state_of_an_older_version_keeps_the_counts_without_a_verdict(spec):
    before = Gatekeeper(spec, only=("runtime.finite",))
    before.observe(FINITE)
    known = ("checks", "heartbeat", "watcher")
    old = {i: {name: s[name] for name in known} for i, s in before.state_dict().items()}
    after = resumed(spec, old, "runtime.finite")
    (result,) = after.results()
    assert (result.verdict, result.checks, result.heartbeat_last_step) == ("not_run", 1, 3)
    after.observe(replace(FINITE, step=4))
    assert after.results()[0].verdict == "pass"


@pytest.mark.parametrize("state", ["without the gate", "with half of it"])
def test_a_run_that_is_resumed_at_its_last_step_needs_no_heartbeat(spec, state):
    before = Gatekeeper(spec, only=("runtime.mode",))
    if state == "with half of it":
        before.observe(ModuleModes(9, "evaluation", ()))
    saved = before.state_dict() if state == "with half of it" else {}
    keeper = resumed(spec, saved, "runtime.mode")
    for event in (Resumed(9, "step-9", 72), Started(9, {}), Finished(9, "completed")):
        keeper.observe(event)
    (result,) = keeper.results()
    assert (result.verdict, result.checks) == (("pass", 1) if saved else ("not_run", 0))


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([], id="neither resumed nor started"),
        pytest.param([Started(9, {})], id="never resumed"),
        pytest.param([Resumed(8, "step-8", 64), Started(8, {})], id="no event of its step"),
        pytest.param([Resumed(8, "step-8", 64), replace(FINITE, step=9)], id="a step"),
        pytest.param([Resumed(9, "step-9", 72), replace(FINITE, step=9)], id="the step again"),
        pytest.param([Resumed(9, "step-9", 72), DRAWN], id="a batch"),
    ],
)
def test_a_silent_gate_of_any_other_run_halts_it(spec, events):
    keeper = resumed(spec, {}, "runtime.mode")
    for event in events:
        keeper.observe(event)
    with pytest.raises(GateFailed, match="without one verdict of this gate on"):
        keeper.observe(Finished(9, "completed"))


def test_a_check_that_cannot_continue_from_its_checkpoint_is_a_checkpoint_error(spec, monkeypatch):
    before = Gatekeeper(spec, only=("runtime.finite",))
    after = resumed(spec, before.state_dict(), "runtime.finite")
    for keeper in (before, after):
        monkeypatch.setattr(keeper.states["runtime.finite"].watcher, "observe", broken_value)
    with pytest.raises(CheckpointError, match="finite cannot continue from the state"):
        after.observe(FINITE)
    with pytest.raises(ValueError, match="not a number"):
        before.observe(FINITE)


def test_what_a_check_remembers_in_another_form_is_a_checkpoint_error(spec):
    state = Gatekeeper(spec, only=("runtime.loss-spike",)).state_dict()
    state["runtime.loss-spike"]["watcher"] = {"recent": 5}
    with pytest.raises(CheckpointError, match="loss-spike cannot continue from the state"):
        resumed(spec, state, "runtime.loss-spike")

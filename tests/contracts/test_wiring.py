"""What a look at the model may leave behind, and what the pointers of a run name; two-sided."""

import json

import pytest

from stackproof.contracts.checkpoint import Pointers
from stackproof.contracts.evaluation import LeavesNoTrace
from stackproof.contracts.events import (
    Evaluated,
    Finished,
    Sampled,
    Saved,
    Started,
    StateCompared,
)
from stackproof.contracts.gate import limits_of


def pointers(spec, losses, *, began=0) -> Pointers:
    check = Pointers(limits_of(spec.gates["checkpoint.pointers"]))
    check.observe(Started(began, {}))
    for step, nats in losses.items():
        check.observe(Evaluated(step, nats, 1.0, (nats,), "h", None, 5.0))
    return check


@pytest.mark.parametrize(
    ("latest", "best", "ok"),
    [(30, 20, True), (30, 30, False), (30, None, False), (20, 20, False), (None, 20, False)],
)
def test_pointers_are_two_sided(spec, latest, best, ok):
    check = pointers(spec, {10: 3.0, 20: 2.0, 30: 2.0})
    assert check.observe(Finished(30, "completed", latest, best)).passed == ok


def test_pointers_remember_over_a_resume_and_a_child_may_have_no_best(spec):
    first = pointers(spec, {10: 3.0, 20: 2.0})
    state = json.loads(json.dumps(first.state_dict()))
    resumed = pointers(spec, {}, began=20)
    resumed.load_state_dict(state)
    resumed.observe(Evaluated(30, 2.5, 1.0, (2.5,), "h", None, 5.0))
    assert resumed.observe(Finished(30, "completed", 30, 20)).passed
    assert resumed.observe(Finished(30, "completed", 30, None)).passed, (
        "the parent's folder is not the child's"
    )
    assert not resumed.observe(Finished(30, "completed", 30, 30)).passed
    resumed.observe(Evaluated(40, 1.5, 1.0, (1.5,), "h", None, 5.0))
    assert not resumed.observe(Finished(40, "completed", 40, None)).passed, (
        "its own best is to be there"
    )


def test_what_an_evaluation_changes_is_named(spec):
    check = LeavesNoTrace(limits_of(spec.gates["evaluation.leaves-no-trace"]))
    assert check.observe(StateCompared(5, "sample", 9, ())).passed
    red = check.observe(StateCompared(5, "sample", 9, ("optim.embed.weight.exp_avg",)))
    assert not red.passed and "sample changed 1 of 9" in red.message and "exp_avg" in red.message
    assert not check.observe(StateCompared(5, "sample", 0, ())).passed, "nothing was compared"


@pytest.mark.parametrize("compared_at", [None, 5, 9])
@pytest.mark.parametrize(
    ("section", "event"),
    [
        ("evaluation", Evaluated(9, 2.0, 3.0, (2.0,), "h", None, 5.0)),
        ("sample", Sampled(9, "b")),
        ("save", Saved(step=9, path="step-9")),
    ],
)
def test_what_looks_at_the_last_step_was_compared(spec, section, event, compared_at):
    check = LeavesNoTrace(limits_of(spec.gates["evaluation.leaves-no-trace"]))
    if compared_at:
        check.observe(StateCompared(compared_at, section, 9, ()))
    check.observe(event)
    verdict = check.observe(Finished(9, "completed", 9, 9))
    assert verdict.passed == (compared_at == 9) and (verdict.passed or section in verdict.message)

"""The catalogue of failures is whole and strict, awaiting is found out, and margins are computed
from both sides of a limit.
"""

import math

import pytest

from stackproof.spec.errors import IntegrityError
from stackproof.spec.failures import Failure, answering_gates, load_catalogue
from stackproof.spec.margins import margins, measured_for
from stackproof.spec.records import Kill
from tools.tampers.small_repo import FAILURES, write


def test_the_catalogue_holds_every_documented_failure(spec):
    catalogue = load_catalogue()
    assert len(catalogue.failures) == 103
    awaiting = catalogue.awaiting()
    assert all(f.awaiting for f in awaiting) and "SF-PT4" in {f.id for f in awaiting}
    for failure in catalogue.failures.values():
        assert (
            failure in awaiting or failure.rules or failure.tests or answering_gates(spec, failure)
        ), failure.id


def test_awaiting_ends_when_the_capability_is_there(tmp_path):
    write(tmp_path, "spec/failures/loss.toml", FAILURES)
    write(tmp_path / "b", "spec/failures/loss.toml", FAILURES)
    write(tmp_path / "b", "stack/tune/any.py", "def tune():\n    return 1\n")
    assert [f.id for f in load_catalogue(tmp_path).awaiting()] == ["SF-T01"]
    assert load_catalogue(tmp_path / "b").awaiting() == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('id = "SF-T01"', 'id = "SF-L01"', "there twice"),
        ("severity = 5", "severity = 6", "severity"),
        ("severity = 5", "severity = 5\nblame = 1", "blame"),
        ('awaiting = "tuning"', 'awaiting = "turning"', "which is not a capability"),
        ("steps = 3", "", "steps belongs"),
        ('plants = ["loss.wrong"]', "", "name a plant"),
        ('plants = ["loss.wrong"]', 'tests = ["tests/a.py::b"]', "no_gate belongs"),
        ("severity = 5", 'severity = 5\nno_gate = "No run reaches this."', "no_gate belongs"),
        ("[[capability]]", "[[ability]]", "unknown table ability"),
    ],
)
def test_a_broken_catalogue_is_refused(tmp_path, old, new, says):
    write(tmp_path, "spec/failures/loss.toml", FAILURES.replace(old, new, 1))
    with pytest.raises(IntegrityError, match=says):
        load_catalogue(tmp_path)


def test_a_plant_of_two_failures_is_due_at_the_earlier(spec):
    catalogue = load_catalogue()
    earlier, later = (
        Failure.model_validate(
            catalogue.failures["SF-R06"].model_dump() | {"id": f"SF-Z{n}", "steps": n}
        )
        for n in (2, 5)
    )
    both = catalogue.model_copy(update={"failures": {f.id: f for f in (later, earlier)}})
    assert both.deadline(spec.gates["runtime.loss-spike"], "runtime.lr-spike") == (
        "within k steps",
        2,
    )
    assert both.deadline(spec.gates["export.folder"], "export.second-head") == ("at export", None)


def kill(plant, control, measured, gate="loss.golden", **changes):
    fields = {
        "fingerprint": "a" * 64,
        "plant_sha256": "b" * 64,
        "outcome": "killed",
        "control": "pass",
        "latency": "",
        "seconds": 0.1,
    }
    return Kill(
        gate=gate, plant=plant, control_measured=control, measured=measured, **fields | changes
    )


def test_margins_stand_on_the_worst_control_and_the_weakest_plant(spec):
    kills = [
        kill("a", {"abs_error": 1e-7}, {"abs_error": 1e-2}),
        kill("b", {"abs_error": 2e-7}, {"abs_error": 2e-5}),
        kill("c", {"abs_error": 1e-7}, {"abs_error": 5e-6}),
        kill("d", {"abs_error": 9e-6}, {"abs_error": 1.1e-5}, outcome="missed"),
    ]
    (found,) = margins(spec, kills)
    assert (found.limit, found.weakest, found.plants, found.clean) == (
        "abs_error_max",
        "b",
        2,
        2e-7,
    )
    assert found.room == pytest.approx(50) and found.reach == pytest.approx(2)


def test_margins_know_the_other_direction_and_a_limit_of_zero(spec):
    (low,) = margins(spec, [kill("a", {"valid_frac": 0.9}, {"valid_frac": 0.1}, gate="data.rows")])
    assert (
        low.direction == "at-least"
        and low.room == pytest.approx(5)
        and low.reach == pytest.approx(1.8)
    ), "of what is missing to 1"
    (exact,) = margins(
        spec, [kill("a", {"changes": 0}, {"changes": 3}, gate="evaluation.same-batches")]
    )
    assert (exact.room, exact.reach) == (math.inf, math.inf)


def test_a_limit_that_the_clean_stack_goes_past_is_no_margin(spec):
    """Such a limit counts only together with another one; its ratio would say nothing."""
    assert margins(spec, [kill("a", {"abs_error": 1e-3}, {"abs_error": 1e-2})]) == []


def test_what_is_measured_under_another_name_is_found_and_nan_is_infinitely_wrong(spec):
    limit = spec.gates["model.reference-differential"].limits["rel_error_max"]
    assert (
        measured_for("rel_error_max", limit, {"logit_rel_error": 1e-3, "attention_rel_error": 2e-3})
        == 2e-3
    )
    assert measured_for("rel_error_max", limit, {"logit_rel_error": "NaN"}) == math.inf
    assert measured_for("rel_error_max", limit, {"other": 1.0}) is None

"""The gate of held-out rows and of the best evaluation, on events."""

import json

import pytest

from stackproof.contracts.evaluation import HeldOut
from stackproof.contracts.events import Evaluated, HeldOutRows, Started
from stackproof.contracts.gate import limits_of

GATE = "evaluation.held-out"
ROWS = HeldOutRows(n_rows=16, n_distinct=16, found_in_training_frac=0.1)


def begun(spec, step=0):
    check = HeldOut(limits_of(spec.gates[GATE]))
    assert check.observe(Started(step=step, plan={"n_eval_batches": 4})) is None
    return check


def look(step, loss, *, best=None, rows=ROWS, n=4):
    best_step, best_loss = best or (step, loss)
    given = {
        "bits_per_byte": 1.0,
        "batch_hash": "h",
        "previous_loss_nats": None,
        "random_loss_nats": 6.0,
    }
    held = {
        "best_step": best_step,
        "best_loss_nats": best_loss,
        "rows": (lambda: rows) if rows else None,
    }
    return Evaluated(step=step, loss_nats=loss, batch_nats=(loss,) * n, **given, **held)


def test_an_honest_run_is_green(spec):
    check = begun(spec)
    assert check.observe(look(1, 3.0)).passed and check.observe(look(2, 2.0)).passed
    assert check.observe(look(3, 2.5, best=(2, 2.0))).passed and check.observe(look(4, 1.5)).passed


WRONG = {
    "most of it is in training": look(1, 3.0, rows=HeldOutRows(16, 16, 0.51)),
    "only the head of the split": look(1, 3.0, rows=HeldOutRows(16, 16, 0.0, 0.49)),
    "held-out rows are not those": look(1, 3.0, rows=HeldOutRows(16, 16, 0.0, 1.0, 1)),
    "rows repeat": look(1, 3.0, rows=HeldOutRows(16, 14, 0.0)),
    "does not name the rows": look(1, 3.0, rows=None),
    "a batch is missing": look(1, 3.0, n=3),
    "a batch too many": look(1, 3.0, n=5),
    "better than was ever measured": look(1, 3.0, best=(0, 0.0)),
    "no best at all": look(1, 3.0, best=(None, None)),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_way_to_be_wrong_is_red(spec, name):
    assert begun(spec).observe(WRONG[name]).outcome == "fail"


@pytest.mark.parametrize("best", [(2, 3.5), (1, 3.5), (2, 3.0)])
def test_a_best_that_is_not_the_lowest_is_red(spec, best):
    """The lowest was 3.0 at step 1."""
    check = begun(spec)
    assert check.observe(look(1, 3.0)).passed
    assert not check.observe(look(2, 3.5, best=best)).passed
    check = begun(spec)
    assert check.observe(look(1, 3.0)).passed and check.observe(look(2, 3.5, best=(1, 3.0))).passed


def test_a_run_that_goes_on_keeps_its_best(spec):
    first = begun(spec)
    first.observe(look(1, 3.0))
    second = begun(spec, step=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (
        second.observe(look(2, 3.5, best=(1, 3.0))).passed
        and not second.observe(look(3, 3.6, best=(3, 3.6))).passed
    )
    unknown = begun(spec, step=7)
    assert unknown.observe(look(8, 3.5, best=(1, 3.0))).passed, (
        "what was before this gate was installed is taken as it is"
    )

"""The museum against tracing: each plant of a model, its kernels, precision and experts is named
where it is, or no forward shows it.
"""

import pytest

from stackproof.museum.plant import load_museum, touches
from stackproof.spec.failures import load_catalogue
from stackproof.trace import bisect, compare
from tests.trace import models
from tests.trace.museum import EXHIBITS, Found, Unseen

SUBSYSTEMS = ("model", "kernel", "precision", "moe")
# Gates whose plants strike in the run's points: no forward of a small model shows them.
ELSEWHERE = {
    "model.tied-head",  # a head of its own with the same values changes no forward at step 0
    "model.attention-logits",
    "model.attention-entropy",
    "model.live-points",
    "model.traced",  # its plants strike in tracing itself
}
FAMILIES = ("SF-M", "SF-K", "SF-P0", "SF-ME")
FOUND = {name: e for name, e in EXHIBITS.items() if isinstance(e, Found)}
UNSEEN = {name: e for name, e in EXHIBITS.items() if isinstance(e, Unseen)}
MUSEUM = load_museum()


def looked_at(exhibit):
    return models.ids() if exhibit.ids is None else exhibit.ids


def same_to_the_bit(found):
    return found.first_divergence is None and {
        c.arrived.rel_err for c in found.points if c.arrived
    } == {0.0}


def test_the_table_holds_the_plants_of_these_rooms_and_of_these_failures_and_no_other():
    rooms = {
        p.id
        for p in MUSEUM.values()
        if p.id.startswith(SUBSYSTEMS) and p.gate not in ELSEWHERE and ".foreign-" not in p.id
    }
    failures = [f for f in load_catalogue().failures.values() if f.id.startswith(FAMILIES)]
    assert len(rooms) >= 38 and len(failures) >= 20 and all(f.plants for f in failures)
    assert set(EXHIBITS) == rooms | {p for f in failures for p in f.plants}


@pytest.mark.parametrize("name", FOUND)
def test_comparison_names_where_the_plant_is_and_blames_nothing_else(name):
    ran = touches()
    good, bad = FOUND[name].sides(MUSEUM[name])
    found = compare(good, bad, looked_at(FOUND[name]))
    assert found.first_divergence.point.name == FOUND[name].point
    assert {s.point.name for s in found.suspects} == FOUND[name].suspects and found.way == FOUND[
        name
    ].way
    assert found.logits.rel_err > 1e-4 and touches() > ran
    before = [c for c in found.points if c.point.order < found.first_divergence.point.order]
    # rounding alone stays below that; see test_compare.py
    assert all(c.excess < 0.4 for c in before)
    assert same_to_the_bit(compare(good, good, looked_at(FOUND[name])))


@pytest.mark.parametrize("name", FOUND)
def test_bisection_names_the_first_and_the_last_place_of_the_plant(name):
    exhibit = FOUND[name]
    named = exhibit.bisected or (exhibit.named(exhibit.slot)[0], exhibit.named(exhibit.slot)[-1])
    found = bisect(*exhibit.sides(MUSEUM[name]), looked_at(exhibit))
    assert [p.name for p in found.guilty] == list(dict.fromkeys(named))


@pytest.mark.parametrize("name", UNSEEN)
def test_a_plant_that_no_forward_shows_shows_in_none(name):
    exhibit, ran = UNSEEN[name], touches()
    assert same_to_the_bit(compare(*exhibit.sides(MUSEUM[name]), models.ids())), exhibit.reason
    assert (touches() > ran) is exhibit.runs


@pytest.mark.parametrize("name", [name for name, e in UNSEEN.items() if e.updated])
def test_what_acts_in_the_loss_or_the_update_shows_in_the_forward_after_it(name):
    ran = touches()
    found = compare(*UNSEEN[name].updated(MUSEUM[name]), models.ids())
    assert found.first_divergence is not None and found.logits.rel_err > 1e-5 and touches() > ran

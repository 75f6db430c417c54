"""The worst of measurements, and the state that a runtime check keeps over a resume."""

import json
import math
from collections import deque
from itertools import permutations

import pytest

from stackproof.contracts.events import ModuleModes, WeightsUpdated
from stackproof.contracts.gate import (
    RuntimeCheck,
    decide_all,
    least,
    limits_of,
    resolve,
    worst,
    worst_at,
)
from tests.contracts.test_rows import drawn, plan, taken, watching

JUDGED = {
    "data.rows": (drawn(1, 0), taken()),
    "optim.movement": (WeightsUpdated(1, 1e-3, 1.0),),
    "runtime.mode": (ModuleModes(1, "training", ()),),
}


def fresh(spec, gate_id: str) -> RuntimeCheck:
    if gate_id == "data.rows":
        return watching(spec, plan(100))
    return resolve(spec.gates[gate_id])(limits_of(spec.gates[gate_id]))


def saved(check: RuntimeCheck) -> dict:
    """The state as a checkpoint holds it."""
    return json.loads(json.dumps(check.state_dict(), allow_nan=False))


def test_the_worst_of_measurements_does_not_pass_over_nan():
    for values in permutations((0.5, math.nan, -2.0)):
        assert (worst(values), least(values)) == (math.inf, -math.inf)
        assert math.isnan(values["abc".index(worst_at(dict(zip("abc", values))))])
    for values in permutations((0.5, 3, -2.0)):
        assert (worst(iter(values)), least(iter(values))) == (3, -2.0)
    assert (worst((), default=0.0), least((), default=1.0)) == (0.0, 1.0)
    assert worst_at({"a": 1.0, "b": 2.0, "c": 2.0}) == "b", "the first of equals"
    for of_none in (worst, least):
        with pytest.raises(ValueError):
            of_none(())


def test_every_problem_is_in_the_message():
    """Also two of the same words; a NaN is red without a problem."""
    verdict = decide_all([1 > 0 and "wide", 1 > 2 and "low", 2 > 1 and "wide"], "step 3: ", n=2)
    assert (verdict.outcome, verdict.message) == ("fail", "step 3: wide; wide")
    assert verdict.measured == {"n": 2}
    assert decide_all([1 > 2 and "low"], "step 3: ").passed
    assert decide_all([False], x=math.nan).outcome == "fail"
    assert decide_all([1 > 0 and ""]).outcome == "fail", "a problem without words is one"


def test_what_was_judged_is_still_judged_after_a_resume(spec):
    watched = {g.id: resolve(g) for g in spec.gates.values() if g.moment == "runtime"}
    halves = {i for i, check in watched.items() if check.missing is not RuntimeCheck.missing}
    assert halves == JUDGED.keys(), "a check with parts needs its events in JUDGED"
    for gate_id, events in JUDGED.items():
        check, resumed = fresh(spec, gate_id), fresh(spec, gate_id)
        resumed.load_state_dict(saved(check))
        assert check.missing() and resumed.missing() == check.missing(), "nothing is judged yet"
        for event in events:
            assert check.observe(event).passed
        assert check.missing() == "", gate_id
        resumed.load_state_dict(saved(check))
        assert resumed.missing() == "", gate_id


def test_the_direction_of_a_first_update_stays_unknown_after_a_resume(spec):
    check, resumed = fresh(spec, "optim.movement"), fresh(spec, "optim.movement")
    check.observe(WeightsUpdated(1, 1e-3, 1.0, unknown="no gradient"))
    resumed.load_state_dict(saved(check))
    later = WeightsUpdated(2, 1e-3, 1.0)
    assert resumed.observe(later).outcome == "not_run"
    assert fresh(spec, "optim.movement").observe(later).passed


class Kept(RuntimeCheck):
    kept = ("names", "least", "recent")

    def __init__(self):
        super().__init__(None)
        self.names, self.least, self.recent = ["a"], math.inf, deque(maxlen=2)


def test_every_kind_of_state_comes_back_as_it_was():
    check, resumed = Kept(), Kept()
    check.names.append("b")
    check.recent.extend([(1, 2), (3, 4), (5, 6)])
    state = check.state_dict()
    check.names.append("c")
    assert state == {"names": ["a", "b"], "recent": [(3, 4), (5, 6)]}, "a copy, without infinity"
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.names == ["a", "b"] and resumed.least == math.inf
    assert resumed.recent == deque([(3, 4), (5, 6)]) and resumed.recent.maxlen == 2


def test_a_checkpoint_from_before_a_field_starts_it_at_its_initial_value(spec):
    check = Kept()
    check.load_state_dict({"least": 2.0, "gone": 1})
    assert (check.least, check.names, list(check.recent)) == (2.0, ["a"], [])
    assert not hasattr(check, "gone")
    for gate in (g for g in spec.gates.values() if g.moment == "runtime"):
        before = fresh(spec, gate.id)
        after = fresh(spec, gate.id)
        after.load_state_dict({})
        assert after.state_dict() == before.state_dict(), gate.id

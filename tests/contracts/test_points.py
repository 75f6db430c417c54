"""Gates of recorded points on hand-made figures: green on both sides of what is common,
red one step beyond a limit.
"""

import json
import math

import pytest

from stackproof.contracts.events import ActivationsTraced
from stackproof.contracts.gate import limits_of, resolve

CLEAN = {
    "layers.0.scores": {"n": 64, "mean": 1.0, "std": 2.0, "absmax": 40.0, "frac_nonfinite": 0.0},
    "layers.0.entropy": {"n": 64, "mean": 1.2, "std": 0.5, "absmax": 3.0, "frac_nonfinite": 0.0},
    "layers.0.ffn.out": {"n": 512, "mean": 0.0, "std": 0.3, "absmax": 2.0, "frac_nonfinite": 0.0},
    "layers.0.experts.3.ffn.up": {
        "n": 0,
        "mean": math.nan,
        "std": math.nan,
        "absmax": math.nan,
        "frac_nonfinite": math.nan,
    },
    "layers.1.scores": {"n": 64, "mean": 1.0, "std": 2.0, "absmax": 50.0, "frac_nonfinite": 0.0},
    "layers.1.entropy": {"n": 64, "mean": 0.9, "std": 0.5, "absmax": 3.0, "frac_nonfinite": 0.0},
}


def traced(point=None, **changes):
    return ActivationsTraced(4, CLEAN | ({point: CLEAN[point] | changes} if point else {}))


def watcher(spec, gate_id):
    gate = spec.gates[gate_id]
    return resolve(gate)(limits_of(gate))


@pytest.mark.parametrize(
    ("absmax", "outcome"),
    [(299.0, "pass"), (301.0, "fail"), (math.nan, "fail"), (math.inf, "fail")],
)
def test_a_score_that_has_grown_is_named(spec, absmax, outcome):
    verdict = watcher(spec, "model.attention-logits").observe(
        traced("layers.1.scores", absmax=absmax)
    )
    assert verdict.outcome == outcome and (
        outcome == "pass" or "layers.1.scores" in verdict.message
    )


def test_a_layer_that_looks_at_one_token_is_named(spec):
    check = watcher(spec, "model.attention-entropy")
    low = traced("layers.1.entropy", mean=0.049)
    assert (
        check.observe(low).passed and check.observe(traced()).passed and check.observe(low).passed
    ), "not in a row"
    again = watcher(spec, "model.attention-entropy")
    again.load_state_dict(json.loads(json.dumps(check.state_dict())))
    verdict = again.observe(low)
    assert (
        verdict.outcome == "fail"
        and "layers.1.entropy" in verdict.message
        and "layers.0" not in verdict.message
    )
    assert verdict.measured["entropy_nats"] == 0.049
    for nats, outcome in ((0.051, "pass"), (math.nan, "fail")):
        one = watcher(spec, "model.attention-entropy")
        one.observe(traced("layers.0.entropy", mean=nats))
        assert one.observe(traced("layers.0.entropy", mean=nats)).outcome == outcome


def test_a_point_that_dies_explodes_or_breaks_is_named(spec):
    check = watcher(spec, "model.live-points")
    assert check.observe(traced()).passed
    assert check.observe(traced("layers.0.ffn.out", absmax=29e3)).passed
    verdict = check.observe(traced("layers.0.ffn.out", absmax=31e3))
    assert verdict.outcome == "fail" and "layers.0.ffn.out has grown to 3.1e+04" in verdict.message
    verdict = check.observe(
        traced("layers.0.ffn.out", frac_nonfinite=0.01, absmax=math.nan, std=math.nan)
    )
    assert verdict.outcome == "fail" and "values that are not finite" in verdict.message
    dead = traced("layers.0.ffn.out", std=0.0)
    assert check.observe(dead).passed, "a branch may begin at 0"
    verdict = check.observe(dead)
    assert verdict.outcome == "fail" and "layers.0.ffn.out no longer vary" in verdict.message
    assert check.observe(traced("layers.0.entropy", std=0.0, mean=0.0)).passed, (
        "entropy has a gate of its own"
    )

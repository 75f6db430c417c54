"""Gates of sampling: parity, distribution and the cadence of samples."""

import json

import pytest
import torch

from contracts.events import Finished, Sampled, Started
from contracts.gate import call_check, limits_of
from contracts.sampling import Cadence
from stack.museum.plant import load_museum, touches
from stack.train.preflight import gather
from tests.contracts.test_optim import step_taken


@pytest.mark.parametrize("gate_id", ["sampling.cache-parity", "sampling.distribution"])
def test_gate_is_green_on_the_stack(spec, ingredients, gate_id):
    verdict = call_check(spec.gates[gate_id], ingredients)
    assert verdict.outcome == "pass", verdict.message
    if gate_id == "sampling.cache-parity":
        assert verdict.measured["rel_error"] < 3e-5  # measured worst case 4e-6


@pytest.mark.parametrize(
    "plant_id",
    [
        "sampling.cache-position-off-by-one",
        "model.gqa-head-order",
        "sampling.top-p-drops-crossing",
        "sampling.zero-probability",
        "sampling.filter-before-temperature",
    ],
)
def test_gate_is_red_on_its_plant(spec, small_cfg, dataset, plant_id):
    plant, before = load_museum()[plant_id], touches()
    with plant.apply():
        verdict = call_check(spec.gates[plant.gate], gather(small_cfg, dataset, torch.device("cpu"))[1])
    assert verdict.outcome == "fail" and verdict.message and touches() > before


def test_chi_square_sees_two_percent(spec, ingredients):
    honest = ingredients["pick"]

    def skewed(probs, uniforms):
        moved = probs.clone()
        if probs.shape == (8,) and probs[0] > 0.3 and probs[1] > 0.2:
            moved[0], moved[1] = probs[0] - 0.02, probs[1] + 0.02
        return honest(moved, uniforms)

    verdict = call_check(spec.gates["sampling.distribution"], ingredients | {"pick": skewed})
    assert verdict.outcome == "fail" and verdict.measured["p_value"] < 1e-12 and verdict.measured["impossible_draws"] == 0


def cadence(spec, every=100, **started):
    check = Cadence(limits_of(spec.gates["sampling.cadence"]))
    return check, check.observe(Started(**{"step": 0, "plan": {"sample_every": every}} | started))


def steps(check, first, last):
    return [check.observe(step_taken(step=s)).outcome for s in range(first, last + 1)]


def test_cadence_is_red_one_step_too_late(spec):
    check, announced = cadence(spec, every=20)
    assert announced is None
    assert steps(check, 1, 20) == ["pass"] * 20 and check.observe(Sampled(step=20, text="a")).passed
    assert steps(check, 21, 41) == ["pass"] * 20 + ["fail"]
    check, _ = cadence(spec)
    assert steps(check, 1, 101) == ["pass"] * 100 + ["fail"], "and never more than the spec allows"


def test_cadence_refuses_a_plan_with_rare_samples(spec):
    assert cadence(spec, every=101)[1].outcome == "fail"
    assert cadence(spec, every=100)[1] is None


def test_the_last_step_has_its_sample(spec):
    check, _ = cadence(spec, every=20)
    steps(check, 1, 5)
    assert not check.observe(Finished(step=5, status="completed")).passed
    check.observe(Sampled(step=5, text="a"))
    assert check.observe(Finished(step=5, status="completed")).passed


def test_cadence_goes_on_over_a_resume(spec):
    first, _ = cadence(spec, every=20)
    first.observe(Sampled(step=20, text="a"))
    second = Cadence(limits_of(spec.gates["sampling.cadence"]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.observe(Started(step=30, plan={"sample_every": 20}))
    assert steps(second, 31, 41) == ["pass"] * 10 + ["fail"]

"""Gates of sampling: parity and distribution."""

import pytest
import torch

from stackproof.contracts.gate import call_check
from stackproof.museum.plant import load_museum, touches
from stackproof.subject.assemble import subject_of
from tests.subjects import changed


@pytest.mark.parametrize("gate_id", ["sampling.cache-parity", "sampling.distribution"])
def test_gate_is_green_on_the_stack(spec, subject, gate_id):
    verdict = call_check(spec.gates[gate_id], subject)
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
        subject = subject_of(small_cfg, dataset, torch.device("cpu"))
        verdict = call_check(spec.gates[plant.gate], subject)
    assert verdict.outcome == "fail" and verdict.message and touches() > before


def test_chi_square_sees_two_percent(spec, subject):
    honest = subject.sampling.pick

    def skewed(probs, uniforms):
        moved = probs.clone()
        if probs.shape == (8,) and probs[0] > 0.3 and probs[1] > 0.2:
            moved[0], moved[1] = probs[0] - 0.02, probs[1] + 0.02
        return honest(moved, uniforms)

    verdict = call_check(
        spec.gates["sampling.distribution"], changed(subject, sampling={"pick": skewed})
    )
    assert (
        verdict.outcome == "fail"
        and verdict.measured["p_value"] < 1e-12
        and verdict.measured["impossible_draws"] == 0
    )

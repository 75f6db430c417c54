"""Tracing where the model lies: on a CPU, and on a GPU if there is one, the same figures, the same
place named, nothing left behind.
"""

import copy

import pytest
import torch

from stackproof.trace import bisect, compare, compare_gradients, trace, variant
from tests.trace import models

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
        id="cuda",
    ),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def on(device, name="plain"):
    return models.ours(name).to(device), models.ids().to(device)


@pytest.mark.parametrize("name", ["plain", "qk-norm", "experts", "differential"])
def test_figures_are_those_of_the_cpu_and_logits_are_not_touched(device, name):
    """Rounding of two devices apart; TF32 is not asked for, so float32 is float32 on both."""
    model, ids = on(device, name)
    found, there = trace(model, ids), trace(models.ours(name), models.ids())
    with torch.no_grad():
        assert torch.equal(found.logits, model(ids)) and found.logits.device.type == device.type
    assert [t.point.name for t in found.points] == [t.point.name for t in there.points]
    for here, same in zip(found.points, there.points):
        if not here.point.slot.startswith("experts."):
            assert here.stat.std == pytest.approx(same.stat.std, rel=1e-4, abs=1e-6), (
                here.point.name
            )
            assert here.stat.rms == pytest.approx(same.stat.rms, rel=1e-4, abs=1e-6), (
                here.point.name
            )


def test_a_planted_row_is_named_by_comparison_and_bisection(device):
    good, ids = on(device)
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[1].ffn.up.weight[3] += 0.5
    assert (
        compare(variant(good), variant(bad), ids).first_divergence.point.name == "layers.1.ffn.up"
    )
    assert [p.name for p in bisect(variant(good), variant(bad), ids).guilty] == ["layers.1.ffn.up"]
    assert compare(variant(good), variant(copy.deepcopy(good)), ids).first_divergence is None


@pytest.mark.parametrize("way", ["float64", "reference", "bfloat16"])
def test_another_precision_and_the_reference_differ_by_rounding(device, way):
    model, ids = on(device)
    assert compare(variant(model), variant(model, way), ids).first_divergence is None
    assert compare_gradients(variant(model), variant(model, way), ids).first is None


def test_what_is_not_finite_is_compared_where_it_lies(device):
    good, ids = on(device)
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[1].ffn.gate.weight[0] = float("nan")
    found = compare(variant(good), variant(bad), ids)
    assert (
        found.first_divergence.point.name == "layers.1.ffn.gate"
        and found.first_divergence.added_err == float("inf")
    )
    assert compare(variant(bad), variant(copy.deepcopy(bad)), ids).first_divergence is None

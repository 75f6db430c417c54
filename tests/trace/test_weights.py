"""Parameters and their change between two checkpoints, against what torch says of them."""

import copy

import pytest
import torch
from torch import nn

from stackproof.cli.trace.weights import sizes
from stackproof.spec.errors import UsageError
from stackproof.trace import weights
from stackproof.trace.profile import of_spreads
from tests.trace.models import ours


@pytest.fixture
def model():
    return ours("plain")


def test_every_parameter_once_with_torchs_own_figures(model):
    found = weights(model)
    assert [w.point.name for w in found] == [n for n, _ in model.named_parameters()]
    for w, p in zip(found, model.parameters()):
        wide = p.detach().double()
        assert w.stat.n == p.numel() and w.update is None and w.update_ratio is None
        assert w.stat.rms == pytest.approx(float(wide.square().mean().sqrt()), rel=1e-6)
        assert w.stat.std == pytest.approx(float(wide.std(correction=0)), rel=1e-5, abs=1e-9)
        assert w.stat.absmax == pytest.approx(float(wide.abs().max()))
    by_name = {w.point.name: w.point for w in found}
    assert (by_name["layers.1.ffn.up.weight"].layer, by_name["layers.1.ffn.up.weight"].slot) == (
        1,
        "ffn.up.weight",
    )
    assert by_name["embed.weight"].layer is None


def test_a_change_is_that_of_float64_and_none_is_exactly_none(model):
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[0].ffn.up.weight.add_(1e-3)
    found = {w.point.name: w for w in weights(model, before)}
    moved = found["layers.0.ffn.up.weight"]
    assert moved.update.rms == pytest.approx(1e-3, rel=1e-4)
    assert moved.update_ratio == pytest.approx(
        1e-3 / float(before.layers[0].ffn.up.weight.detach().double().square().mean().sqrt()),
        rel=1e-4,
    )
    assert all(
        w.update.absmax == 0 and w.update_ratio in (0.0, None)
        for n, w in found.items()
        if n != "layers.0.ffn.up.weight"
    )


def test_another_model_is_refused(model):
    with pytest.raises(UsageError, match="other parameters"):
        weights(model, nn.Linear(3, 3))


def test_a_matrix_out_of_line_is_named_and_a_fresh_model_is_clean():
    fresh = ours("small", n_layers=6)
    assert of_spreads(sizes(weights(fresh))).first_anomaly is None
    with torch.no_grad():
        for layer in fresh.layers:
            layer.attention.out.weight.zero_()
    assert of_spreads(sizes(weights(fresh))).first_anomaly is None, (
        "zero in every layer is a way to begin"
    )
    with torch.no_grad():
        fresh.layers[3].ffn.down.weight.mul_(20.0)
    assert of_spreads(sizes(weights(fresh))).first_anomaly.point == "layers.3.ffn.down.weight"

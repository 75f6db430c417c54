"""One model by itself: the founding run replayed, massive activations told from bugs,
baselines named.
"""

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stackproof.trace import profile as judged
from stackproof.trace import trace
from stackproof.trace.profile import of_spreads, profile
from tests.trace import models

FOUNDING = Path(__file__).with_name("founding_run.csv")


@pytest.fixture(scope="module")
def founding():
    """std by (layer, slot) of the founding run, in execution order."""
    with open(FOUNDING, encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == 28
    return {
        (int(r["layer"]), s.replace("ffn_", "ffn.") if s != "ffn_norm" else s): float(r[s])
        for r in lines
        for s in r
        if s != "layer"
    }


def test_the_founding_run_replayed(founding):
    """The figures of the founding note's table, and the verdict they support:
    not the indexing bug that was named then.
    """
    found = of_spreads(founding)
    rows = {r.point: r for r in found.rows}
    first = found.first_anomaly
    assert (
        first.point == "layers.3.ffn.swiglu" and first.baseline == "layer 2 and median of 28 layers"
    )
    assert first.ratio_to_previous == pytest.approx(
        17.2, abs=0.05
    ) and first.robust_z == pytest.approx(2.85, abs=0.005)
    assert (
        rows["layers.27.ffn.swiglu"].robust_z == pytest.approx(3.87, abs=0.005)
        and not rows["layers.27.ffn.swiglu"].anomalous
    )
    assert rows["layers.3.ffn.out"].robust_z == pytest.approx(3.56, abs=0.005)
    assert (
        max(r.robust_z for r in found.rows if r.slot == "ffn.out")
        == rows["layers.3.ffn.out"].robust_z
    )
    assert [r.point for r in found.rows if r.cascade] == ["layers.3.ffn.out"]
    gains = {g.layer: g.gain for g in found.gains}
    assert (
        gains[3] == pytest.approx(5.45, abs=0.005)
        and all(1.3 <= gains[i] <= 1.45 for i in (1, 2))
        and all(2.9 <= gains[i] <= 3.3 for i in (4, 5))
    )
    assert (
        "does not raise the gain" in found.verdict
        and "massive activation is likely, and not shown" in found.verdict
    )


def test_without_the_anomaly_nothing_is_named(founding):
    clean = founding | {(3, "ffn.swiglu"): 0.2, (3, "ffn.out"): 1.0}
    assert of_spreads(clean).first_anomaly is None


def test_a_misaligned_product_does_not_raise_the_gain_and_common_outliers_do():
    """Normal gates and ups, and both with the same outlying token and channel; gain over 20 draws
    each: 1.0 to 1.4, and 9 or more.
    """
    highest, lowest = 0.0, math.inf
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        gate, up = (torch.randn(64, 128, generator=draw) for _ in range(2))
        up = up + 0.5 * gate  # correlated, as trained ones are

        def gain(g, u, roll=0):
            s = F.silu(g)
            return float((s * u.roll(roll, -1)).std() / (s.std() * u.std()))

        highest = max(highest, gain(gate, up, roll=1))
        assert gain(gate, up, roll=1) <= gain(gate, up)
        gate[5, 7], up[5, 7] = 60.0, 60.0
        lowest = min(lowest, gain(gate, up))
        assert gain(gate, up, roll=1) < 2
    assert highest < 2 < 9 < lowest


def outlier(layer, model, size):
    """Make one channel of one token huge behind the gated product of one layer."""
    down = model.layers[layer].ffn.down

    def hook(module, args):
        (x,) = args
        x = x.clone()
        x[0, 2, 5] += size
        return (x,)

    return down.register_forward_pre_hook(hook)


def test_a_massive_activation_is_recognised_and_a_wrong_scale_is_not_taken_for_one():
    model, ids = models.ours("small", n_layers=6), models.ids()
    handle = outlier(3, model, 300.0)
    found = profile(trace(model, ids))
    handle.remove()
    rows = {r.point: r for r in found.rows}
    assert rows["layers.3.ffn.swiglu"].massive and rows["layers.3.ffn.swiglu"].anomalous
    assert (
        found.first_anomaly.point == "layers.3.ffn.swiglu"
        and "massive activation" in found.verdict
        and "no sign of a bug" in found.verdict
    )

    scaled = model.layers[3].ffn.down.register_forward_pre_hook(lambda m, a: (a[0] * 40,))
    found = profile(trace(model, ids))
    scaled.remove()
    assert found.first_anomaly.point == "layers.3.ffn.swiglu" and not found.first_anomaly.massive
    assert "massive" not in found.verdict
    assert "layers.3.ffn.out" in [r.point for r in found.rows if r.cascade]


def test_a_bug_beside_a_massive_activation_is_still_named():
    model, ids = models.ours("small", n_layers=6), models.ids()
    handle = outlier(1, model, 300.0)
    with torch.no_grad():
        model.layers[4].attention.v.weight *= 60
    found = profile(trace(model, ids))
    handle.remove()
    assert found.first_anomaly.point == "layers.4.v" and not found.first_anomaly.massive


@pytest.mark.parametrize("name", [*models.OURS])
def test_clean_models_have_no_anomaly(name):
    """Random models of every variant; the largest ratio between layers of these was 2.4."""
    assert profile(trace(models.ours(name), models.ids())).first_anomaly is None


def test_a_dead_point_is_an_anomaly():
    model = models.ours("small", n_layers=6)
    with torch.no_grad():
        model.layers[2].ffn.up.weight.zero_()
    assert profile(trace(model, models.ids())).first_anomaly.point == "layers.2.ffn.up"


def test_the_baseline_is_always_named_and_missing_where_there_is_none():
    few = profile(trace(models.ours("small", n_layers=2), models.ids()))
    assert {r.baseline for r in few.rows if r.layer == 0} == {"none"} and {
        r.baseline for r in few.rows if r.layer == 1
    } == {"layer 0"}
    assert all(r.robust_z is None for r in few.rows)
    many = profile(trace(models.ours("small", n_layers=6), models.ids()))
    assert {r.baseline for r in many.rows if r.layer == 0} == {"median of 6 layers"}
    assert {r.baseline for r in many.rows if r.layer == 5} == {"layer 4 and median of 6 layers"}


def test_layers_of_unequal_support_have_no_ratio():
    """Hard capacity: layer 1 reads half of the tokens, so its figures are no
    multiple of those of layer 0.
    """
    found = profile(trace(models.ours("hard-depth"), models.ids()))
    rows = {r.point: r for r in found.rows}
    assert (
        rows["layers.1.ffn.swiglu"].ratio_to_previous is None
        and rows["layers.1.resid_out"].ratio_to_previous is not None
    )


def test_thresholds_are_told_apart_by_the_founding_run(founding):
    """The figures that the thresholds stand between."""
    rows = of_spreads(founding).rows
    after = [r for r in rows if r.layer <= 4 and r.layer >= 3]
    clean = [
        max(r.ratio_to_previous, 1 / r.ratio_to_previous)
        for r in rows
        if r.ratio_to_previous and r not in after
    ]
    assert max(clean) == pytest.approx(4.8, abs=0.01) and max(clean) < judged.RATIO < 17.2

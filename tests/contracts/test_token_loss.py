"""The gate of the first loss: two-sided for untrained models, one-sided for all others."""

import math

import pytest

from stackproof.contracts.events import LossMeasured, Started
from stackproof.contracts.gate import limits_of
from stackproof.contracts.token_loss import FirstLoss
from stackproof.museum.collection import museum_config
from stackproof.museum.plant import load_museum
from stackproof.spec.errors import GateFailed
from stackproof.train.loop import train
from stackproof.train.start import fresh

GATE = "loss.first"
GUESSING = math.log(257)


def first(spec, gap: float, *, step: int = 0, **plan):
    """The verdict on a first loss that is `gap` nats above guessing."""
    check = FirstLoss(limits_of(spec.gates[GATE]))
    assert check.observe(Started(step, plan)) is None
    return check.observe(LossMeasured(step + 1, GUESSING + gap, 100, 257))


def test_first_loss_is_two_sided_for_an_untrained_model(spec):
    for gap, outcome in ((0.49, "pass"), (-0.49, "pass"), (0.51, "fail"), (-0.51, "fail")):
        assert first(spec, gap, untrained=True).outcome == outcome, gap
    for gap, outcome in ((0.99, "pass"), (-5.0, "pass"), (1.01, "fail"), (math.inf, "fail")):
        assert first(spec, gap).outcome == outcome, gap
        assert first(spec, gap, untrained=False).outcome == outcome, gap


def test_only_the_first_loss_that_was_measured_is_judged(spec):
    check = FirstLoss(limits_of(spec.gates[GATE]))
    check.observe(Started(0, {}))
    assert check.observe(LossMeasured(1, math.nan, 0, 257)) is None
    assert check.observe(LossMeasured(2, GUESSING, 9, 257)).passed
    assert check.observe(LossMeasured(3, GUESSING + 9, 9, 257)) is None


def test_a_resumed_run_is_judged_again(spec):
    """Its gate begins afresh, so that it has a verdict of its own."""
    check = FirstLoss(limits_of(spec.gates[GATE]))
    check.observe(Started(0, {"untrained": True}))
    assert check.observe(LossMeasured(1, GUESSING, 9, 257)).passed
    resumed = FirstLoss(limits_of(spec.gates[GATE]))
    resumed.load_state_dict(check.state_dict())
    resumed.observe(Started(1, {"untrained": False}))
    assert resumed.observe(LossMeasured(2, GUESSING - 3, 9, 257)).passed


@pytest.fixture
def cfg(museum_folder):
    base = museum_config(museum_folder)
    return base.model_copy(update={"train": base.train.model_copy(update={"max_steps": 9})})


def results(record):
    return next(g for g in record.gates if g.id == GATE)


def test_our_models_begin_at_guessing(cfg, tmp_path):
    """Measured 0.03 nats above ln 384. A run whose checkpoint is continued has a verdict too."""
    result = results(train(fresh(cfg, (), tmp_path / "run", only=(GATE,))))
    assert result.verdict == "pass" and result.checks == 1
    assert 0 < result.measured["gap_nats"] < 0.1
    longer = cfg.model_copy(update={"train": cfg.train.model_copy(update={"max_steps": 11})})
    child = fresh(longer, (), tmp_path / "child", parent=tmp_path / "run", only=(GATE,))
    result = results(train(child))
    assert result.verdict == "pass" and "gap_nats" not in result.measured


def test_logits_twelve_times_too_large_halt_the_run_at_its_first_step(cfg, tmp_path):
    plant = load_museum()["model.logits-scaled"]
    with plant.apply(), pytest.raises(GateFailed, match="the first loss is") as caught:
        train(fresh(cfg, (), tmp_path / "run", only=(GATE,)))
    assert results(caught.value.record).first_failure_step == 1

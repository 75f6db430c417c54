"""The gate of the first loss: two-sided for untrained models, one-sided for all others."""

import math

import pytest
import torch
from torch.nn import functional

from stackproof.contracts.events import LossMeasured, Started
from stackproof.contracts.gate import limits_of
from stackproof.contracts.token_loss import FirstLoss
from stackproof.model.build import build_model
from stackproof.museum.collection import museum_config
from stackproof.museum.plant import load_museum
from stackproof.recipes.pocket import pocket
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


@pytest.mark.parametrize("seed", range(4))
def test_a_model_of_bytes_begins_at_ln_256(spec, seed):
    """ln 256 = 5.545; measured 0.06 to 0.08 above it, with the 257th id, the end of text. Guessing
    among half of the bytes is red.
    """
    model = build_model(pocket().model, 257, seed=seed).eval()
    ids = torch.randint(0, 257, (2, 129), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(ids[:, :-1])
    loss = float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    assert abs(loss - math.log(256)) < 0.3
    for vocab_size, outcome in ((257, "pass"), (128, "fail")):
        check = FirstLoss(limits_of(spec.gates[GATE]))
        check.observe(Started(0, {"untrained": True}))
        assert check.observe(LossMeasured(1, loss, 256, vocab_size)).outcome == outcome


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

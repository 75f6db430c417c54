"""Gates of the loss: green on the stack, red on a one percent error."""

import math

import pytest
import torch

from stackproof.contracts import loss
from stackproof.contracts.gate import call_check
from stackproof.contracts.loss import CANCELLED_FRAC, gradient_errors, ragged_rows
from stackproof.museum.plant import load_museum
from tests.subjects import changed, with_trainees


def test_golden_is_green_on_the_stack(spec, subject):
    verdict = call_check(spec.gates["loss.golden"], subject)
    assert verdict.outcome == "pass"
    assert verdict.measured["abs_error"] < 1e-6  # measured worst case 2.4e-7


def test_golden_is_red_on_one_percent(spec, subject):
    honest, mean = subject.training.cross_entropy_sum, subject.training.mean_nats
    for part in (
        {"cross_entropy_sum": lambda logits, labels: honest(logits, labels) * 1.01},
        {"mean_nats": lambda *given: mean(*given) * 1.01},
    ):
        verdict = call_check(spec.gates["loss.golden"], changed(subject, training=part))
        assert verdict.outcome == "fail"


def test_partition_is_green_on_the_stack(spec, subject):
    verdict = call_check(spec.gates["loss.partition-equivalence"], subject)
    assert verdict.outcome == "pass"
    assert verdict.measured["rel_error"] < 2e-5  # five times below the limit


def test_partition_is_red_on_one_percent(spec, subject):
    def skewed(trainee):
        def accumulate(batches):
            nats = trainee.accumulate(batches)
            for p in trainee.model.parameters():
                p.grad.mul_(1.01 if len(batches) > 1 else 1.0)
            return nats

        return accumulate

    verdict = call_check(
        spec.gates["loss.partition-equivalence"], with_trainees(subject, accumulate=skewed)
    )
    assert verdict.outcome == "fail"
    assert verdict.measured["rel_error"] == pytest.approx(0.01, rel=0.05)


def test_a_gradient_that_is_rounding_is_no_finding_and_one_above_it_is():
    wanted = {
        "matrix": torch.tensor([1.0]),
        "key bias": torch.tensor([2e-11]),
        "small": torch.tensor([5e-6]),
    }
    errors = gradient_errors(
        {
            "matrix": torch.tensor([1.01]),
            "key bias": torch.tensor([-1e-11]),
            "small": torch.tensor([5.05e-6]),
        },
        wanted,
    )
    assert errors["matrix"] == pytest.approx(0.01, rel=1e-4) and errors["small"] == pytest.approx(
        0.01, rel=1e-4
    )
    assert errors["key bias"] == pytest.approx(3e-5, rel=1e-4)


def test_a_gradient_that_nearly_cancels_may_keep_its_rounding_and_not_a_wrong_value(spec):
    """λ's share of the whole, and its error, as measured in the worst of 210 clean runs; a percent
    of it, or its absence, is red.
    """
    limit = spec.gates["loss.partition-equivalence"].limits["rel_error_max"]
    wanted = {
        "matrix": torch.tensor([1.0], dtype=torch.float64),
        "lambda": torch.tensor([1.18e-6], dtype=torch.float64),
    }

    def error(factor: float) -> float:
        return gradient_errors(
            {"matrix": wanted["matrix"], "lambda": wanted["lambda"] * factor},
            wanted,
            CANCELLED_FRAC,
        )["lambda"]

    assert error(1 + 2.9e-4) == pytest.approx(6.84e-6, rel=1e-2) and limit.allows(error(1 + 2.9e-4))
    assert not limit.allows(error(1.01)) and not limit.allows(error(0.0))
    assert gradient_errors(
        {"matrix": 1.01 * wanted["matrix"], "lambda": wanted["lambda"]}, wanted, CANCELLED_FRAC
    )["matrix"] == pytest.approx(0.01)


def test_what_is_absent_or_not_a_number_is_infinitely_wrong():
    wanted = {"a": torch.ones(2), "b": torch.ones(2), "zero": torch.zeros(2)}
    errors = gradient_errors({"a": torch.tensor([1.0, math.nan]), "zero": torch.zeros(2)}, wanted)
    assert errors == {"a": math.inf, "b": math.inf, "zero": 0.0}


def test_partition_judges_rows_that_differ_in_their_labels(spec, subject):
    """Rows too short to differ are no batch that the claim can be judged on."""
    labels = ragged_rows(subject.model).labels
    assert (labels != -100).sum(1).tolist() == [64, 54, 43, 32, 22]
    short = changed(subject, model={"max_length": 3})
    verdict = call_check(spec.gates["loss.partition-equivalence"], short)
    assert verdict.outcome == "fail" and "too short" in verdict.message


@pytest.mark.parametrize(
    "plant_id",
    ["loss.mean-of-means", "loss.undivided-accumulation", "loss.stale-gradients", "loss.rows-leak"],
)
def test_partition_names_the_partition_that_breaks(spec, subject, plant_id):
    with load_museum()[plant_id].apply():
        verdict = call_check(spec.gates["loss.partition-equivalence"], subject)
    assert verdict.outcome == "fail"
    assert (
        verdict.measured["rel_error"]
        > 10 * spec.gates["loss.partition-equivalence"].limits["rel_error_max"].value
    )


def test_nan_is_visible_on_the_stack(spec, subject):
    verdict = call_check(spec.gates["loss.nan-visible"], subject)
    assert verdict.outcome == "pass" and verdict.measured == {"hidden": 0, "moved": 0}


@pytest.mark.parametrize(
    "plant_id",
    ["loss.nan-micro-batch-skipped", "loss.nan-made-zero", "loss.nan-gradient-made-zero"],
)
def test_nan_visible_is_red_on_its_plants(spec, subject, plant_id):
    with load_museum()[plant_id].apply():
        verdict = call_check(spec.gates["loss.nan-visible"], subject)
    assert (
        verdict.outcome == "fail"
        and verdict.measured["hidden"] >= 1
        and verdict.measured["moved"] >= 1
    )


def test_nan_visible_is_red_on_an_update_that_is_reported_as_not_made(spec, subject):
    def moving(trainee):
        def step(batches):
            report = trainee.step(batches)
            with torch.no_grad():
                next(trainee.model.parameters()).mul_(0.999)
            return report

        return step

    verdict = call_check(spec.gates["loss.nan-visible"], with_trainees(subject, step=moving))
    assert verdict.outcome == "fail" and verdict.measured == {"hidden": 0, "moved": 3}


def test_golden_is_red_on_a_term_of_the_log_normaliser(spec, subject):
    """Logits of a normalised distribution have none, so a z-term shows only where they are shifted:
    measured 8.4e-3 nats.
    """
    with load_museum()["loss.z-term-reported"].apply():
        verdict = call_check(spec.gates["loss.golden"], subject)
    assert verdict.outcome == "fail" and verdict.measured["worst"] == "shifted"


def test_a_gradient_of_another_shape_is_an_infinite_error(monkeypatch):
    """Also where its last piece would broadcast."""
    monkeypatch.setattr(loss, "PIECE_NUMBERS", 4)
    for n in (4, 6, 9):
        assert gradient_errors({"w": torch.ones(n)}, {"w": torch.ones(5)}) == {"w": math.inf}
    assert gradient_errors({"w": torch.ones(5)}, {"w": torch.ones(5)}) == {"w": 0.0}

"""Gates of the loss: green on the stack, red on a one percent error."""

import math

import pytest
import torch

from stackproof.contracts.gate import call_check
from stackproof.contracts.loss import CANCELLED_FRAC, gradient_errors
from stackproof.museum.plant import load_museum


def test_golden_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["loss.golden"], ingredients)
    assert verdict.outcome == "pass"
    assert verdict.measured["abs_error"] < 1e-6  # measured worst case 2.4e-7


def test_golden_is_red_on_one_percent(spec, ingredients):
    honest = ingredients["cross_entropy_sum"]
    off = ingredients | {"cross_entropy_sum": lambda logits, labels: honest(logits, labels) * 1.01}
    assert call_check(spec.gates["loss.golden"], off).outcome == "fail"


def test_partition_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["loss.partition-equivalence"], ingredients)
    assert verdict.outcome == "pass"
    assert verdict.measured["rel_error"] < 2e-5  # five times below the limit


def test_partition_is_red_on_one_percent(spec, ingredients):
    honest = ingredients["gradient_of"]

    def skewed(parts):
        nats, grads = honest(parts)
        return nats, {k: g * (1.01 if len(parts) > 1 else 1.0) for k, g in grads.items()}

    verdict = call_check(
        spec.gates["loss.partition-equivalence"], ingredients | {"gradient_of": skewed}
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


def test_partition_refuses_a_batch_that_is_not_ragged(spec, ingredients):
    ids, labels = ingredients["ragged_batch"]
    full = labels.clone()
    full[full == -100] = 1
    verdict = call_check(
        spec.gates["loss.partition-equivalence"], ingredients | {"ragged_batch": (ids, full)}
    )
    assert verdict.outcome == "fail" and "ragged" in verdict.message


@pytest.mark.parametrize(
    "plant_id",
    ["loss.mean-of-means", "loss.undivided-accumulation", "loss.stale-gradients", "loss.rows-leak"],
)
def test_partition_names_the_partition_that_breaks(spec, ingredients, plant_id):
    with load_museum()[plant_id].apply():
        verdict = call_check(spec.gates["loss.partition-equivalence"], ingredients)
    assert verdict.outcome == "fail"
    assert (
        verdict.measured["rel_error"]
        > 10 * spec.gates["loss.partition-equivalence"].limits["rel_error_max"].value
    )


def test_nan_is_visible_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["loss.nan-visible"], ingredients)
    assert verdict.outcome == "pass" and verdict.measured == {"hidden": 0, "moved": 0}


@pytest.mark.parametrize("plant_id", ["loss.nan-micro-batch-skipped", "loss.nan-made-zero"])
def test_nan_visible_is_red_on_its_plants(spec, ingredients, plant_id):
    with load_museum()[plant_id].apply():
        verdict = call_check(spec.gates["loss.nan-visible"], ingredients)
    assert (
        verdict.outcome == "fail"
        and verdict.measured["hidden"] >= 1
        and verdict.measured["moved"] >= 1
    )


def test_nan_visible_is_red_on_an_update_that_says_it_was_not_made(spec, ingredients):
    honest = ingredients["poisoned_step"]
    verdict = call_check(
        spec.gates["loss.nan-visible"],
        ingredients | {"poisoned_step": lambda which: (honest(which)[0], which == 1)},
    )
    assert verdict.outcome == "fail" and verdict.measured == {"hidden": 0, "moved": 1}


def test_golden_is_red_on_a_term_of_the_log_normaliser(spec, ingredients):
    """Logits of a normalised distribution have none, so a z-term shows only where they are shifted:
    measured 8.4e-3 nats.
    """
    with load_museum()["loss.z-term-reported"].apply():
        verdict = call_check(spec.gates["loss.golden"], ingredients)
    assert verdict.outcome == "fail" and verdict.measured["worst"] == "shifted"


def test_own_batch_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["loss.own-batch"], ingredients)
    assert verdict.outcome == "pass" and verdict.measured["rel_error"] < 1e-7  # measured 3.9e-10
    assert verdict.measured["n_valid"] > 1000, "rows of full length"
    assert all(documents is not None for _, _, documents in ingredients["own_step"]()[1]), (
        "packed rows"
    )


def test_own_batch_is_red_on_its_plants_and_on_one_label(spec, ingredients):
    gate = spec.gates["loss.own-batch"]
    for plant_id in gate.plants:
        with load_museum()[plant_id].apply():
            assert call_check(gate, ingredients).outcome == "fail", plant_id
    nats, parts, logits_of = ingredients["own_step"]()
    ids, labels, documents = parts[0]
    assert call_check(gate, {"own_step": lambda: (1.01 * nats, parts, logits_of)}).outcome == "fail"
    other = labels.clone()
    other[0, -40] = (other[0, -40].clamp(min=0) + 1) % 384
    cut = [(ids, labels, 9 * documents + (torch.arange(ids.shape[1]) >= 100)), *parts[1:]]
    for changed in ([(ids, other, documents), *parts[1:]], cut, parts[1:]):
        verdict = call_check(gate, {"own_step": lambda changed=changed: (nats, changed, logits_of)})
        assert verdict.outcome == "fail" and verdict.measured["rel_error"] > 5e-5

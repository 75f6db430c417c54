"""Step gates against hand-made events, two-sided."""

import random

import pytest

from contracts.events import Started
from contracts.gate import limits_of
from contracts.runtime import Finite, LossNotConstant, LossSpike, ParamsChanged, StepTime, TokensConsumed
from tests.contracts.test_optim import step_taken

PLAN = {"tokens_per_step": 100, "tokens_seen": 0, "random_loss_nats": 6.0, "warmup_steps": 5}


def make(spec, cls):
    return cls(limits_of(spec.gates[cls.gate_id]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_is_red_on_nan_and_infinity(spec, bad):
    check = make(spec, Finite)
    assert check.observe(step_taken()).passed
    assert not check.observe(step_taken(loss_nats=bad)).passed
    assert not check.observe(step_taken(grad_norm=bad)).passed
    assert not check.observe(step_taken(overflow_retries=21)).passed
    assert check.observe(step_taken(overflow_retries=20)).passed


def test_params_changed_is_two_sided(spec):
    check = make(spec, ParamsChanged)
    assert check.observe(step_taken(changed_tensor_frac=0.9)).passed
    assert not check.observe(step_taken(changed_tensor_frac=0.89)).passed
    assert check.observe(step_taken(changed_tensor_frac=0.1, lr=1e-8)).passed
    assert not check.observe(step_taken(changed_tensor_frac=0.0, lr=1e-8)).passed


def test_tokens_consumed_is_red_on_one_token(spec):
    check = make(spec, TokensConsumed)
    check.observe(Started(step=0, plan=PLAN))
    assert check.observe(step_taken(tokens_seen=100)).passed
    assert not check.observe(step_taken(tokens_seen=201)).passed
    check.observe(Started(step=0, plan=PLAN))
    assert not check.observe(step_taken(n_expected_tokens=99)).passed
    check.observe(Started(step=0, plan=PLAN))
    assert not check.observe(step_taken(n_valid_tokens=49)).passed


def test_loss_not_constant_fires_at_the_third(spec):
    check = make(spec, LossNotConstant)
    outcomes = [check.observe(step_taken(loss_nats=x)).outcome for x in (1.0, 1.0, 2.0, 2.0, 2.0)]
    assert outcomes == ["pass", "pass", "pass", "pass", "fail"]


def test_loss_not_constant_counts_over_a_resume(spec):
    check, resumed = make(spec, LossNotConstant), make(spec, LossNotConstant)
    check.observe(step_taken(loss_nats=1.0))
    check.observe(step_taken(loss_nats=1.0))
    resumed.load_state_dict(check.state_dict())
    assert not resumed.observe(step_taken(loss_nats=1.0)).passed


def test_step_time_is_red_on_an_impossible_step(spec):
    check = make(spec, StepTime)
    assert all(check.observe(step_taken(wall_s=0.4)).passed for _ in range(10))  # a fortieth of the peak rate
    assert check.observe(step_taken(wall_s=0.4 * 0.06)).passed
    assert not check.observe(step_taken(wall_s=0.4 * 0.04)).passed
    assert not make(spec, StepTime).observe(step_taken(wall_s=1e-9)).passed
    assert not make(spec, StepTime).observe(step_taken(wall_s=0.0)).passed


def test_step_time_is_green_when_a_crowded_machine_is_free_again(spec):
    """From 1.8 s to 48 ms, a tenth of the peak rate; the same leap to over half of it is not believed."""
    for free_s, passes in ((0.048, True), (0.021, True), (0.008, False)):
        check = make(spec, StepTime)
        assert all(check.observe(step_taken(wall_s=1.8, flops=5e8)).passed for _ in range(8))
        assert check.observe(step_taken(wall_s=free_s, flops=5e8)).passed is passes


def test_loss_spike_needs_three_in_a_row(spec):
    check = make(spec, LossSpike)
    check.observe(Started(step=0, plan=PLAN))
    draw = random.Random(0)
    assert all(check.observe(step_taken(step=s, loss_nats=3 + draw.gauss(0, 0.02))).passed for s in range(1, 40))
    assert [check.observe(step_taken(step=40 + i, loss_nats=5.0)).passed for i in range(3)] == [True, True, False]


def test_loss_spike_ignores_noise(spec):
    """20,000 steps of trend and heavy-tailed noise: no alarm."""
    check = make(spec, LossSpike)
    check.observe(Started(step=0, plan=PLAN))
    draw = random.Random(1)
    for s in range(1, 20_001):
        noise = draw.gauss(0, 0.05) * (4 if draw.random() < 0.01 else 1)
        assert check.observe(step_taken(step=s, loss_nats=2.5 + 3 * 0.999**s + noise)).passed


def test_loss_above_guessing_after_warmup_is_red(spec):
    check = make(spec, LossSpike)
    check.observe(Started(step=0, plan=PLAN))
    for s in range(1, 20):
        check.observe(step_taken(step=s, loss_nats=5.5))
    assert not check.observe(step_taken(step=20, loss_nats=7.01)).passed

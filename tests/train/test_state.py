"""What a run keeps in its books between steps."""

import numpy as np
import pytest

from stackproof.train.state import EMA_DECAY, TrainState


def test_the_running_mean_of_the_loss_and_its_lowest_are_their_formulas():
    """m(n) = d^(n-1)·x(1) + (1-d)·Σ d^(n-i)·x(i), in closed form; the lowest is the least of m(1) …
    m(n), a loss of 0 included.
    """
    losses = [9.04, 0.0, 0.0, *np.random.default_rng(3).normal(4, 1, 200).tolist()]
    state, d = object.__new__(TrainState), EMA_DECAY
    state.ema_loss_nats = state.min_ema_loss_nats = None
    means = []
    for n, loss in enumerate(losses, 1):
        state.update_ema(loss)
        ages = n - 1 - np.arange(n)
        means.append(
            d ** (n - 1) * losses[0] + (1 - d) * float((d ** ages[1:] * losses[1:n]).sum())
        )
        assert state.ema_loss_nats == pytest.approx(means[-1], rel=1e-12)
        assert state.min_ema_loss_nats == pytest.approx(min(means), rel=1e-12)


def test_a_mean_of_zero_stays_the_lowest():
    state = object.__new__(TrainState)
    state.ema_loss_nats = state.min_ema_loss_nats = None
    state.update_ema(0.0)
    state.update_ema(1.0)
    assert state.min_ema_loss_nats == 0.0 and state.ema_loss_nats == pytest.approx(1 - EMA_DECAY)

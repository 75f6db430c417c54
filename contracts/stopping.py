"""Gate of the stop rule: it stops on a lack of gain that stands out of the noise,
never on the noise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from stackproof.contracts.gate import (
    Verdict,
    decide_all,
    decides,
    failed,
    measured_by,
    passed,
)
from stackproof.contracts.subject import Evaluation, Subject, Training

NOISE_OVER_GAIN, TREND_ROUNDS, SIMULATIONS = 0.04 / 0.03, 24, 200
CLIFF_NATS, CLIFF_ROUNDS = 0.5, 4
PROBE_ROWS = 24


@dataclass(frozen=True)
class PairedSpread:
    """Spread over held-out batches of `batch_rows` rows of the loss difference between two
    evaluations.
    """

    training: Training
    evaluation: Evaluation
    batch_rows: int

    @cached_property
    def std_nats(self) -> float:
        """Measured once, around an update of a fresh model, where it is largest, row by row, and
        scaled to the batch.
        """
        trainee, rows = self.training.trainee(), self.evaluation.held_out_batches(1, PROBE_ROWS)
        rounds = []
        for _ in range(2):
            trainee.step(trainee.draw())
            rounds.append(torch.tensor([trainee.evaluate(row) for row in rows]))
        return float((rounds[1] - rounds[0]).std()) / self.batch_rows**0.5


@decides("evaluation.stop-rule")
@measured_by(PairedSpread)
def stop_rule(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The run's own rule does not stop on noise around a falling trend, stops on a plateau exactly
    when declared, and detects the awaited gain: 2 standard errors of the paired difference at the
    run's own number of held-out batches are below it. Where the rule has a least improvement that
    counts (min_delta_nats), that must stand out as well: its standard error is at most half of it.

    A gain counts exactly from the larger of min_delta_nats and z standard errors of
    the paired difference on.
    """
    make_rule, declared = subject.stopping.rule, subject.stopping.declared
    if declared["kind"] == "never":
        stopped = sum(d.stop for d in map(make_rule().update, [[1.0, 1.1]] * 64))
        return (
            passed("the run trains all its steps", false_stops=0)
            if not stopped
            else failed("a rule that never stops stopped")
        )
    n_batches, std = subject.stopping.n_eval_batches, subject.stopping.spread.std_nats
    gain = declared["expected_gain_nats"]
    false_stops = sum(
        _stops_on_noise(make_rule(), seed, n_batches, std, gain) for seed in range(SIMULATIONS)
    )
    misread = _threshold_fault(make_rule, declared, n_batches)
    late = _plateau_delay(make_rule(), CLIFF_ROUNDS, declared)
    early = _plateau_delay(make_rule(), 1, declared)
    detectable = 2 * std / math.sqrt(n_batches)
    to_see = min(x for x in (gain, declared["min_delta_nats"]) if x > 0)
    rate = false_stops / SIMULATIONS
    return decide_all(
        [
            not rate <= limits.false_stop_rate_max
            and f"{false_stops} of {SIMULATIONS} simulated runs stop on noise",
            bool(misread) and misread,
            bool(late or early) and "a plateau does not stop the run exactly at best + patience",
            not detectable <= to_see
            and (
                f"{n_batches} held-out batches can detect a gain of {detectable:.3g} nats, a gain "
                f"of {to_see:g} must be detected"
            ),
        ],
        false_stop_rate=rate,
        plateau_delay_rounds=max(abs(late), abs(early)),
        detectable_gain_nats=detectable,
        expected_gain_nats=gain,
        n_eval_batches=n_batches,
    )


def _stops_on_noise(rule: Any, seed: int, n_batches: int, paired_std: float, gain: float) -> bool:
    """Whether the rule ends a run whose loss falls by `gain` a round under noise 4/3 as wide.

    The founding note ship-two-001 saw a band of ±0.04 on a gain of 0.03.

    Each batch keeps its own difficulty over the rounds, and adds noise whose paired differences
    have the measured spread.
    """
    draw = np.random.default_rng(seed)
    difficulty = draw.normal(0, 0.5, n_batches)
    for r in range(TREND_ROUNDS):
        level = 10.0 - gain * r + draw.uniform(-1, 1) * NOISE_OVER_GAIN * gain
        noise = draw.normal(0, paired_std / math.sqrt(2), n_batches)
        if rule.update((level + difficulty + noise - noise.mean()).tolist()).stop:
            return True
    return False


def _threshold_fault(
    make_rule: Callable[[], Any], declared: Mapping[str, Any], n_batches: int
) -> str:
    """What is wrong with the gain from which a round counts as better, or an empty text: one
    percent below and above it are tried.
    """
    level, wide = np.linspace(3.0, 4.0, n_batches), np.resize([1.0, -1.0, 0.5, -0.5], n_batches)
    for spread in (0.0, 0.2):
        uneven = spread * (wide - wide.mean())
        threshold = max(
            declared["min_delta_nats"],
            declared["z"] * float(uneven.std(ddof=1)) / math.sqrt(n_batches),
            1e-6,
        )
        for factor, counts in ((0.99, False), (1.01, True)):
            rule = make_rule()
            rule.update(level.tolist())
            better = rule.update((level - uneven - factor * threshold).tolist()).wait == 0
            if better != counts and not (
                spread == 0 and declared["min_delta_nats"] == 0 and better
            ):
                return (
                    f"a gain of {factor * threshold:.3g} nats "
                    f"{'counts' if better else 'does not count'}, {threshold:.3g} is what counts"
                )
    return ""


def _plateau_delay(rule: Any, falling_rounds: int, declared: Mapping[str, Any]) -> int:
    """Rounds by which the stop misses its declared place on a curve that falls steeply, then stays
    level. −1 if there is no stop.
    """
    due = max(falling_rounds - 1 + declared["patience"], declared["min_evaluations"] - 1)
    for r in range(due + 64):
        level = 10.0 - CLIFF_NATS * min(r, falling_rounds - 1)
        if rule.update([level, level + 0.3, level - 0.2]).stop:
            return r - due
    return -1

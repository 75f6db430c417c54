"""How often a statistical gate is wrong, in both directions: each figure in a gate's `rates` is measured here, or in the test it names.

A rate of 0 in n trials is stated as 3/n, its upper bound at 95 percent. Every simulation has its own seed.
"""

import dataclasses
import pydoc_data.topics
import random
import statistics

import numpy as np
import pytest
import torch

from contracts.coherence import Dominance, Loops, coherence
from contracts.evaluation import OverfitOnset
from contracts.events import Evaluated, Sampled, Started
from contracts.gate import limits_of
from contracts.initial import _law_z
from contracts.memorisation import Memorised, chance_of
from contracts.runtime import LossNotConstant, LossSpike, Trend
from tests.contracts.test_optim import step_taken

WORDS = 60  # of a sample of 96 tokens
STATISTICAL = (
    "evaluation.stop-rule evaluation.overfit-onset sampling.coherence sampling.dominance sampling.loops sampling.memorised "
    "sampling.recitation sampling.distribution runtime.loss-not-constant runtime.loss-spike runtime.trend model.init-law"
).split()


@pytest.mark.parametrize("gate_id", STATISTICAL)
def test_a_statistical_gate_states_both_rates(spec, gate_id):
    rates = spec.gates[gate_id].rates
    assert rates is not None and rates.power > rates.false_alarm


def test_rates_are_not_normative(spec):
    gate = spec.gates["runtime.trend"]
    assert gate.normative() == gate.model_copy(update={"rates": None}).normative()


def stated(spec, gate_id, false_alarms, trials, caught, planted):
    """The figures of the gate against those measured: no more false alarms than stated, and no less power."""
    rates = spec.gates[gate_id].rates
    assert max(false_alarms, 3) / trials <= rates.false_alarm * 1.0001, (false_alarms, trials)
    assert caught / planted >= rates.power, (caught, planted)


def windows():
    """Every piece of 60 words of the interpreter's help topics that does not overlap: healthy prose, tables and code."""
    for name in sorted(pydoc_data.topics.topics):
        words = pydoc_data.topics.topics[name].split()
        yield from (words[i : i + WORDS] for i in range(0, len(words) - WORDS, WORDS))


def looped(words, draw, filled):
    """The first words of a piece, then a loop of 1 to 12 of them that fills `filled` of its length."""
    period = draw.randint(1, 12)
    head = words[: round(WORDS * (1 - filled))]
    return " ".join((head + words[-period:] * WORDS)[:WORDS])


def test_coherence(spec):
    draw, prose = random.Random(1), list(windows())
    low = spec.gates["sampling.coherence"].limits["score_min"].value
    false = sum(coherence(" ".join(w)).score < low for w in prose)
    caught = sum(coherence(looped(w, draw, 1.0)).score < low for w in prose)
    stated(spec, "sampling.coherence", false, len(prose), caught, len(prose))


def test_dominance(spec):
    draw, prose = random.Random(2), list(windows())
    limits = limits_of(spec.gates["sampling.dominance"])

    def high(words):
        check = Dominance(limits)
        check.observe(Sampled(step=1, text=" ".join(words)))
        return check.high

    false = sum(map(high, prose))
    caught = sum(high([w if draw.random() > 0.26 else "a" for w in words]) for words in prose)
    stated(spec, "sampling.dominance", false, len(prose), caught, len(prose))


def test_loops(spec):
    draw, prose = random.Random(3), list(windows())
    check = Loops(limits_of(spec.gates["sampling.loops"]))
    false = sum(not check.observe(Sampled(step=1, text=" ".join(w))).passed for w in prose)
    caught = sum(not check.observe(Sampled(step=1, text=looped(w, draw, 0.75))).passed for w in prose)
    stated(spec, "sampling.loops", false, len(prose), caught, len(prose))


def test_memorised(spec):
    """Losses of honest samples are normal around 2 nats; the worst case, that each of them is found in the corpus."""
    limits = limits_of(spec.gates["sampling.memorised"])
    draw, false, caught = np.random.default_rng(4), 0, 0
    for _ in range(300):
        check, found = Memorised(limits), lambda: 1.0
        honest = draw.normal(2.0, 0.25, 40)
        false += sum(not check.observe(Sampled(step=1, text="", loss_nats=float(x), found_in_corpus=found)).passed for x in honest)
        caught += not check.observe(Sampled(step=1, text="", loss_nats=2.0 - 6 * 0.25, found_in_corpus=found)).passed
    stated(spec, "sampling.memorised", false, 300 * 40, caught, 300)


def test_recitation(spec):
    """Exact: with 32 and 32 passages, the same rate on both sides, the worst rate of all; and half of the training text known."""
    p_min, n = spec.gates["sampling.recitation"].limits["p_value_min"].value, 32
    red = np.array([[chance_of(a, n, b, n) < p_min for b in range(n + 1)] for a in range(n + 1)])

    def probabilities(rate):
        log = [sum(np.log(np.arange(n - k + 1, n + 1))) - sum(np.log(np.arange(1, k + 1))) for k in range(n + 1)]
        k = np.arange(n + 1)
        return np.exp(np.array(log) + k * np.log(rate) + (n - k) * np.log1p(-rate))

    worst = max(float(probabilities(r) @ red @ probabilities(r)) for r in np.linspace(0.01, 0.99, 99))
    power = float(probabilities(0.5)[red[:, 0]].sum())
    rates = spec.gates["sampling.recitation"].rates
    assert worst <= rates.false_alarm < 1.2 * worst and rates.power <= power < rates.power + 0.01


def heavy_tailed(draw, spread):
    return draw.gauss(0, spread) * (4 if draw.random() < 0.01 else 1)


def red_steps(check, losses):
    if Started in check.events:
        check.observe(Started(step=0, plan={"random_loss_nats": 10.8, "warmup_steps": 5}))
    return [s for s, loss in enumerate(losses, 1) if not check.observe(step_taken(step=s, loss_nats=loss)).passed]


def test_trend(spec):
    """200 runs of 1,500 steps under noise of 0.3 nats; then the same that lose 0.004 nats a step from step 500 on."""
    limits, draw = limits_of(spec.gates["runtime.trend"]), random.Random(5)
    curve = [2.5 + 6 * 0.995**s for s in range(1500)]
    false = sum(bool(red_steps(Trend(limits), [x + heavy_tailed(draw, 0.3) for x in curve])) for _ in range(200))
    sick = [x + max(0, s - 500) * 0.004 for s, x in enumerate(curve)]
    caught = sum(bool(red_steps(Trend(limits), [x + heavy_tailed(draw, 0.3) for x in sick[:1000]])) for _ in range(100))
    stated(spec, "runtime.trend", false, 200, caught, 100)


def test_loss_spike(spec):
    """60,000 looks of clean runs; then runs that leave their basin by a nat for good."""
    limits, draw = limits_of(spec.gates["runtime.loss-spike"]), random.Random(6)
    curve = [2.5 + 3 * 0.99**s for s in range(600)]
    false = sum(len(red_steps(LossSpike(limits), [x + heavy_tailed(draw, 0.05) for x in curve])) for _ in range(100))
    jumps = [x + (s > 300) for s, x in enumerate(curve[:320])]
    caught = sum(bool(red_steps(LossSpike(limits), [x + heavy_tailed(draw, 0.05) for x in jumps])) for _ in range(100))
    stated(spec, "runtime.loss-spike", false, 60_000, caught, 100)


def test_loss_not_constant(spec):
    """Equal neighbours among ten million float32 losses with noise of 0.05 nats; the gate wants two such pairs in a row."""
    losses = np.random.default_rng(7).normal(3.0, 0.05, 10_000_000).astype(np.float32)
    twice = max(3, int((losses[1:] == losses[:-1]).sum())) / len(losses)
    assert twice**2 <= spec.gates["runtime.loss-not-constant"].rates.false_alarm
    assert red_steps(LossNotConstant(limits_of(spec.gates["runtime.loss-not-constant"])), [3.0] * 5) == [3, 4, 5]


def test_overfit_onset(spec):
    """Twelve evaluations of 16 batches, paired spread 0.03 nats; held-out loss stands still, or rises by 0.03 a round."""
    limits, draw = limits_of(spec.gates["evaluation.overfit-onset"]), np.random.default_rng(8)
    base = Evaluated(1, 0.0, 1.0, (), "a", None, 10.0)

    def reds(rise):
        check, difficulty, found = OverfitOnset(limits), draw.normal(3, 0.5, 16), 0
        for r in range(12):
            batches = difficulty + rise * r + draw.normal(0, 0.03 / 2**0.5, 16)
            seen = dataclasses.replace(
                base, loss_nats=float(batches.mean()), batch_nats=tuple(batches.tolist()), train_loss_nats=2.0 - 0.01 * r
            )
            found += not check.observe(seen).passed
        return found

    false = sum(reds(0.0) for _ in range(500))
    caught = sum(reds(0.03) > 0 for _ in range(200))
    stated(spec, "evaluation.overfit-onset", false, 500 * 12, caught, 200)


def test_init_law(spec):
    """Normal draws of 16,384 entries: the largest deviation in 2,000, and a spread of five percent less."""
    z_max, draw = spec.gates["model.init-law"].limits["z_max"].value, torch.Generator().manual_seed(9)
    honest = [_law_z(0.02 * torch.randn(16_384, generator=draw), "normal", 0.02) for _ in range(2000)]
    narrow = [_law_z(0.019 * torch.randn(16_384, generator=draw), "normal", 0.02) for _ in range(300)]
    beyond = 2 * (1 - statistics.NormalDist().cdf(z_max)) * 2  # mean and spread, two sides each; 2,000 draws cannot see so little
    assert max(honest) < 5 and beyond <= spec.gates["model.init-law"].rates.false_alarm
    assert sum(z > z_max for z in narrow) / 300 >= spec.gates["model.init-law"].rates.power

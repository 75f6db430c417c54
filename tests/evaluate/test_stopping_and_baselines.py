"""Stop rules against noise and against the founding note ship-two-001; counting baselines."""

import json
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import NeverStop, Patience
from stackproof.contracts.conditions import ContractError
from stackproof.evaluate import baselines
from stackproof.evaluate.stopping import (
    NeverStopRule,
    StopRule,
    batches_needed,
    make_stop_rule,
)

FOUNDING_RUNS = json.loads(
    (Path(__file__).parents[1] / "contracts" / "founding_runs.json").read_text()
)["runs"]
VAL = [r["val_loss"] for r in FOUNDING_RUNS["tuned-50k"]]


def test_the_wrapped_run_of_seed_002_goes_on():
    rule = StopRule(5, 3, 2.0, 0.0)
    assert not any(rule.update([r["val_loss"]] * 2).stop for r in FOUNDING_RUNS["wrapped-5k"])


def test_a_trend_in_a_noise_band_of_four_hundredths_never_stops():
    """Gain 0.03 a round, band ±0.04, 16 batches, 200 runs of 40 rounds: none stops.
    A patience of 2 stops 40 and more of them.
    """
    stopped = {5: 0, 2: 0}
    for seed in range(200):
        draw = np.random.default_rng(seed)
        difficulty = draw.normal(0, 0.5, 16)
        rounds = [
            (10 - 0.03 * r + draw.uniform(-0.04, 0.04) + difficulty).tolist() for r in range(40)
        ]
        for patience in stopped:
            rule = StopRule(patience, 3, 2.0, 0.0)
            stopped[patience] += any(rule.update(r).stop for r in rounds)
    assert stopped[5] == 0 and stopped[2] >= 40


def test_replay_of_seed_002_waits_four_rounds_at_epoch_six():
    rule = StopRule(5, 3, 2.0, 0.0)
    decisions = [rule.update([v, v]) for v in VAL]
    assert [d.best_round for d in decisions] == [0, 1, 2, 2, 2, 2, 2]
    assert [d.wait for d in decisions] == [0, 0, 0, 1, 2, 3, 4]
    assert not any(d.stop for d in decisions)
    assert rule.update([9.9, 9.9]).stop


@pytest.mark.parametrize(("patience", "min_evaluations", "last"), [(2, 3, 2), (5, 3, 5), (2, 9, 8)])
def test_a_plateau_stops_at_best_plus_patience_but_not_before_min_evaluations(
    patience, min_evaluations, last
):
    rule = StopRule(patience, min_evaluations, 2.0, 0.0)
    assert [rule.update([1.0, 2.0]).stop for _ in range(last + 1)] == [False] * last + [True]


def test_pairing_sees_a_gain_far_below_the_spread_of_batches():
    difficulty = np.linspace(8, 12, 16)
    rule = StopRule(5, 3, 2.0, 0.0)
    rule.update(difficulty.tolist())
    decision = rule.update((difficulty - 0.01 + np.tile([0.002, -0.002], 8)).tolist())
    assert decision.improved and decision.se_diff == pytest.approx(
        np.std(np.tile([0.002, -0.002], 8), ddof=1) / 4
    )
    assert not rule.update((difficulty - 0.01 + np.tile([0.2, -0.2], 8)).tolist()).improved


def test_min_delta_must_be_exceeded():
    rule = StopRule(5, 3, 2.0, 0.1)
    rule.update([2.0, 2.0])
    assert not rule.update([1.91, 1.91]).improved
    assert rule.update([1.89, 1.89]).improved


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.1, 9), min_size=3, max_size=3), min_size=2, max_size=12),
    st.data(),
)
def test_a_resumed_rule_decides_the_same(rounds, data):
    cut = data.draw(st.integers(0, len(rounds)))
    straight, first, second = (StopRule(2, 3, 1.0, 0.0) for _ in range(3))
    expected = [straight.update(r) for r in rounds]
    got = [first.update(r) for r in rounds[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + [second.update(r) for r in rounds[cut:]] == expected


def test_never_stop_never_stops_and_keeps_its_books():
    rule = make_stop_rule(NeverStop())
    assert isinstance(rule, NeverStopRule)
    assert not any(rule.update([1.0]).stop for _ in range(50))
    assert rule.wait == 49
    assert isinstance(make_stop_rule(Patience()), StopRule)


def test_rounds_over_other_batches_are_refused():
    rule = StopRule(5, 3, 2.0, 0.0)
    rule.update([1.0, 2.0])
    with pytest.raises(ContractError):
        rule.update([1.0])


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 3), st.floats(0.01, 1))
def test_enough_batches_see_the_gain_and_one_fewer_does_not(std, gain):
    n = batches_needed(std, gain)
    assert 2 * std / math.sqrt(n) <= gain * (1 + 1e-9)
    assert n == 2 or 2 * std / math.sqrt(n - 1) > gain * (1 - 1e-9)


# --- baselines ------------------------------------------------------------------------------------


def stream(ids):
    return SimpleNamespace(
        n_tokens=len(ids), token_range=lambda a, b: np.asarray(ids[a:b], np.uint16)
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=50), st.integers(7, 9))
def test_bigram_probabilities_are_positive_and_sum_to_one_in_every_context(ids, vocab_size):
    model = baselines.Bigram(np.array(ids), vocab_size)
    for a in range(vocab_size):
        probs = model.probs(np.full(vocab_size, a), np.arange(vocab_size))
        assert (probs > 0).all() and probs.sum() == pytest.approx(1, abs=1e-12)
    assert model.unigram.sum() == pytest.approx(1, abs=1e-12)


def test_baselines_by_hand():
    tokenizer = SimpleNamespace(vocab_size=2, token_bytes=np.array([1, 1]))
    train, held_out = stream([0, 1, 0, 1]), stream([0, 1, 1])
    # (2+1)/(4+2) = ½ each
    assert baselines.unigram_bits_per_byte(train, held_out, tokenizer) == pytest.approx(1.0)
    # p(1|0) = (2 + 1·½)/(2 + 1) = 5/6; p(1|1) = (0 + 1·½)/(1 + 1) = 1/4
    assert baselines.bigram_bits_per_byte(train, held_out, tokenizer) == pytest.approx(
        -(math.log2(5 / 6) + math.log2(1 / 4)) / 2
    )
    assert baselines.uniform_loss_nats(50257) == pytest.approx(10.8249, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.lists(st.integers(0, 6), min_size=2, max_size=30),
)
def test_baselines_are_those_of_counting(train, held_out):
    """Against the formulas of Witten and Bell in fractions, pair by pair;
    some held-out tokens were never seen.
    """
    vocab_size, sizes = 7, [1, 2, 3, 1, 2, 3, 1]
    tokenizer = SimpleNamespace(vocab_size=vocab_size, token_bytes=np.array(sizes))
    single = [Fraction(train.count(b) + 1, len(train) + vocab_size) for b in range(vocab_size)]

    def after(a, b):
        seen = [y for x, y in pairwise(train) if x == a]
        kinds = max(1, len(set(seen)))
        return (seen.count(b) + kinds * single[b]) / (len(seen) + kinds)

    n_bytes, labels = sum(sizes[b] for b in held_out[1:]), held_out[1:]
    unigram = -sum(math.log2(single[b]) for b in labels) / n_bytes
    bigram = -sum(math.log2(after(a, b)) for a, b in pairwise(held_out)) / n_bytes
    assert baselines.unigram_bits_per_byte(
        stream(train), stream(held_out), tokenizer
    ) == pytest.approx(unigram, rel=1e-12)
    assert baselines.bigram_bits_per_byte(
        stream(train), stream(held_out), tokenizer
    ) == pytest.approx(bigram, rel=1e-12)


def test_baselines_are_fitted_on_no_more_than_they_say(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_FIT_TOKENS", 4)
    tokenizer = SimpleNamespace(vocab_size=3, token_bytes=np.ones(3, np.int64))
    for f in (baselines.unigram_bits_per_byte, baselines.bigram_bits_per_byte):
        held_out = stream([0, 1, 0])
        assert f(stream([0, 1, 0, 1, 2, 2, 2]), held_out, tokenizer) == f(
            stream([0, 1, 0, 1]), held_out, tokenizer
        )


def test_the_bigram_beats_the_unigram_on_text():
    ids = list(("the quick brown fox jumps over the lazy dog and runs away " * 30).encode())
    tokenizer = SimpleNamespace(vocab_size=257, token_bytes=np.ones(257, np.int32))
    bigram, unigram = (
        f(stream(ids), stream(ids[:300]), tokenizer)
        for f in (baselines.bigram_bits_per_byte, baselines.unigram_bits_per_byte)
    )
    assert 0 < bigram < 0.7 * unigram

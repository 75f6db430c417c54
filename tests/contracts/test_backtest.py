"""A gate is asked about the past: first fire, and the steps and hours that
stopping there would have saved.
"""

import json
from itertools import product

import pytest

from stackproof.contracts.backtest import MAX_TEXT_CHARS, REPLAYABLE, replay
from stackproof.spec.errors import ConfigError, DataError

COLLAPSED = [
    "region " * 8,
    "''''' ''''' '' ''' '' ''' '''?' ''' ' '' '' '",
    "games, " * 6,
    "Budy " * 9,
]
HEALTHY = (
    "The Fourier transform decomposes signals into frequency components, allowing analysis of "
    "signal characteristics."
)


def log_of(tmp_path, lines):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_founding_run_would_have_been_stopped_ten_days_earlier(tmp_path):
    """The founding note ANDREA-120M: collapsed from step 80,000 on, seen at 165,000.
    One sample every 200 steps here.
    """
    lines = [
        {"step": s, "text": HEALTHY if s < 80_000 else COLLAPSED[s // 200 % 4]}
        for s in range(79_000, 165_001, 200)
    ]
    found = replay("sampling.coherence", log_of(tmp_path, lines), seconds_per_step=10.0)
    assert found["first_fire_step"] == 80_800, "the fifth bad sample, not the fourth"
    assert (
        found["saved_steps"] == 84_200
        and found["saved_s"] == 842_000.0
        and found["saved_frac"] == pytest.approx(84_200 / 165_000)
    )


def test_time_saved_is_told_by_the_speed_of_the_lines(tmp_path):
    lines = [
        {
            "step": s,
            "loss_nats": 2.0 + s / 100 * (s < 3),
            "tokens_seen": 100 * s,
            "tokens_per_s": 50.0,
        }
        for s in range(1, 11)
    ]
    found = replay("runtime.loss-not-constant", log_of(tmp_path, lines))
    assert (
        found["first_fire_step"] == 5
        and found["saved_steps"] == 5
        and found["saved_s"] == pytest.approx(10.0)
    )


def test_a_log_that_is_green_saves_nothing(tmp_path):
    found = replay(
        "sampling.coherence", log_of(tmp_path, [{"step": s, "text": HEALTHY} for s in range(9)])
    )
    assert found == found | {
        "first_fire_step": None,
        "fires": 0,
        "saved_steps": 0,
        "saved_frac": 0.0,
        "saved_s": None,
    }


def red_line(key, n):
    return {
        "text": {"text": "so it is and " * 30},
        "loss_nats": {"loss_nats": float("nan") if n == 5 else 3.0, "grad_norm": 1.0},
        "tokens_per_s": {"tokens_per_s": 1e9 if n == 90 else 100.0},
        "val_loss_nats": {
            "val_loss_nats": 3.0 if n < 50 else 3.0 + n,
            "ema_loss_nats": 3.0 - n / 100,
        },
    }[key]


@pytest.mark.parametrize(
    "gate_id",
    sorted(set(REPLAYABLE) - {"sampling.dominance", "runtime.trend", "runtime.loss-spike"}),
)
def test_every_gate_that_can_be_replayed_fires_on_a_log_that_is_red(tmp_path, gate_id):
    lines = [{"step": n} | red_line(REPLAYABLE[gate_id], n) for n in range(1, 100)]
    assert replay(gate_id, log_of(tmp_path, lines))["first_fire_step"] is not None


@pytest.mark.parametrize("gate_id", ["runtime.trend", "runtime.loss-spike"])
def test_a_loss_that_climbs_is_seen_in_a_log(tmp_path, gate_id):
    jump = {"runtime.trend": 0.02, "runtime.loss-spike": 2.0}[gate_id]
    lines = [
        {"step": n, "loss_nats": 3.0 + n % 7 / 100 + max(0, n - 200) * jump, "grad_norm": 1.0}
        for n in range(1, 400)
    ]
    assert replay(gate_id, log_of(tmp_path, lines))["first_fire_step"] > 200


def test_one_word_everywhere_is_seen_in_a_log(tmp_path):
    lines = [
        {"step": n, "text": " the ".join("river stone window letter garden morning".split() * 3)}
        for n in range(1, 8)
    ]
    assert replay("sampling.dominance", log_of(tmp_path, lines))["first_fire_step"] == 5


@pytest.mark.parametrize("loss", ["NaN", float("nan"), "Infinity", float("inf")])
def test_a_loss_that_is_not_finite_is_read_as_a_run_and_as_python_write_it(tmp_path, loss):
    lines = [{"step": n, "loss_nats": loss if n == 3 else 2} for n in range(1, 6)]
    assert replay("runtime.finite", log_of(tmp_path, lines))["first_fire_step"] == 3


def test_lines_of_other_trainers_are_taken(tmp_path):
    """Counts as floats, a language without a list of words, and a speed that is not finite."""
    lines = [
        {
            "step": float(n),
            "text": "wieder " * 9,
            "language": "de",
            "loss_nats": 3,
            "tokens_seen": 1e6 * n,
        }
        | {"tokens_per_s": [0.0, float("nan"), "Infinity", float("inf")][n % 4]}
        for n in range(1, 8)
    ]
    log = log_of(tmp_path, lines)
    found = replay("sampling.coherence", log)
    assert (found["first_fire_step"], found["last_step"], found["saved_s"]) == (5, 7, None)
    assert replay("runtime.loss-not-constant", log)["first_fire_step"] is not None
    assert replay("runtime.step-time", log)["records"] == 1


def test_the_beginning_of_a_long_text_is_judged(tmp_path):
    """Repeats after a judged beginning count as little as a long text takes time."""
    varied = " ".join(f"{a}{b}{c}" for a, b, c in product(*["abcdefghijklmnopqrstuvwxyz"] * 3))
    cut, whole = ([{"text": varied[:n] + " la" * 9000}] * 7 for n in (MAX_TEXT_CHARS, 50))
    assert replay("sampling.loops", log_of(tmp_path, cut))["fires"] == 0
    assert replay("sampling.loops", log_of(tmp_path, whole))["fires"] > 0


def test_null_counts_as_absent_and_a_line_without_a_step_has_its_index(tmp_path):
    lines = [{"text": HEALTHY, "step": None, "language": None} for _ in range(7)]
    assert replay("sampling.coherence", log_of(tmp_path, lines))["last_step"] == 6
    with pytest.raises(DataError, match="line 1 has no text"):
        replay("sampling.coherence", log_of(tmp_path, [{"text": None}]))


def test_what_cannot_be_replayed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be replayed"):
        replay("loss.golden", log_of(tmp_path, [{"text": "a"}]))
    with pytest.raises(DataError, match="line 2 has no text"):
        replay("sampling.coherence", log_of(tmp_path, [{"text": "a"}, {"loss_nats": 1.0}]))
    with pytest.raises(DataError, match="is empty"):
        replay("sampling.coherence", log_of(tmp_path, []))

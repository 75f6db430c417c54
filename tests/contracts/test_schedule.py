"""The gate of the schedule against hand-made traces, and the stack's schedules
against their closed forms.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackproof.config import Cosine, Wsd, load_config
from stackproof.contracts.events import RatesUsed, Started
from stackproof.contracts.gate import limits_of
from stackproof.contracts.schedule import Rate, closed_form
from stackproof.recipes import recipe
from stackproof.spec.errors import ConfigError
from stackproof.train.schedule import lr_at

SCHEDULES = {
    "cosine": Cosine(warmup_steps=10),
    "cosine from the start": Cosine(warmup_steps=10, decay_from="start"),
    "wsd": Wsd(warmup_steps=10, final_lr_frac=0.05),
    "wsd, linear": Wsd(warmup_steps=10, decay_frac=0.3, decay_shape="linear"),
}
PEAKS = {"muon": 2e-2, "decay": 1e-3, "no-decay": 1e-3}


def rates(schedule, step: int, factor: float = 1.0) -> RatesUsed:
    """What a healthy update under PEAKS reports, times a factor."""
    lrs = {
        g: closed_form(step, peak=peak, schedule=schedule.model_dump(), max_steps=100) * factor
        for g, peak in PEAKS.items()
    }
    return RatesUsed(step, {"all": lrs["decay"], **lrs})


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES)
def schedule(request):
    return request.param


@pytest.fixture
def trace(spec, schedule):
    check = Rate(limits_of(spec.gates["schedule.rate"]))
    plan = {"peak_lr": 1e-3, "peak_lrs": PEAKS, "schedule": schedule.model_dump(), "max_steps": 100}
    assert check.observe(Started(step=0, plan=plan)) is None
    return check


def test_rate_is_green_on_the_closed_form(trace, schedule):
    assert all(trace.observe(rates(schedule, s)).passed for s in range(1, 101))


def test_rate_is_red_on_one_percent(trace, schedule):
    for step in range(1, 100):
        assert not trace.observe(rates(schedule, step, 1.01)).passed


@pytest.mark.parametrize("group", PEAKS)
def test_rate_is_red_on_a_group_without_its_rate(trace, schedule, group):
    """One group one percent off, one group not reported, and one that nobody declared."""
    lrs = rates(schedule, 1).used
    wrong = [
        lrs | {group: lrs[group] * 1.01},
        {g: lr for g, lr in lrs.items() if g != group},
        lrs | {"stranger": 1e-3},
    ]
    for step, changed in enumerate(wrong, start=1):
        verdict = trace.observe(RatesUsed(step, changed))
        assert verdict.outcome == "fail" and (
            group in verdict.message or "stranger" in verdict.message
        )


def test_rate_is_red_on_a_skipped_update(trace, schedule):
    assert trace.observe(rates(schedule, 1)).passed
    assert not trace.observe(rates(schedule, 3)).passed


def test_rate_is_red_without_a_declared_plan(spec):
    check = Rate(limits_of(spec.gates["schedule.rate"]))
    assert not check.observe(rates(SCHEDULES["cosine"], 1)).passed


@st.composite
def declared(draw):
    """A schedule of either kind and its number of steps."""
    warmup, extra, final = (
        draw(st.integers(1, 400)),
        draw(st.integers(2, 2000)),
        draw(st.floats(0, 1, exclude_min=True)),
    )
    max_steps = warmup + extra
    if draw(st.booleans()):
        return Cosine(
            warmup_steps=warmup,
            final_lr_frac=final,
            decay_from=draw(st.sampled_from(["peak", "start"])),
        ), max_steps
    frac = draw(st.floats(1e-6, extra / max_steps - 0.5 / max_steps))
    return Wsd(
        warmup_steps=warmup,
        decay_frac=frac,
        final_lr_frac=final,
        decay_shape=draw(st.sampled_from(["linear", "1-sqrt"])),
    ), max_steps


@given(declared(), st.data())
def test_stack_and_closed_form_agree(declared, data):
    schedule, max_steps = declared
    step = data.draw(st.integers(1, max_steps))
    ours = lr_at(step, peak=6e-4, schedule=schedule, max_steps=max_steps)
    theirs = closed_form(step, peak=6e-4, schedule=schedule.model_dump(), max_steps=max_steps)
    assert math.isclose(ours, theirs, rel_tol=0, abs_tol=1e-15)


@given(declared())
def test_up_through_the_warmup_never_up_after_it_and_down_to_the_floor(declared):
    schedule, max_steps = declared
    lr = [
        lr_at(s, peak=6e-4, schedule=schedule, max_steps=max_steps) for s in range(1, max_steps + 1)
    ]
    warmup = schedule.warmup_steps
    assert all(a >= b for a, b in zip(lr[warmup - 1 :], lr[warmup:])) and max(lr) <= 6e-4
    assert lr[-1] == pytest.approx(6e-4 * schedule.final_lr_frac, rel=1e-12, abs=1e-18)
    if schedule.kind == "wsd":
        assert set(lr[warmup - 1 : schedule.decay_begins(max_steps)]) == {6e-4}
    if schedule.kind == "wsd" or schedule.decay_from == "peak":
        assert lr[:warmup] == [6e-4 * (s / warmup) for s in range(1, warmup + 1)]


@given(st.integers(1, 5000), st.integers(2001, 6000), st.floats(0, 1, exclude_min=True))
def test_warmup_as_a_factor_on_the_schedule(step, max_steps, final):
    """A founding note's lr(t) = sched(t)·min(1, (t+1)/2000) with t from 0,
    for a cosine and for a constant.
    """
    t = min(step, max_steps) - 1
    sched = lr_at(
        t + 1,
        peak=1e-3,
        schedule=Cosine(warmup_steps=1, final_lr_frac=final, decay_from="start"),
        max_steps=max_steps,
    )
    whole = lr_at(
        t + 1,
        peak=1e-3,
        schedule=Cosine(warmup_steps=2000, final_lr_frac=final, decay_from="start"),
        max_steps=max_steps,
    )
    assert whole == sched * min(1, (t + 1) / 2000)
    constant = lr_at(
        t + 1,
        peak=1e-3,
        schedule=Wsd(warmup_steps=2000, final_lr_frac=1.0),
        max_steps=4 * max_steps,
    )
    assert constant == 1e-3 * min(1, (t + 1) / 2000)


@pytest.mark.parametrize(("warmup", "step", "max_steps"), [(231, 231, 233), (49, 49, 500)])
def test_rounding_never_carries_the_rate_over_its_peak(warmup, step, max_steps):
    assert lr_at(step, peak=6e-4, schedule=Cosine(warmup_steps=warmup), max_steps=max_steps) == 6e-4


def test_peak_at_the_end_of_warmup_and_floor_at_the_end():
    """The rates of a founding note: 6e-4 at step 50 and 6e-5 at step 500."""
    lr = [
        lr_at(s, peak=6e-4, schedule=Cosine(warmup_steps=50), max_steps=500) for s in range(1, 501)
    ]
    assert lr[49] == 6e-4
    assert lr[499] == pytest.approx(6e-5, rel=1e-12)
    assert all(a > b for a, b in zip(lr[49:], lr[50:]))
    assert all(a < b for a, b in zip(lr[:49], lr[1:50]))


def test_a_decay_that_begins_in_the_warmup_is_refused():
    sets = ("schedule.kind=wsd", "schedule.warmup_steps=400", "schedule.decay_frac=0.4")
    with pytest.raises(ConfigError, match=r"400.*before the decay begins.*360"):
        load_config(recipe("tiny"), sets=sets)
    assert (
        load_config(recipe("tiny"), sets=(*sets[:2], "schedule.decay_frac=0.2"))[
            0
        ].schedule.decay_begins(600)
        == 480
    )


def test_a_rate_that_nobody_declares_is_no_pass(spec):
    check = Rate(limits_of(spec.gates["schedule.rate"]))
    check.observe(Started(step=0, plan={}))
    unknown = check.observe(RatesUsed(1, {"all": 123.0}))
    assert unknown.outcome == "not_run"
    assert check.observe(RatesUsed(2, {"all": 1e-3}, declared={"all": 1e-3})).passed
    assert not check.observe(RatesUsed(3, {"all": 1.01e-3}, declared={"all": 1e-3})).passed

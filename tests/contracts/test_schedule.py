"""The gate of the schedule against hand-made traces."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.events import Started
from contracts.gate import limits_of
from contracts.schedule import ScheduleTrace, warmup_cosine
from stack.config import Cosine
from stack.train.schedule import cosine_lr
from tests.contracts.test_optim import step_taken

PLAN = {"peak_lr": 1e-3, "warmup_steps": 10, "max_steps": 100, "final_lr_frac": 0.1}


def declared(step: int) -> float:
    return warmup_cosine(step, peak=1e-3, warmup_steps=10, max_steps=100, final_frac=0.1)


@pytest.fixture
def trace(spec):
    check = ScheduleTrace(limits_of(spec.gates["schedule.trace"]))
    assert check.observe(Started(step=0, plan=PLAN)) is None
    return check


def test_trace_is_green_on_the_closed_form(trace):
    assert all(trace.observe(step_taken(step=s, lr=declared(s))).passed for s in range(1, 101))


def test_trace_is_red_on_one_percent(trace):
    assert trace.observe(step_taken(step=1, lr=declared(1))).passed
    assert not trace.observe(step_taken(step=2, lr=declared(2) * 1.01)).passed


def test_trace_is_red_on_a_skipped_update(trace):
    assert trace.observe(step_taken(step=1, lr=declared(1))).passed
    assert not trace.observe(step_taken(step=3, lr=declared(3))).passed


def test_trace_is_red_without_a_declared_plan(spec):
    check = ScheduleTrace(limits_of(spec.gates["schedule.trace"]))
    assert not check.observe(step_taken(step=1, lr=declared(1))).passed


@given(st.integers(1, 400), st.integers(2, 2000), st.floats(0, 1), st.data())
def test_stack_and_closed_form_agree(warmup, extra, final, data):
    max_steps = warmup + extra
    step = data.draw(st.integers(1, max_steps))
    ours = cosine_lr(step, peak=6e-4, schedule=Cosine(warmup_steps=warmup, final_lr_frac=final), max_steps=max_steps)
    theirs = warmup_cosine(step, peak=6e-4, warmup_steps=warmup, max_steps=max_steps, final_frac=final)
    assert math.isclose(ours, theirs, rel_tol=0, abs_tol=1e-15)


@pytest.mark.parametrize(("warmup", "step", "max_steps"), [(231, 231, 233), (49, 49, 500)])
def test_rounding_never_carries_the_rate_over_its_peak(warmup, step, max_steps):
    schedule = Cosine(warmup_steps=warmup, final_lr_frac=0.1)
    assert cosine_lr(step, peak=6e-4, schedule=schedule, max_steps=max_steps) == 6e-4


def test_peak_at_the_end_of_warmup_and_floor_at_the_end():
    schedule = Cosine(warmup_steps=50, final_lr_frac=0.1)
    lr = [cosine_lr(s, peak=6e-4, schedule=schedule, max_steps=500) for s in range(1, 501)]
    assert lr[49] == 6e-4
    assert lr[499] == pytest.approx(6e-5, rel=1e-12)
    assert all(a > b for a, b in zip(lr[49:], lr[50:]))
    assert all(a < b for a, b in zip(lr[:49], lr[1:50]))

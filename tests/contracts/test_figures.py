"""What a run says about itself, against hand-made clocks, counts and checksums; two-sided."""

import json

import pytest

from stackproof.contracts.events import Evaluated, Finished, Recomputed, Started
from stackproof.contracts.figures import Clock, Learned, RecomputedStep, flops
from stackproof.contracts.gate import limits_of
from tests.contracts.test_cadence import drawn
from tests.contracts.test_optim import step_taken
from tests.subjects import changed


def test_a_gradient_that_differs_is_named(spec):
    check = RecomputedStep(limits_of(spec.gates["runtime.recomputed-step"]))
    assert check.observe(Recomputed(step=5, n_compared=9, differing=())).passed
    red = check.observe(Recomputed(step=5, n_compared=9, differing=("embed.weight",)))
    assert (
        red.outcome == "fail" and "embed.weight" in red.message and red.measured["differing"] == 1
    )
    assert check.observe(Recomputed(step=5, n_compared=0, differing=())).outcome == "fail", (
        "nothing compared is nothing shown"
    )


def ended(spec, losses, *, begins=0, check=None):
    check = check or Learned(limits_of(spec.gates["runtime.learned"]))
    assert check.observe(Started(begins, {})) is None
    for step, loss in enumerate(losses, begins + 1):
        assert check.observe(step_taken(step=step, loss_nats=loss)) is None
    return check, check.observe(Finished(step=begins + len(losses), status="completed"))


@pytest.mark.parametrize(
    ("fall", "outcome"), [(0.06, "pass"), (0.04, "fail"), (-1.0, "fail"), (float("nan"), "fail")]
)
def test_a_run_that_ends_where_it_began_has_not_learned(spec, fall, outcome):
    losses = [5.0] * 8 + [4.0] * 16 + [5.0 - fall] * 8
    _, verdict = ended(spec, losses)
    assert verdict.outcome == outcome and (
        fall != fall or verdict.measured["fall_nats"] == pytest.approx(fall)
    )
    before, _ = ended(spec, losses[:20])
    resumed = Learned(limits_of(spec.gates["runtime.learned"]))
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert ended(spec, losses[20:], begins=20, check=resumed)[1] == verdict or fall != fall, (
        "the same over a resume"
    )


def test_what_has_no_beginning_is_not_judged(spec):
    assert (
        ended(spec, [5.0] * 23)[1].outcome == "not_run"
        and ended(spec, [5.0] * 24)[1].outcome == "fail"
    )
    assert ended(spec, [5.0] * 40, begins=10)[1].outcome == "not_run"


def ticking(spec, said, *, n_steps=20, step_s=0.1, draw_s=0.01, before_s=0.002, hold_up=()):
    """Verdicts of a clock gate over steps that take `step_s` from their batch on and
    say `said(true seconds)`.
    """
    at = [0.0]
    check = Clock(limits_of(spec.gates["runtime.clock"]), now=lambda: at[0])
    check.observe(Started(0, {}))
    verdicts = []
    for step in range(1, n_steps + 1):
        at[0] += before_s + draw_s
        check.observe(drawn(step))
        at[0] += step_s
        seconds = draw_s + step_s
        at[0] += 5.0 if step in hold_up else 0.0
        verdicts.append(check.observe(step_taken(step=step, wall_s=said(seconds))))
        if step % 5 == 0:
            at[0] += 3.0
            check.observe(Evaluated(step, 1.0, 1.0, (1.0,), "h", None, 2.0))
    return verdicts


@pytest.mark.parametrize(
    ("factor", "red"),
    [(1.0, False), (0.84, True), (0.94, False), (1.0 / 3, True), (1.05, True), (1000, True)],
)
def test_clock_is_two_sided(spec, factor, red):
    """From its batch on a step takes 100 ms, all in all 110, and 112 pass between announcements; a
    millisecond is free either way.
    """
    outcomes = [v.outcome for v in ticking(spec, lambda s: s * factor)]
    assert outcomes[:7] == ["pass"] * 7, "less than eight steps are no verdict"
    assert set(outcomes[7:]) == ({"fail"} if red else {"pass"})


def test_neighbours_that_delay_most_steps_are_no_verdict(spec):
    delayed = tuple(n for n in range(100) if n % 7)
    assert all(v.passed for v in ticking(spec, lambda s: s, hold_up=delayed))
    outcomes = [v.outcome for v in ticking(spec, lambda s: s / 3, hold_up=delayed)]
    assert set(outcomes[7:]) == {"fail"}, "a wrong clock is wrong beside neighbours, too"


def test_clock_leaves_out_what_lies_between_steps(spec):
    """Evaluations of three seconds after every fifth step change nothing."""
    last = ticking(spec, lambda s: s)[-1]
    assert last.measured["said_to_batch_frac"] == pytest.approx(1.11) and last.measured[
        "said_to_all_frac"
    ] == pytest.approx(109 / 112)


def test_flops_are_two_sided(spec, subject):
    limits, honest = limits_of(spec.gates["runtime.flops"]), subject.declared.flops_per_step
    of_attention = subject.declared.attention_flops_per_step

    def verdict(factor):
        of_matrices = factor * (honest - of_attention)
        return flops(
            limits, changed(subject, declared={"flops_per_step": of_attention + of_matrices})
        )

    assert verdict(1.0).passed and verdict(1.0).measured["declared_over_counted"] == 1.0
    assert not verdict(1.0101).passed and not verdict(0.9899).passed, "one percent either way"
    assert not verdict(2.0).passed and not verdict(float("nan")).passed

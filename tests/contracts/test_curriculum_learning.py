"""Gates of the curriculum that judge what a bandit learns: red on faults that only later turns, or
other calls, bring to light.
"""

from dataclasses import replace

import numpy as np
import pytest

from stackproof.contracts.curriculum import CAPS, TURNS, _play
from stackproof.contracts.gate import call_check
from stackproof.data.sampler import MixtureSampler
from stackproof.museum.plant import load_museum
from tests.contracts.test_curriculum import ARMS, PLAIN, Fixed, Redrawn, judge


def test_order_is_red_where_rows_depend_on_how_many_are_decided(spec, subject):
    """Of every call that decides more than one row, two rows of one source have changed places."""

    def exchanged(draws, numbers):
        mine, windows = np.flatnonzero(draws.sources == 1)[:2], draws.windows.copy()
        windows[mine] = windows[mine[::-1]]
        return replace(draws, windows=windows)

    class Counted(Redrawn):
        def at(self, numbers):
            draws = self._inner.at(numbers)
            return self._change(draws, numbers) if len(numbers) > 1 else draws

    def judged(change):
        make = lambda: Counted(MixtureSampler(ARMS, 5), change)  # noqa: E731
        return judge("curriculum.order", spec, subject, **PLAIN, sampler_order=make)

    assert judged(lambda draws, numbers: draws).passed
    verdict = judged(exchanged)
    assert verdict.outcome == "fail" and "at a time" in verdict.message


def test_reward_is_red_on_a_bandit_that_never_looks_back(spec, subject):
    """The useful source has nearly all turns at first; whether another is found later decides, to
    the turn: 18 of 45 are the limit.
    """

    def verdict(regained):
        first, second = (
            ["useful", "list", "other"] + ["useful"] * 42,
            ["other"] * regained + ["useful"] * (45 - regained),
        )
        names = [s.name for s in Fixed.sources]
        turns = [names.index(n) for n in first + second + ["useful"]]
        return judge("curriculum.reward", spec, subject, bandit=lambda caps: Fixed(turns))

    assert verdict(18).passed
    red = verdict(17)
    assert red.outcome == "fail" and red.measured["regained_turns"] == pytest.approx(17 / 45)
    learned = call_check(spec.gates["curriculum.reward"], subject)
    assert learned.passed and learned.measured["regained_turns"] > 0.6  # measured 0.84


def test_reward_is_red_where_the_common_trend_is_merit(spec, subject):
    """Red in the world in which all losses fall, and there alone:
    without a trend the same bandit is green.
    """
    with load_museum()["curriculum.trend-is-merit"].apply():
        plain = _play(subject.curriculum.bandit(CAPS), 0.0).count("useful") / TURNS
        verdict = call_check(spec.gates["curriculum.reward"], subject)
    assert plain > 0.6  # measured 0.75
    assert verdict.outcome == "fail" and verdict.measured["useful_turns"] < 0.4  # measured 0.34


@pytest.mark.parametrize(
    "key",
    [
        "drop_mean",
        "drop_var",
        "n_drops",
        "last_losses",
        "in_warmup",
        "focus",
        "drawn",
        "credit",
        "pulls",
        "rewards",
    ],
)
def test_state_is_red_on_anything_that_is_not_restored(spec, subject, key):
    """Every entry of the saved state that differs from a fresh bandit's is put back to that of a
    fresh one.
    """

    def forgetful():
        made = subject.curriculum.sampler_order()
        fresh, load = made.state_dict(), made.load_state_dict

        def restored(state):
            if key in state:
                return load({**state, key: fresh[key]})
            return load(
                {
                    **state,
                    "arms": {
                        n: {**a, key: fresh["arms"][n][key]} for n, a in state["arms"].items()
                    },
                }
            )

        made.load_state_dict = restored
        return made

    verdict = judge("curriculum.state", spec, subject, sampler_order=forgetful)
    assert verdict.outcome == "fail" and "never stopped" in verdict.message


@pytest.mark.parametrize(("moved", "outcome"), [(1, "pass"), (4, "fail"), (-4, "fail")])
def test_reward_is_red_where_rows_do_not_follow_the_focus(spec, subject, moved, outcome):
    """Some rows of every turn go to the source in focus instead of its neighbour, or the reverse;
    three rows are the slack.
    """

    def shifted(caps):
        made = subject.curriculum.bandit(caps)
        at = made.at

        def moving(numbers):
            draws, focus = at(numbers), made.focus
            giver, taker = ((focus + 1) % 3, focus) if moved > 0 else (focus, (focus + 1) % 3)
            sources = draws.sources.copy()
            sources[np.flatnonzero(sources == giver)[: abs(moved)]] = taker
            return replace(draws, sources=sources)

        made.at = moving
        return made

    verdict = judge("curriculum.reward", spec, subject, bandit=shifted)
    assert verdict.outcome == outcome and ("follow its focus" in verdict.message) == (
        outcome == "fail"
    )

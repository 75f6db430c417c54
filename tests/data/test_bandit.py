"""The bandit's mixture: within its bounds, exact through a restore,
and rewarded by what the others gain.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import BanditCurriculum
from stackproof.data.bandit import BanditSampler
from stackproof.data.sampler import Source, shares
from tests.data.test_sampler import ARMS, A, B, C, bounded, once_per_epoch


def play(bandit, n_turns, rows, losses, batch=None):
    """Sources of all rows of some turns; `losses(turn)` is what each turn ends with."""
    drawn = []
    for turn in range(n_turns):
        for first in range(turn * rows, (turn + 1) * rows, batch or rows):
            bandit.decide(first, first + (batch or rows))
            drawn.append(bandit.at(np.arange(first, first + (batch or rows))).sources)
        bandit.reward(dict(zip((s.name for s in bandit.sources), losses(turn))))
    return np.concatenate(drawn)


def excess(arms, drawn, window=1000):
    """By how many rows the worst window of rows leaves the bounds of a source."""
    totals = np.cumsum(
        np.concatenate([np.zeros((1, len(arms)), int), np.eye(len(arms), dtype=int)[drawn]]), axis=0
    )
    counts = totals[window:] - totals[:-window]
    cap, floor = (np.array([getattr(s, k) for s in arms]) * window for k in ("cap", "floor"))
    return float(np.maximum(counts - cap, floor - counts).max())


@settings(max_examples=30, deadline=None)
@given(
    bounded(most=4, weight_min=0.1),
    st.integers(0, 2**32),
    st.sampled_from([0.3, 0.6, 0.95]),
    st.sampled_from([8, 32, 100]),
)
def test_bounds_hold_over_any_thousand_rows_whatever_the_rewards(arms, seed, focus_share, rows):
    """To within one row per source, which is what the gate grants."""
    bandit = BanditSampler(arms, 1, BanditCurriculum(focus_share=focus_share))
    noise = np.random.default_rng(seed)
    drawn = play(bandit, 2400 // rows, rows, lambda turn: 5 + noise.normal(0, 1, len(arms)))
    assert excess(arms, drawn) <= len(arms)


def test_a_focus_share_of_one_leaves_to_the_others_what_the_cap_does_not_take():
    """All rows go to the source in focus up to its cap, the rest has to come from somewhere."""
    arms = [replace(A, cap=0.6), replace(B, cap=0.6)]
    drawn = play(
        BanditSampler(arms, 1, BanditCurriculum(focus_share=1.0)),
        50,
        40,
        lambda turn: [5.0 - turn, 5.0],
    )
    assert set(drawn.tolist()) == {0, 1} and excess(arms, drawn) <= 2


BOUNDED = (
    replace(A, cap=0.5),
    replace(B, floor=0.1),
    replace(C, cap=0.8, floor=0.2),
    Source("d", 1370, 90, 1.0, 0.0, 0.0),
)


def test_a_source_with_cap_zero_is_never_drawn_and_never_in_focus():
    bandit = BanditSampler(BOUNDED, 1, BanditCurriculum())
    drawn = play(bandit, 200, 20, lambda turn: [5.0, 5.0, 5.0, 5.0 - turn])
    assert set(drawn.tolist()) == {0, 1, 2} and "d" not in bandit.state_dict()["arms"]


@pytest.mark.parametrize("winner", [1, 2])
def test_the_source_whose_turns_help_gets_more_within_its_cap(winner):
    bandit, loss = BanditSampler(BOUNDED, 1, BanditCurriculum()), [5.0]

    def losses(turn):
        loss[0] -= 0.02 * (bandit.focus == winner)
        return [loss[0]] * 4

    drawn = play(bandit, 200, 20, losses)
    share = np.bincount(drawn[2000:], minlength=4) / 2000
    assert share[winner] > shares(BOUNDED)[winner] + 0.1  # measured 0.27 and 0.33
    assert excess(BOUNDED, drawn) <= 4


def test_a_list_that_only_makes_itself_predictable_gains_nothing():
    """Its turns lower its own loss and raise the others' as much:
    the rows are those of a world in which they do nothing.
    """
    arms = [replace(A, weight=1.0), B, replace(C, cap=0.4)]

    def world(own_drop):
        bandit, loss = BanditSampler(arms, 1, BanditCurriculum()), np.full(3, 5.0)
        noise = np.random.default_rng(1)

        def losses(turn):
            loss[:] -= noise.normal(0, 1e-3) + 0.02 * (bandit.focus == 1)
            loss[:] += own_drop * np.array([0.5, 0.5, -1.0]) * (bandit.focus == 2)
            return loss

        return play(bandit, 150, 20, losses)

    plain, cheap = world(0.0), world(0.25)
    assert np.array_equal(plain, cheap)
    counts = np.bincount(cheap[1000:], minlength=3) / 2000
    assert counts[2] <= shares(arms)[2] and counts[1] > 0.4 and excess(arms, cheap) <= 3


def test_a_state_without_a_loss_that_the_next_reward_needs_is_refused():
    bandit = BanditSampler(BOUNDED, 7, BanditCurriculum())
    play(bandit, 3, 13, lambda turn: np.full(4, 5.0 - turn))
    state = bandit.state_dict()
    state["last_losses"] = {k: v for k, v in state["last_losses"].items() if k != "b"}
    with pytest.raises(ValueError, match="last_losses has no loss of b"):
        BanditSampler(BOUNDED, 7, BanditCurriculum()).load_state_dict(state)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32))
def test_a_bandit_restored_through_json_goes_on_exactly(turns, seed):
    noise = np.random.default_rng(seed).normal(5, 0.3, (turns + 30, 4))
    bandit = BanditSampler(BOUNDED, 7, BanditCurriculum())
    play(bandit, turns, 13, lambda turn: noise[turn])
    restored = BanditSampler(BOUNDED, 7, BanditCurriculum())
    assert restored.load_state_dict(json.loads(json.dumps(bandit.state_dict()))) == []
    assert restored.state_dict() == bandit.state_dict()
    for turn in range(turns, turns + 30):
        for order in (bandit, restored):
            order.decide(13 * turn, 13 * turn + 13)
        one, two = (order.at(np.arange(13 * turn, 13 * turn + 13)) for order in (bandit, restored))
        assert all(
            np.array_equal(getattr(one, k), getattr(two, k))
            for k in ("sources", "windows", "epochs")
        )
        lines = [order.reward(dict(zip("abcd", noise[turn]))) for order in (bandit, restored)]
        assert lines[0] == lines[1]


def test_a_bandit_is_deterministic_and_batches_do_not_matter():
    noise = np.random.default_rng(3).normal(5, 0.3, (80, 4))
    runs = [
        play(
            BanditSampler(BOUNDED, 7, BanditCurriculum()), 80, 24, lambda turn: noise[turn], batch=b
        )
        for b in (24, 24, 8, 1)
    ]
    assert all(np.array_equal(runs[0], r) for r in runs[1:])


def test_every_window_of_a_bandit_comes_once_per_epoch():
    bandit, noise, drawn = (
        BanditSampler(BOUNDED, 7, BanditCurriculum()),
        np.random.default_rng(3).normal(5, 0.3, (150, 4)),
        [],
    )
    for turn in range(150):
        drawn.append(straight_turn(bandit, 20 * turn, 20))
        bandit.reward(dict(zip("abcd", noise[turn])))
    once_per_epoch(BOUNDED[:3], np.concatenate(drawn, axis=1))
    assert bandit.counts(3000).sum() == 3000


def straight_turn(bandit, first, n):
    bandit.decide(first, first + n)
    draws = bandit.at(np.arange(first, first + n))
    return np.stack([draws.sources, draws.windows, draws.epochs])


def test_a_zombie_arm_is_dropped_named_and_takes_nothing_along():
    """Of a state with arms that are gone only positions are kept, that of a source without a share
    too, should it come back.
    """
    bandit = BanditSampler(ARMS, 7, BanditCurriculum())
    play(bandit, 30, 20, lambda turn: [5 - 0.1 * turn, 5, 5])
    state = json.loads(json.dumps(bandit.state_dict()))
    state["arms"]["zombie"] = dict(state["arms"]["a"], pulls=1.546)
    revived = BanditSampler([A, B, replace(C, cap=0.0)], 7, BanditCurriculum())
    assert revived.load_state_dict(state) == ["c", "zombie"]
    assert (
        set(revived.state_dict()["arms"]) == {"a", "b"}
        and not revived.ucb.pulls.any()
        and not revived.last_losses
    )
    assert revived.drawn.tolist() == bandit.drawn.tolist()
    assert set(straight_turn(revived, 600, 500)[0].tolist()) == {0, 1}
    back = BanditSampler(ARMS, 7, BanditCurriculum())
    assert (
        back.load_state_dict(json.loads(json.dumps(revived.state_dict()))) == []
        and back.drawn[2] == bandit.drawn[2]
    )


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.98])
def test_a_bandit_remembers_as_many_turns_as_its_discount_says(discount):
    """Its mean drop is the plain mean of the first 1/(1-discount) turns,
    and from then on forgets at that rate.
    """
    horizon, n = 1 / (1 - discount), 200
    drops = np.random.default_rng(3).normal(0.1, 0.05, n)
    bandit, loss = BanditSampler(ARMS, 1, BanditCurriculum(discount=discount)), 500.0
    bandit.reward(dict.fromkeys(("a", "b", "c"), loss))
    for k, drop in enumerate(drops):
        loss -= drop
        bandit.reward(dict.fromkeys(("a", "b", "c"), loss))
        weights = []  # of all drops so far: each new one takes its share of what the others had
        for j in range(k + 1):
            step = 1 / (min(j, horizon) + 1)
            weights = [w * (1 - step) for w in weights] + [step]
        mean = float(np.dot(weights, drops[: k + 1]))
        assert bandit.scale.mean == pytest.approx(mean, abs=1e-9)
        assert bandit.scale.var == pytest.approx(
            float(np.dot(weights, (drops[: k + 1] - mean) ** 2)), abs=1e-9
        )
        if k < horizon - 1:
            assert mean == pytest.approx(drops[: k + 1].mean(), abs=1e-9)
    assert bandit.ucb.pulls.sum() == pytest.approx((1 - discount**n) / (1 - discount))


def test_nothing_is_learnt_in_the_warm_up():
    """Turns with rows of the warm-up end without a reward for the source in focus,
    which they did not read.
    """
    cfg = BanditCurriculum(warmup_steps=11, warmup_sources=("a",))
    bandit = BanditSampler(ARMS, 7, cfg, warmup_rows=110)
    for turn in range(5):  # rows 0 … 124: the last turn straddles the end of the warm-up
        straight_turn(bandit, 25 * turn, 25)
        assert (
            "reward" not in bandit.reward({"a": 5.0 - turn, "b": 5.0 - turn, "c": 5.0 - turn})
            and not bandit.ucb.pulls.any()
        )
    straight_turn(bandit, 125, 25)
    assert "reward" in bandit.reward({"a": 0.0, "b": 0.0, "c": 0.0}) and bandit.ucb.pulls.sum() == 1


def test_a_turn_of_the_warm_up_stays_one_over_a_restore():
    """Saved in the middle of the turn that straddles the end of the warm-up,
    which ends without a reward.
    """
    cfg = BanditCurriculum(warmup_steps=11, warmup_sources=("a",))
    orders = [BanditSampler(ARMS, 7, cfg, warmup_rows=110) for _ in range(2)]
    for first in (0, 50):
        straight_turn(orders[0], first, 50)
        orders[0].reward({"a": 5.0, "b": 5.0, "c": 5.0})
    straight_turn(orders[0], 100, 25)
    orders[1].load_state_dict(json.loads(json.dumps(orders[0].state_dict())))
    lines = []
    for order in orders:
        straight_turn(order, 125, 25)
        lines.append(order.reward({"a": 4.0, "b": 4.0, "c": 4.0}))
    assert lines[0] == lines[1] and "reward" not in lines[1] and not orders[1].ucb.pulls.any()


def test_other_shares_keep_positions_and_forget_rewards():
    bandit, changed = (
        BanditSampler(ARMS, 7, BanditCurriculum()),
        BanditSampler([replace(A, floor=0.3), B, C], 7, BanditCurriculum()),
    )
    play(bandit, 30, 20, lambda turn: [5 - 0.1 * turn, 5, 5])
    assert changed.load_state_dict(bandit.state_dict()) == [] and np.array_equal(
        changed.drawn, bandit.drawn
    )
    assert not changed.ucb.pulls.any() and not changed.credit.any() and changed.scale.n == 0


def test_the_warm_up_of_a_bandit_reads_its_sources_alone_and_then_all():
    bandit = BanditSampler(
        ARMS, 7, BanditCurriculum(warmup_steps=5, warmup_sources=("b", "c")), warmup_rows=50
    )
    drawn = play(bandit, 10, 20, lambda turn: [5.0, 5.0, 5.0])
    assert set(drawn[:50].tolist()) == {1, 2} and set(drawn[50:].tolist()) == {0, 1, 2}


def test_a_source_of_weight_zero_only_fills_its_floor():
    """What the configuration says of a weight of 0 holds for a bandit too: no turns,
    no rows above the floor.
    """
    arms = [A, B, replace(C, weight=0.0, floor=0.1)]
    drawn = play(
        BanditSampler(arms, 7, BanditCurriculum()), 100, 20, lambda turn: [5.0, 5.0, 5.0 - turn]
    )
    assert np.bincount(drawn, minlength=3)[2] == pytest.approx(0.1 * 2000, abs=3)

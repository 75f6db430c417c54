"""The order of sources: fixed shares as a pure function of the position, and a bandit's within its bounds."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spec.errors import ConfigError, DataError
from stack.config import BanditCurriculum, StaticCurriculum
from stack.data.curriculum import BLOCK, Bandit, Source, StaticMixture, UniformOrder, make_order, quotas, shares

A, B, C = Source("a", 0, 300, 2.0, 1.0, 0.0), Source("b", 300, 70, 1.0, 1.0, 0.0), Source("c", 370, 1000, 1.0, 1.0, 0.0)
ARMS = (A, B, C)


def sources(rows):
    """Sources of 50 windows each out of (weight, cap, floor) rows."""
    return [Source(f"s{i}", 50 * i, 50, *row) for i, row in enumerate(rows)]


@st.composite
def bounded(draw, most=5, weight_min=0.0):
    """Sources whose floors and caps can be met: a share for each, its floor below and its cap above."""
    n = draw(st.integers(1, most))
    parts = np.array(draw(st.lists(st.integers(1, 20), min_size=n, max_size=n)), float)
    rows = []
    for share in parts / parts.sum():
        floor, cap = draw(st.sampled_from([0.0, 0.3, 0.9])) * share, share + draw(st.sampled_from([0.02, 0.5, 1.0])) * (1 - share)
        rows.append((draw(st.sampled_from([weight_min, 0.1, 1.0, 3.0, 50.0])), float(min(1.0, cap)), float(floor)))
    assume(any(weight > 0 for weight, _, _ in rows))
    return sources(rows)


# --- shares ---------------------------------------------------------------------------------------------------------


@given(bounded())
def test_shares_are_within_bounds_sum_to_one_and_are_proportional_where_free(arms):
    reachable = sum(s.cap if s.weight > 0 else s.floor for s in arms)
    if reachable < 1 - 1e-9:
        with pytest.raises(ConfigError, match="can take"):
            shares(arms)
        return
    share = shares(arms)
    assert share.sum() == pytest.approx(1, abs=1e-9)
    assert all(s.floor - 1e-12 <= x <= s.cap + 1e-12 for s, x in zip(arms, share))
    free = [x / s.weight for s, x in zip(arms, share) if s.floor + 1e-9 < x < s.cap - 1e-9]
    assert max(free, default=0) == pytest.approx(min(free, default=0), rel=1e-6)
    for s, x in zip(arms, share):
        # Who is at the floor would have less by weight alone, who is at the cap would have more.
        if free and s.weight > 0:
            at_floor, at_cap = x <= s.floor + 1e-9, x >= s.cap - 1e-9
            assert not at_floor or at_cap or x / s.weight >= free[0] * (1 - 1e-6)
            assert not at_cap or at_floor or x / s.weight <= free[0] * (1 + 1e-6)


def test_shares_without_bounds_are_those_of_the_weights():
    assert shares(ARMS) == pytest.approx([0.5, 0.25, 0.25], abs=1e-9)


def test_a_floor_takes_from_the_others_in_proportion():
    share = shares([A, replace(B, floor=0.4), C])
    assert share == pytest.approx([0.4, 0.4, 0.2], abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(1, 1, 0.6), (1, 1, 0.5)], r"floors of s0, s1 add up to 1\.1"),
        ([(1, 0.4, 0), (1, 0.5, 0)], r"caps add up to 0\.9"),
        ([(1, 0.4, 0.5), (1, 1, 0)], r"s0: floor \(0\.5\) is above its cap"),
        ([(0, 1, 0), (0, 1, 0)], "weight 0"),
        ([(1, 0.4, 0), (0, 1, 0.1)], r"can take 0\.5 of the rows"),
        ([(1, 0, 0)], "caps add up to 0"),
    ],
)
def test_shares_that_cannot_be_met_are_refused(rows, says):
    with pytest.raises(ConfigError, match=says):
        shares(sources(rows))


def test_a_share_too_small_for_a_block_is_refused():
    """1/1024 is met, a third of it is not."""
    assert quotas(sources([(1023, 1, 0), (1, 1, 0)])).tolist() == [1023, 1]
    with pytest.raises(ConfigError, match="source s1 is too small"):
        quotas(sources([(3071, 1, 0), (1, 1, 0)]))


@given(bounded())
def test_quotas_are_shares_rounded_to_rows(arms):
    try:
        exact, made = shares(arms) * BLOCK, quotas(arms)
    except ConfigError:
        return
    assert made.sum() == BLOCK and (np.abs(made - exact) < 1).all()


# --- fixed shares ---------------------------------------------------------------------------------------------------


def straight(order, n, size=97):
    """(sources, windows, epochs) of the first n samples, in batches."""
    parts = []
    for first in range(0, n, size):
        order.decide(first, min(first + size, n))
        draws = order.at(np.arange(first, min(first + size, n)))
        parts.append(np.stack([draws.sources, draws.windows, draws.epochs]))
    return np.concatenate(parts, axis=1)


@settings(max_examples=30)
@given(bounded(), st.integers(0, 3), st.integers(0, 2**31))
def test_every_block_has_exactly_its_shares(arms, block, seed):
    try:
        order, wanted = StaticMixture(arms, seed), quotas(arms)
    except ConfigError:
        return
    drawn = order.at(np.arange(block * BLOCK, (block + 1) * BLOCK)).sources
    assert np.array_equal(np.bincount(drawn, minlength=len(arms)), wanted)


@settings(max_examples=30)
@given(bounded(), st.integers(0, 2 * BLOCK), st.integers(1, 900))
def test_any_stretch_has_its_shares_to_within_one_row_per_source(arms, first, n):
    try:
        order, share = StaticMixture(arms, 3), shares(arms)
    except ConfigError:
        return
    counts = np.bincount(order.at(np.arange(first, first + n)).sources, minlength=len(arms))
    # Rounding a share to 1/1024 moves it by at most one row of a block.
    assert (np.abs(counts - share * n) <= len(arms) + n / BLOCK + 1).all()


@settings(max_examples=30)
@given(st.integers(0, 5000), st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 600))
def test_any_position_is_that_of_a_straight_run(first, n, seed, warmup):
    make = lambda: StaticMixture(ARMS, seed, warmup_rows=warmup, warmup_sources=("b",))  # noqa: E731
    whole = straight(make(), first + n)[:, first:]
    entered = make().at(np.arange(first, first + n))
    assert np.array_equal(whole, np.stack([entered.sources, entered.windows, entered.epochs]))


def once_per_epoch(arms, drawn):
    """Every window of a source once per epoch, epochs in order, no window of another one."""
    for i, arm in enumerate(arms):
        windows, epochs = drawn[1:, drawn[0] == i]
        assert np.array_equal(epochs, np.arange(len(epochs)) // arm.n_windows)
        for epoch in range(len(epochs) // arm.n_windows):
            assert np.array_equal(np.sort(windows[epochs == epoch]), np.arange(arm.first, arm.first + arm.n_windows))
        rest = windows[epochs == len(epochs) // arm.n_windows]
        assert len(set(rest.tolist())) == len(rest) and ((rest >= arm.first) & (rest < arm.first + arm.n_windows)).all()


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(0, 700))
def test_every_window_comes_once_per_epoch_also_over_the_warm_up(seed, warmup):
    drawn = straight(StaticMixture(ARMS, seed, warmup_rows=warmup, warmup_sources=("b", "c")), 4000)
    once_per_epoch(ARMS, drawn)
    assert set(drawn[0, :warmup].tolist()) <= {1, 2} and (drawn[0, warmup:] == 0).any()


def test_epochs_and_seeds_have_orders_of_their_own():
    drawn, other = straight(StaticMixture(ARMS, 1), 2000), straight(StaticMixture(ARMS, 2), 2000)
    of = lambda rows, source, epoch: rows[1, (rows[0] == source) & (rows[2] == epoch)].tolist()  # noqa: E731
    assert of(drawn, 1, 0) != of(drawn, 1, 1) and of(drawn, 0, 0) != of(other, 0, 0)
    assert np.array_equal(drawn[0], other[0]), "the seed shuffles windows, not sources"


@settings(max_examples=30)
@given(st.integers(0, 4000), st.integers(0, 700), st.integers(0, 3000))
def test_counts_are_those_of_counting(after, warmup, start):
    """Also with what each source had before the mixture was changed at `start`."""
    order = StaticMixture(ARMS, 5, warmup_rows=warmup, warmup_sources=("c",))
    counted = lambda rows: np.bincount(rows[0].astype(np.int64), minlength=3)  # noqa: E731
    assert np.array_equal(order.counts(after), counted(straight(order, after)) if after else [0, 0, 0])
    base = {"a": 40, "b": 7, "c": 900}
    assert order.load_state_dict({"start": start, "base": base}) == []
    later = order.at(np.arange(start, start + after))
    assert np.array_equal(order.counts(start + after), np.bincount(later.sources, minlength=3) + list(base.values()))


def test_a_changed_mixture_goes_on_with_windows_that_nobody_has_seen():
    """1,500 rows of one mixture, then rows of another: still every window once per epoch of its source."""
    before = StaticMixture(ARMS, 9)
    first = straight(before, 1500)
    after = StaticMixture([replace(A, weight=0.5), replace(B, weight=3.0), C], 9)
    after.load_state_dict({"start": 1500, "base": dict(zip("abc", before.counts(1500).tolist()))})
    draws = after.at(np.arange(1500, 4000))
    once_per_epoch(ARMS, np.concatenate([first, np.stack([draws.sources, draws.windows, draws.epochs])], axis=1))


@settings(max_examples=20)
@given(st.integers(0, 3000), st.integers(1, 500))
def test_a_restored_mixture_draws_on(start, n):
    order, restored = StaticMixture(ARMS, 9), StaticMixture(ARMS, 9)
    order.load_state_dict({"start": start, "base": {"a": 40, "b": 7, "c": 900}})
    assert restored.load_state_dict(json.loads(json.dumps(order.state_dict()))) == []
    numbers = np.arange(start, start + n)
    assert all(np.array_equal(getattr(order.at(numbers), k), getattr(restored.at(numbers), k)) for k in ("sources", "windows", "epochs"))


def test_a_source_that_is_gone_is_dropped_and_named():
    order = StaticMixture([A, replace(B, cap=0.0), C], 9)
    assert order.load_state_dict({"start": 10, "base": {"a": 4, "b": 3, "gone": 3}}) == ["b", "gone"]
    assert set(order.at(np.arange(10, 1000)).sources.tolist()) == {0, 2}


# --- bandit ---------------------------------------------------------------------------------------------------------


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
    totals = np.cumsum(np.concatenate([np.zeros((1, len(arms)), int), np.eye(len(arms), dtype=int)[drawn]]), axis=0)
    counts = totals[window:] - totals[:-window]
    cap, floor = (np.array([getattr(s, k) for s in arms]) * window for k in ("cap", "floor"))
    return float(np.maximum(counts - cap, floor - counts).max())


@settings(max_examples=30, deadline=None)
@given(bounded(most=4, weight_min=0.1), st.integers(0, 2**32), st.sampled_from([0.3, 0.6, 0.95]), st.sampled_from([8, 32, 100]))
def test_bounds_hold_over_any_thousand_rows_whatever_the_rewards(arms, seed, focus_share, rows):
    """To within one row per source, which is what the gate grants."""
    bandit = Bandit(arms, 1, BanditCurriculum(focus_share=focus_share))
    noise = np.random.default_rng(seed)
    drawn = play(bandit, 2400 // rows, rows, lambda turn: 5 + noise.normal(0, 1, len(arms)))
    assert excess(arms, drawn) <= len(arms)


def test_a_focus_share_of_one_leaves_to_the_others_what_the_cap_does_not_take():
    """All rows go to the source in focus up to its cap, the rest has to come from somewhere."""
    arms = [replace(A, cap=0.6), replace(B, cap=0.6)]
    drawn = play(Bandit(arms, 1, BanditCurriculum(focus_share=1.0)), 50, 40, lambda turn: [5.0 - turn, 5.0])
    assert set(drawn.tolist()) == {0, 1} and excess(arms, drawn) <= 2


BOUNDED = (replace(A, cap=0.5), replace(B, floor=0.1), replace(C, cap=0.8, floor=0.2), Source("d", 1370, 90, 1.0, 0.0, 0.0))


def test_a_source_with_cap_zero_is_never_drawn_and_never_in_focus():
    bandit = Bandit(BOUNDED, 1, BanditCurriculum())
    drawn = play(bandit, 200, 20, lambda turn: [5.0, 5.0, 5.0, 5.0 - turn])
    assert set(drawn.tolist()) == {0, 1, 2} and "d" not in bandit.state_dict()["arms"]


@pytest.mark.parametrize("winner", [1, 2])
def test_the_source_whose_turns_help_gets_more_within_its_cap(winner):
    bandit, loss = Bandit(BOUNDED, 1, BanditCurriculum()), [5.0]

    def losses(turn):
        loss[0] -= 0.02 * (bandit.focus == winner)
        return [loss[0]] * 4

    drawn = play(bandit, 200, 20, losses)
    share = np.bincount(drawn[2000:], minlength=4) / 2000
    assert share[winner] > shares(BOUNDED)[winner] + 0.1  # measured 0.27 and 0.33
    assert excess(BOUNDED, drawn) <= 4


def test_a_list_that_only_makes_itself_predictable_gains_nothing():
    """Its turns lower its own loss and raise the others' as much: the rows are those of a world in which they do nothing."""
    arms = [replace(A, weight=1.0), B, replace(C, cap=0.4)]

    def world(own_drop):
        bandit, loss = Bandit(arms, 1, BanditCurriculum()), np.full(3, 5.0)
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


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32))
def test_a_bandit_restored_through_json_goes_on_exactly(turns, seed):
    noise = np.random.default_rng(seed).normal(5, 0.3, (turns + 30, 4))
    bandit = Bandit(BOUNDED, 7, BanditCurriculum())
    play(bandit, turns, 13, lambda turn: noise[turn])
    restored = Bandit(BOUNDED, 7, BanditCurriculum())
    assert restored.load_state_dict(json.loads(json.dumps(bandit.state_dict()))) == []
    assert restored.state_dict() == bandit.state_dict()
    for turn in range(turns, turns + 30):
        for order in (bandit, restored):
            order.decide(13 * turn, 13 * turn + 13)
        one, two = (order.at(np.arange(13 * turn, 13 * turn + 13)) for order in (bandit, restored))
        assert all(np.array_equal(getattr(one, k), getattr(two, k)) for k in ("sources", "windows", "epochs"))
        lines = [order.reward(dict(zip("abcd", noise[turn]))) for order in (bandit, restored)]
        assert lines[0] == lines[1]


def test_a_bandit_is_deterministic_and_batches_do_not_matter():
    noise = np.random.default_rng(3).normal(5, 0.3, (80, 4))
    runs = [play(Bandit(BOUNDED, 7, BanditCurriculum()), 80, 24, lambda turn: noise[turn], batch=b) for b in (24, 24, 8, 1)]
    assert all(np.array_equal(runs[0], r) for r in runs[1:])


def test_every_window_of_a_bandit_comes_once_per_epoch():
    bandit, noise, drawn = Bandit(BOUNDED, 7, BanditCurriculum()), np.random.default_rng(3).normal(5, 0.3, (150, 4)), []
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
    """Of a state with arms that are gone only the positions of the others are kept."""
    bandit = Bandit(ARMS, 7, BanditCurriculum())
    play(bandit, 30, 20, lambda turn: [5 - 0.1 * turn, 5, 5])
    state = json.loads(json.dumps(bandit.state_dict()))
    state["arms"]["zombie"] = dict(state["arms"]["a"], pulls=1.546)
    revived = Bandit([A, B, replace(C, cap=0.0)], 7, BanditCurriculum())
    assert revived.load_state_dict(state) == ["c", "zombie"]
    assert set(revived.state_dict()["arms"]) == {"a", "b"} and not revived.pulls.any() and not revived.last_losses
    assert revived.drawn.tolist() == [*bandit.drawn[:2], 0]
    assert set(straight_turn(revived, 600, 500)[0].tolist()) == {0, 1}


def test_other_shares_keep_positions_and_forget_rewards():
    bandit, changed = Bandit(ARMS, 7, BanditCurriculum()), Bandit([replace(A, floor=0.3), B, C], 7, BanditCurriculum())
    play(bandit, 30, 20, lambda turn: [5 - 0.1 * turn, 5, 5])
    assert changed.load_state_dict(bandit.state_dict()) == [] and np.array_equal(changed.drawn, bandit.drawn)
    assert not changed.pulls.any() and not changed.credit.any() and changed.n_drops == 0


def test_the_warm_up_of_a_bandit_reads_its_sources_alone_and_then_all():
    bandit = Bandit(ARMS, 7, BanditCurriculum(warmup_steps=5, warmup_sources=("b", "c")), warmup_rows=50)
    drawn = play(bandit, 10, 20, lambda turn: [5.0, 5.0, 5.0])
    assert set(drawn[:50].tolist()) == {1, 2} and set(drawn[50:].tolist()) == {0, 1, 2}


def test_a_source_of_weight_zero_only_fills_its_floor():
    """What the configuration says of a weight of 0 holds for a bandit too: no turns, no rows above the floor."""
    arms = [A, B, replace(C, weight=0.0, floor=0.1)]
    drawn = play(Bandit(arms, 7, BanditCurriculum()), 100, 20, lambda turn: [5.0, 5.0, 5.0 - turn])
    assert np.bincount(drawn, minlength=3)[2] == pytest.approx(0.1 * 2000, abs=3)


# --- making an order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [StaticCurriculum, BanditCurriculum])
def test_names_that_are_no_source_are_refused(cfg):
    for options in ({"weights": {"zz": 1}}, {"caps": {"zz": 1}}, {"floors": {"zz": 0}}, {"warmup_steps": 1, "warmup_sources": ("zz",)}):
        key = "warmup_sources" if "warmup_steps" in options else next(iter(options))
        with pytest.raises(ConfigError, match=rf"curriculum\.{key}[\s\S]*zz[\s\S]*a, b, c"):
            make_order(cfg(**options), ARMS, seed=1, rows_per_step=4)


@pytest.mark.parametrize("cfg", [StaticCurriculum, BanditCurriculum])
def test_a_source_without_windows_is_refused_unless_its_cap_is_zero(cfg):
    arms = [*ARMS, Source("empty", 1370, 0, 1.0, 1.0, 0.0)]
    with pytest.raises(DataError, match=r"source empty holds no window[\s\S]*curriculum\.caps\.empty=0"):
        make_order(cfg(), arms, seed=1, rows_per_step=4)
    order = make_order(cfg(caps={"empty": 0}), arms, seed=1, rows_per_step=4)
    order.decide(0, 500)
    assert 3 not in order.at(np.arange(500)).sources


@pytest.mark.parametrize("cfg", [StaticCurriculum, BanditCurriculum])
def test_values_of_the_curriculum_go_before_those_of_the_mixture(cfg):
    order = make_order(cfg(weights={"a": 7}, caps={"b": 0.5}, floors={"c": 0.1}), ARMS, seed=1, rows_per_step=4)
    assert [(s.weight, s.cap, s.floor) for s in order.sources] == [(7, 1, 0), (1, 0.5, 0), (1, 1, 0.1)]
    with pytest.raises(ConfigError, match="floors of a, b"):
        make_order(cfg(floors={"a": 0.6, "b": 0.6}), ARMS, seed=1, rows_per_step=4)


def test_one_source_needs_no_mixing():
    assert isinstance(make_order(StaticCurriculum(), [A], seed=1, rows_per_step=4), UniformOrder)

"""Shares of sources, and orders that are pure functions of the position."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stackproof.data.sampler import BLOCK, MixtureSampler, Source, quotas, shares
from stackproof.spec.errors import ConfigError

A, B, C = (
    Source("a", 0, 300, 2.0, 1.0, 0.0),
    Source("b", 300, 70, 1.0, 1.0, 0.0),
    Source("c", 370, 1000, 1.0, 1.0, 0.0),
)
ARMS = (A, B, C)


def sources(rows):
    """Sources of 50 windows each out of (weight, cap, floor) rows."""
    return [Source(f"s{i}", 50 * i, 50, *row) for i, row in enumerate(rows)]


@st.composite
def bounded(draw, most=5, weight_min=0.0):
    """Sources whose floors and caps can be met: a share for each,
    its floor below and its cap above.
    """
    n = draw(st.integers(1, most))
    parts = np.array(draw(st.lists(st.integers(1, 20), min_size=n, max_size=n)), float)
    rows = []
    for share in parts / parts.sum():
        floor, cap = (
            draw(st.sampled_from([0.0, 0.3, 0.9])) * share,
            share + draw(st.sampled_from([0.02, 0.5, 1.0])) * (1 - share),
        )
        rows.append(
            (
                draw(st.sampled_from([weight_min, 0.1, 1.0, 3.0, 50.0])),
                float(min(1.0, cap)),
                float(floor),
            )
        )
    assume(any(weight > 0 for weight, _, _ in rows))
    return sources(rows)


# --- shares ---------------------------------------------------------------------------------------


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
        ([(1, 1, 0.6), (1, 1, 0.5)], r"floors of s0, s1 sum to 1\.1"),
        ([(1, 0.4, 0), (1, 0.5, 0)], r"caps sum to 0\.9"),
        ([(1, 0.4, 0.5), (1, 1, 0)], r"s0: floor \(0\.5\) is above its cap"),
        ([(0, 1, 0), (0, 1, 0)], "weight 0"),
        ([(1, 0.4, 0), (0, 1, 0.1)], r"can take 0\.5 of the rows"),
        ([(1, 0, 0)], "caps sum to 0"),
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


# --- fixed shares ---------------------------------------------------------------------------------


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
        order, wanted = MixtureSampler(arms, seed), quotas(arms)
    except ConfigError:
        return
    drawn = order.at(np.arange(block * BLOCK, (block + 1) * BLOCK)).sources
    assert np.array_equal(np.bincount(drawn, minlength=len(arms)), wanted)


@settings(max_examples=30)
@given(bounded(), st.integers(0, 2 * BLOCK), st.integers(1, 900))
def test_any_stretch_has_its_shares_to_within_one_row_per_source(arms, first, n):
    try:
        order, share = MixtureSampler(arms, 3), shares(arms)
    except ConfigError:
        return
    counts = np.bincount(order.at(np.arange(first, first + n)).sources, minlength=len(arms))
    # Rounding a share to 1/1024 moves it by at most one row of a block.
    assert (np.abs(counts - share * n) <= len(arms) + n / BLOCK + 1).all()


@settings(max_examples=30)
@given(st.integers(0, 5000), st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 600))
def test_any_position_is_that_of_a_straight_run(first, n, seed, warmup):
    make = lambda: MixtureSampler(ARMS, seed, warmup_rows=warmup, warmup_sources=("b",))  # noqa: E731
    whole = straight(make(), first + n)[:, first:]
    entered = make().at(np.arange(first, first + n))
    assert np.array_equal(whole, np.stack([entered.sources, entered.windows, entered.epochs]))


def once_per_epoch(arms, drawn):
    """Every window of a source once per epoch, epochs in order, no window of another one."""
    for i, arm in enumerate(arms):
        windows, epochs = drawn[1:, drawn[0] == i]
        assert np.array_equal(epochs, np.arange(len(epochs)) // arm.n_windows)
        for epoch in range(len(epochs) // arm.n_windows):
            assert np.array_equal(
                np.sort(windows[epochs == epoch]), np.arange(arm.first, arm.first + arm.n_windows)
            )
        rest = windows[epochs == len(epochs) // arm.n_windows]
        assert (
            len(set(rest.tolist())) == len(rest)
            and ((rest >= arm.first) & (rest < arm.first + arm.n_windows)).all()
        )


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(0, 700))
def test_every_window_comes_once_per_epoch_also_over_the_warm_up(seed, warmup):
    drawn = straight(
        MixtureSampler(ARMS, seed, warmup_rows=warmup, warmup_sources=("b", "c")), 4000
    )
    once_per_epoch(ARMS, drawn)
    assert set(drawn[0, :warmup].tolist()) <= {1, 2} and (drawn[0, warmup:] == 0).any()


def test_epochs_and_seeds_have_orders_of_their_own():
    drawn, other = straight(MixtureSampler(ARMS, 1), 2000), straight(MixtureSampler(ARMS, 2), 2000)
    of = lambda rows, source, epoch: rows[1, (rows[0] == source) & (rows[2] == epoch)].tolist()  # noqa: E731
    assert of(drawn, 1, 0) != of(drawn, 1, 1) and of(drawn, 0, 0) != of(other, 0, 0)
    assert np.array_equal(drawn[0], other[0]), "the seed shuffles windows, not sources"


@settings(max_examples=30)
@given(st.integers(0, 4000), st.integers(0, 700), st.integers(0, 3000))
def test_counts_are_those_of_counting(after, warmup, start):
    """Also with what each source had before the mixture was changed at `start`."""
    order = MixtureSampler(ARMS, 5, warmup_rows=warmup, warmup_sources=("c",))
    counted = lambda rows: np.bincount(rows[0].astype(np.int64), minlength=3)  # noqa: E731
    assert np.array_equal(
        order.counts(after), counted(straight(order, after)) if after else [0, 0, 0]
    )
    base = {"a": 40, "b": 7, "c": 900}
    assert order.load_state_dict({"start": start, "base": base}) == []
    later = order.at(np.arange(start, start + after))
    assert np.array_equal(
        order.counts(start + after), np.bincount(later.sources, minlength=3) + list(base.values())
    )


def test_a_changed_mixture_goes_on_with_windows_that_nobody_has_seen():
    """1,500 rows of one mixture, then rows of another: still every window
    once per epoch of its source.
    """
    before = MixtureSampler(ARMS, 9)
    first = straight(before, 1500)
    after = MixtureSampler([replace(A, weight=0.5), replace(B, weight=3.0), C], 9)
    after.load_state_dict({"start": 1500, "base": dict(zip("abc", before.counts(1500).tolist()))})
    draws = after.at(np.arange(1500, 4000))
    once_per_epoch(
        ARMS,
        np.concatenate([first, np.stack([draws.sources, draws.windows, draws.epochs])], axis=1),
    )


@settings(max_examples=20)
@given(st.integers(0, 3000), st.integers(1, 500))
def test_a_restored_mixture_draws_on(start, n):
    order, restored = MixtureSampler(ARMS, 9), MixtureSampler(ARMS, 9)
    order.load_state_dict({"start": start, "base": {"a": 40, "b": 7, "c": 900}})
    assert restored.load_state_dict(json.loads(json.dumps(order.state_dict()))) == []
    numbers = np.arange(start, start + n)
    assert all(
        np.array_equal(getattr(order.at(numbers), k), getattr(restored.at(numbers), k))
        for k in ("sources", "windows", "epochs")
    )


def test_a_source_that_is_gone_is_dropped_and_named():
    order = MixtureSampler([A, replace(B, cap=0.0), C], 9)
    assert order.load_state_dict({"start": 10, "base": {"a": 4, "b": 3, "gone": 3}}) == [
        "b",
        "gone",
    ]
    assert set(order.at(np.arange(10, 1000)).sources.tolist()) == {0, 2}


def test_a_cap_does_not_bind_in_the_warm_up():
    capped = [replace(A, cap=0.4), B, C]
    warm = MixtureSampler(capped, 3, warmup_rows=64, warmup_sources=("a",))
    assert (warm.at(np.arange(64)).sources == 0).all()
    later = warm.at(np.arange(64, 64 + 1024)).sources
    assert (later == 0).sum() <= 0.4 * 1024 + 1

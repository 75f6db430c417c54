"""The reader's order at scale: a thousand ranks, other numbers of ranks in the middle of an epoch,
and an index of 15 T tokens.
"""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import BanditCurriculum
from stackproof.data import permutation
from stackproof.data.bandit import BanditSampler
from stackproof.data.data_loader import DataLoader
from stackproof.data.packing import Rows
from stackproof.data.permutation import order_key, permute
from stackproof.data.sampler import MixtureSampler, ShuffledSampler, Source

SEED = 7
# ranks, rows of each
WORLDS = ((1, 1), (1, 5), (2, 3), (3, 4), (8, 16), (64, 2), (1000, 1), (1024, 2))
# ranks, rows of each, steps
PHASES = ((1024, 2, 1), (768, 3, 1), (1000, 1, 1), (8, 16, 5), (1024, 1, 1))
FEWER = ((24, 2, 2), (18, 3, 1), (10, 1, 2), (3, 4, 9))
HUGE = 3 * 10**10  # windows of 512 tokens in 15 T tokens, rounded up
MB = 10**6


class Fake:
    """A stream of n windows; every token of a window is its number."""

    vocab_size = 2**48

    def __init__(self, n: int):
        self.n, self.n_tokens = n, n + 1

    def n_windows(self, seq_len: int) -> int:
        return self.n

    def rows(self, numbers: np.ndarray, seq_len: int) -> Rows:
        tokens_RT = np.repeat(np.asarray(numbers)[:, None], seq_len + 1, axis=1)
        return Rows(tokens_RT[:, :-1], tokens_RT[:, 1:])


def uniform(n: int) -> ShuffledSampler:
    return ShuffledSampler(n, SEED)


def simulate(
    n: int,
    phases,
    *,
    order=uniform,
    resume=lambda cursor, global_rows, step: cursor,
    spoil=lambda r: None,
) -> np.ndarray:
    """Windows in global order: of every step the rows of rank 0, 1, … Between phases only the
    cursor survives, and what an order saves.

    `resume` and `spoil` are where the tests below break the cursor and the readers.
    """
    drawn, cursor, step, state = [], 0, 0, {}
    for world_size, rows, steps in phases:
        cursor = resume(cursor, world_size * rows, step)
        shape = {
            "seq_len": 1,
            "seed": SEED,
            "rows": rows,
            "world_size": world_size,
            "cursor": cursor,
        }
        ranks = [DataLoader(Fake(n), rank=r, sampler=order(n), **shape) for r in range(world_size)]
        for r in ranks:
            if state:
                r.sampler.load_state_dict(json.loads(state))
            spoil(r)
        for _ in range(steps):
            drawn += [r.next_batch().input_ids[:, 0].numpy() for r in ranks]
        assert len({r.cursor for r in ranks}) == 1, "ranks agree where they are"
        cursor, step = ranks[0].cursor, step + steps
        states = (
            {json.dumps(r.sampler.state_dict()) for r in ranks}
            if isinstance(ranks[0].sampler, BanditSampler)
            else {""}
        )
        (state,) = states
    return np.concatenate(drawn)


def faults(sequence: np.ndarray, n: int) -> list[str]:
    """What is wrong with every epoch of n samples; the last one may be incomplete and must
    then only be free of repeats.
    """
    found = []
    for epoch, start in enumerate(range(0, len(sequence), n)):
        part = sequence[start : start + n]
        counts = np.bincount(part, minlength=n)
        twice, never = int((counts > 1).sum()), int((counts == 0).sum()) if len(part) == n else 0
        if twice or never or len(counts) > n:
            found.append(
                f"epoch {epoch}: {twice} window(s) twice, {never} never, {len(counts) - n} unknown"
            )
    return found


def sizes(world_size: int, rows: int) -> list[int]:
    """Windows of an epoch that the global batch divides, does not divide, and exceeds."""
    batch = world_size * rows
    return [batch, batch + batch // 3 + 1, batch // 3 + 1]


@pytest.mark.parametrize(("world_size", "rows"), WORLDS)
def test_all_ranks_together_consume_every_window_once_an_epoch(world_size, rows):
    """Through two ends of an epoch and on; with the small epoch one global
    batch covers several of them.
    """
    for n in sizes(world_size, rows):
        steps = -(-2 * n // (world_size * rows)) + 1
        sequence = simulate(n, [(world_size, rows, steps)])
        assert len(sequence) > 2 * n and faults(sequence, n) == []


@pytest.mark.parametrize("n", [3001, 700])
def test_ranks_may_come_and_go_in_the_middle_of_an_epoch(n):
    """1024, 768, 1000, 8 and 1024 ranks with other rows each: every sample once an epoch, in the
    order of one uninterrupted rank.
    """
    sequence = simulate(n, PHASES)
    assert len(sequence) == 7016 > 2 * n and faults(sequence, n) == []
    assert np.array_equal(sequence, simulate(n, [(1, len(sequence), 1)]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=5
    ),
)
def test_any_changes_of_ranks_and_rows_leave_the_sequence_alone(n, phases):
    sequence = simulate(n, phases)
    assert faults(sequence, n) == [] and np.array_equal(
        sequence, simulate(n, [(1, len(sequence), 1)])
    )


SIZES = {"a": 610, "b": 70, "c": 330}


def _sources(n: int) -> list[Source]:
    """Spans of the windows, with shares that have nothing to do with their sizes."""
    assert n == sum(SIZES.values())
    return [
        Source(name, first, SIZES[name], weight, 1.0, 0.0)
        for name, first, weight in (("a", 0, 0.2), ("b", 610, 0.3), ("c", 680, 0.5))
    ]


def static(n: int) -> MixtureSampler:
    return MixtureSampler(_sources(n), SEED, warmup_rows=300, warmup_sources=("a", "b"))


def bandit(n: int) -> BanditSampler:
    return BanditSampler(_sources(n), SEED, BanditCurriculum())


@pytest.mark.parametrize("order", [static, bandit])
def test_a_mixture_survives_other_ranks_too(order):
    """Of every source each window once in each of its own epochs,
    in the order of one uninterrupted rank.
    """
    n, phases = (
        sum(SIZES.values()),
        [(world_size, 16 * rows, steps) for world_size, rows, steps in FEWER],
    )
    sequence = simulate(n, phases, order=order)
    assert np.array_equal(sequence, simulate(n, [(1, len(sequence), 1)], order=order))
    for source in _sources(n):
        own = (
            sequence[(sequence >= source.first) & (sequence < source.first + source.n_windows)]
            - source.first
        )
        assert len(own) > source.n_windows / 2 and faults(own, source.n_windows) == []


def _shared_rank(r: DataLoader) -> None:
    r.rank = min(r.rank, r.world_size - 2)


def _own_order(r: DataLoader) -> None:
    r.sampler.seed += r.rank


def _own_cursor(r: DataLoader) -> None:
    r.rank, r.world_size = 0, 1


def _short_stride(r: DataLoader) -> None:
    r.world_size -= 1


def _no_tail(r: DataLoader) -> None:
    r.sampler = uniform(r.n_windows - r.n_windows % (r.world_size * r.rows))


@pytest.mark.parametrize("spoil", [_shared_rank, _own_order, _own_cursor, _short_stride, _no_tail])
@pytest.mark.parametrize(("world_size", "rows"), [(3, 4), (8, 16), (64, 2)])
def test_a_broken_slicing_is_noticed(spoil, world_size, rows):
    n = sizes(world_size, rows)[1]
    assert faults(simulate(n, [(world_size, rows, 5)]), n) == []
    assert faults(simulate(n, [(world_size, rows, 5)], spoil=spoil), n) != []


@pytest.mark.parametrize("by", [1, -1])
def test_slices_that_leave_a_gap_or_overlap_are_noticed(monkeypatch, by):
    """Rows of neighbouring ranks that share a sample, or skip one,
    although every cursor is right.
    """
    original = DataLoader.next_batch

    def shifted(self):
        self.cursor += by * self.rank
        batch = original(self)
        self.cursor -= by * self.rank
        return batch

    assert faults(simulate(101, [(8, 4, 5)]), 101) == []
    monkeypatch.setattr(DataLoader, "next_batch", shifted)
    assert faults(simulate(101, [(8, 4, 5)]), 101) != []


def test_drawing_with_replacement_is_noticed(monkeypatch):
    monkeypatch.setattr(
        permutation,
        "permute",
        lambda positions, n, key: np.random.default_rng(key).integers(0, n, n)[positions],
    )
    assert "twice" in faults(simulate(1000, [(8, 4, 40)]), 1000)[0]


@pytest.mark.parametrize(
    "resume",
    [
        # rounded down to the new global batch
        lambda cursor, global_rows, step: cursor // global_rows * global_rows,
        lambda cursor, global_rows, step: -(-cursor // global_rows) * global_rows,  # rounded up
        lambda cursor, global_rows, step: step * global_rows,  # counted in steps
        lambda cursor, global_rows, step: 0,  # begun again
    ],
)
def test_a_cursor_that_does_not_count_samples_is_noticed(resume):
    assert faults(simulate(101, FEWER), 101) == []
    assert faults(simulate(101, FEWER, resume=resume), 101) != []


def mixed(n: int) -> MixtureSampler:
    return MixtureSampler(
        [Source("a", 0, n // 3, 0.9, 1.0, 0.0), Source("b", n // 3, n - n // 3, 0.1, 1.0, 0.0)],
        SEED,
    )


def draw_anywhere(n: int, order) -> None:
    """Open an index as rank 1023 at many places, also at the end of an epoch, and draw."""
    for cursor in (
        0,
        n // 3,
        max(n - 2048, 0),
        n - 1,
        2 * n,
        *np.random.default_rng(SEED).integers(0, 3 * n, 20).tolist(),
    ):
        r = DataLoader(
            Fake(n),
            seq_len=512,
            seed=SEED,
            rows=8,
            rank=1023,
            world_size=1024,
            cursor=cursor,
            sampler=order(n),
        )
        batches = [r.next_batch(), r.next_batch()]
        assert r.cursor == cursor + 2 * 8192 and all(
            0 <= i < n for b in batches for i in b.sample_ids
        )


def drawing_peak_bytes(n: int, order=uniform) -> int:
    """Most bytes allocated at once while drawing anywhere in an index.
    A first round loads what is imported on first use.
    """
    draw_anywhere(300, order)
    tracemalloc.start()
    try:
        draw_anywhere(n, order)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", [uniform, mixed])
def test_an_index_of_15_t_tokens_takes_no_memory(order):
    assert drawing_peak_bytes(HUGE, order) < MB


@pytest.mark.parametrize("order", [uniform, mixed])
@pytest.mark.parametrize("cursor", [HUGE - 10, HUGE // 3 * 2, 2**35 + 1])
def test_sample_number_i_of_a_huge_index_is_the_same_for_any_number_of_ranks(order, cursor):
    def drawn(world_size: int, rows: int) -> list[int]:
        shape = {
            "seq_len": 1,
            "seed": SEED,
            "rows": rows,
            "world_size": world_size,
            "cursor": cursor,
        }
        ranks = [
            DataLoader(Fake(HUGE), rank=r, sampler=order(HUGE), **shape) for r in range(world_size)
        ]
        return [
            i
            for _ in range(24 // (world_size * rows))
            for r in ranks
            for i in r.next_batch().sample_ids
        ]

    assert drawn(1, 24) == drawn(3, 4) == drawn(24, 1) and len(set(drawn(1, 24))) == 24


def test_an_order_that_is_stored_is_noticed(monkeypatch):
    """An index a hundred thousand times smaller, but shuffled in memory."""
    monkeypatch.setattr(
        permutation,
        "permute",
        lambda positions, n, key: np.random.default_rng(key).permutation(n)[positions],
    )
    assert drawing_peak_bytes(HUGE // 100_000) > MB


def test_the_work_of_a_draw_does_not_grow_with_its_place(monkeypatch):
    """Cycle walking over 2^36 places takes 2^36 / n rounds on average, at the end of the index as
    at its beginning; none comes twice.
    """
    walked, original = [], permutation._feistel
    monkeypatch.setattr(
        permutation, "_feistel", lambda x, *a: walked.append(len(x)) or original(x, *a)
    )
    n, many, seen = HUGE, 100_000, []
    for first in (0, 2**32, 2**34, n - many):
        walked.clear()
        seen.append(permute(first + np.arange(many), n, order_key(SEED, 0)))
        assert sum(walked) / many == pytest.approx(2**36 / n, rel=0.02)
    together = np.concatenate(seen)
    assert len(np.unique(together)) == len(together) and together.min() >= 0 and together.max() < n

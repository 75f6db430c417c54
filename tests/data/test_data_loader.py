"""The order of windows and the loader's one-integer state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.contracts.conditions import ContractError
from stackproof.data import permutation
from stackproof.data.data_loader import DataLoader, batch_hash, eval_batches, probe_batches
from stackproof.data.packing import IGNORE_INDEX, Rows
from stackproof.data.permutation import Shuffle, permute
from stackproof.data.sampler import ShuffledSampler
from stackproof.spec.errors import DataError, StreamExhausted


class Counting:
    """A stream of n windows in which every token is its own position."""

    vocab_size = 2**31

    def __init__(self, n: int):
        self.n, self.n_tokens = n, n * 4 + 1

    def n_windows(self, seq_len):
        return self.n

    def rows(self, numbers, seq_len):
        tokens_RT = np.asarray(numbers)[:, None] * seq_len + np.arange(seq_len + 1)
        return Rows(tokens_RT[:, :-1], tokens_RT[:, 1:])


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))


@given(st.integers(1, 2**48), st.integers(0, 2**64 - 1), st.data())
def test_permute_needs_no_table(n, key, data):
    """Any single position of a corpus of any size, in constant memory,
    inside the domain and repeatable.
    """
    position = np.array([data.draw(st.integers(0, n - 1))])
    image = permute(position, n, key)
    assert 0 <= image[0] < n and np.array_equal(image, permute(position, n, key))


@settings(max_examples=30)
@given(
    st.integers(1, 20_000),
    st.integers(0, 2**64 - 1),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=40),
)
def test_blocks_worked_out_ahead_give_the_same_order(n, key, places):
    """However one jumps, also after blocks were thrown away."""
    positions = np.array([int(p * n) for p in places])
    with pytest.MonkeyPatch.context() as few:
        few.setattr(permutation, "BLOCKS_KEPT", 2)
        shuffle = Shuffle()
        for part in (positions, positions[::-1], positions[:1]):
            assert np.array_equal(shuffle.permute(part, n, key), permute(part, n, key))
    assert shuffle._block.cache_info().currsize <= 2


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_ranks_are_disjoint_and_complete(n, world_size, rows, seed):
    """Two epochs: all ranks together deliver every window exactly twice,
    in whatever way batches cross the epoch's end.
    """
    loaders = [
        DataLoader(Counting(n), seq_len=4, seed=seed, rows=rows, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    seen: list[tuple[int, int]] = []
    while loaders[0].cursor < 2 * n:
        start = loaders[0].cursor
        for r, loader in enumerate(loaders):
            for k, window in enumerate(loader.next_batch().sample_ids):
                position = start + r * rows + k
                seen += [(position // n, window)] if position < 2 * n else []
    assert sorted(seen) == [(epoch, window) for epoch in range(2) for window in range(n)]


@given(st.integers(2, 100), st.integers(0, 300))
def test_a_reader_entered_anywhere_goes_on_as_if_it_had_arrived(n, cursor):
    straight = DataLoader(Counting(n), seq_len=4, seed=3, rows=1)
    for _ in range(cursor):
        straight.next_batch()
    entered = DataLoader(Counting(n), seq_len=4, seed=3, rows=1, cursor=cursor)
    assert straight.cursor == entered.cursor
    assert torch.equal(straight.next_batch().input_ids, entered.next_batch().input_ids)


def test_labels_are_the_next_tokens():
    batch = DataLoader(Counting(9), seq_len=4, seed=0, rows=3).next_batch()
    assert torch.equal(batch.labels, batch.input_ids + 1)


def test_error_raises_at_the_end_and_keeps_its_place():
    loader = DataLoader(Counting(5), seq_len=4, seed=0, rows=2, on_exhausted="error")
    loader.next_batch()
    loader.next_batch()
    with pytest.raises(
        StreamExhausted, match=r"(?s)after 4 samples: .* has 5 windows.*2 windows needed, 1 left"
    ):
        loader.next_batch()
    assert loader.cursor == 4


def test_every_row_names_its_epoch_and_the_batch_the_last_of_them():
    loader = DataLoader(Counting(5), seq_len=4, seed=0, rows=2)
    batches = [loader.next_batch() for _ in range(5)]
    assert [b.epochs for b in batches] == [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1)] and [
        b.epoch for b in batches
    ] == [0, 0, 1, 1, 1]
    assert {b.sources for b in batches} == {(0, 0)}


def test_epochs_and_seeds_differ():
    drawn = ShuffledSampler(500, seed=1).at(np.arange(1000))
    assert drawn.epochs.tolist() == [0] * 500 + [1] * 500
    assert (drawn.windows[:500] == drawn.windows[500:]).mean() < 0.05
    other = ShuffledSampler(500, seed=2).at(np.arange(500))
    assert (drawn.windows[:500] == other.windows).mean() < 0.05


def test_held_out_batches_are_always_the_same_and_spread_out():
    a, b = (eval_batches(Counting(100), 4, 5, 4) for _ in range(2))
    assert batch_hash(a) == batch_hash(b)
    assert [i for batch in a for i in batch.sample_ids] == list(range(0, 100, 5))
    assert batch_hash(a) != batch_hash(eval_batches(Counting(100), 4, 5, 3))


def test_too_few_held_out_windows_says_what_there_is():
    with pytest.raises(DataError, match="at most 3 batches"):
        eval_batches(Counting(15), 4, 5, 4)


def test_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="shorter than one window"):
        DataLoader(Counting(0), seq_len=4, seed=0, rows=1)


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"seq_len": 0}, {"cursor": -1}, {"on_exhausted": "stop"}]
)
def test_impossible_readers_are_refused(wrong):
    with pytest.raises(ContractError):
        DataLoader(Counting(9), **{"seq_len": 4, "seed": 0, "rows": 1} | wrong)


def test_a_rank_outside_its_world_is_refused():
    with pytest.raises(DataError, match="rank 2 is not one of 2"):
        DataLoader(Counting(9), seq_len=4, seed=0, rows=1, rank=2, world_size=2)


def test_labels_that_do_not_count_have_one_number():
    assert IGNORE_INDEX == -100


class TwoSources(Counting):
    """A hundred windows of one source, then forty of another."""

    def __init__(self):
        super().__init__(140)

    def spans(self, seq_len):
        return {"one": (0, 100), "two": (100, 40)}


def test_probes_are_spread_over_the_whole_of_each_source():
    probes = probe_batches(TwoSources(), 16, 4)
    assert {name: b.input_ids[:, 0].tolist() for name, b in probes.items()} == {
        "one": [0, 25 * 16, 50 * 16, 75 * 16],
        "two": [100 * 16, 110 * 16, 120 * 16, 130 * 16],
    }

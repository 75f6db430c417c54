"""Rows for the model from a token stream: windows of the concatenation, or whole documents packed
by best fit.

R rows, T seq_len. Both emit every label of a shard except its leading end-of-text token exactly
once, up to the declared remainder: concatenation drops the last labels of a shard that do not fill
a window; best fit drops none and pads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import assert_never

import numpy as np

from stackproof.config import BestFit, Concatenated
from stackproof.contracts.conditions import ensure, require
from stackproof.data.shards import TokenStream, within

Packing = Concatenated | BestFit
IGNORE_INDEX = -100
PADDING = -1  # document id of the places behind the last piece of a row


@dataclass(frozen=True)
class Rows:
    """Model inputs and labels, int64 (R, T); the label −100 is padding.
    `document_ids` int64 (R, T), if attention is masked between documents; PADDING marks padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray | None = None


def stream(
    folder: Path, split: dict, vocab_size: int, how: Packing
) -> "TokenStream | PackedStream":
    """The stream of a split with the declared packing."""
    match how:
        case Concatenated():
            return ConcatenatedStream(folder, split, vocab_size)
        case BestFit():
            return PackedStream(folder, split, vocab_size)
        case _:
            assert_never(how)


class ConcatenatedStream(TokenStream):
    """Rows are windows of seq_len + 1 consecutive tokens. Only the end-of-text token separates
    documents.
    """

    def rows(self, numbers: np.ndarray, seq_len: int) -> Rows:
        """Rows by number. Raises DataError for an id outside the vocabulary."""
        tokens_RT = self.windows(numbers, seq_len)
        return Rows(tokens_RT[:, :-1], tokens_RT[:, 1:])


class PackedStream(TokenStream):
    """Rows are whole documents packed by best fit (arXiv:2404.10830).

    A document longer than a row is split into pieces of seq_len labels, each treated as a separate
    document. Rows never cross shards, so they never mix sources.
    """

    def __init__(self, folder: Path, split: dict, vocab_size: int):
        super().__init__(folder, split, vocab_size)
        self._plan = cache(self._make_plan)

    def _make_plan(self, shard: int, seq_len: int) -> "Plan":
        return plan(self.starts_in(shard), self.shards[shard]["tokens"], seq_len)

    def part_windows(self, seq_len: int) -> np.ndarray:
        """Rows of every part of the table of shards, int64 (n_parts,). Plans every shard."""
        parts = range(len(self.shards.parts))
        return np.array([self.windows_in(p, seq_len).sum() for p in parts], np.int64)

    def windows_in(self, part: int, seq_len: int) -> np.ndarray:
        """Rows of every shard of a part, int64."""
        shards = self.shards.shards_of(part)
        return np.array([self._plan(i, seq_len).n_rows for i in shards], np.int64)

    @require(
        lambda self, numbers, seq_len: within(numbers, self.n_windows(seq_len)),
        "row numbers are 0 … n_windows-1",
    )
    def rows(self, numbers: np.ndarray, seq_len: int) -> Rows:
        """Rows by number. Raises DataError for an id outside the vocabulary."""
        shape = (len(numbers), seq_len)
        rows = Rows(
            np.zeros(shape, np.int64),
            np.full(shape, IGNORE_INDEX, np.int64),
            np.zeros(shape, np.int64),
        )
        places = zip(*(a.tolist() for a in self.places(numbers, seq_len)))
        for row, (shard, number) in enumerate(places):
            self._fill(rows, row, shard, number, seq_len)
        self._checked(rows.input_ids)
        return rows

    def _fill(self, rows: Rows, row: int, shard: int, number: int, seq_len: int) -> None:
        """Concatenate the pieces of one row; the rest is padding."""
        tokens, at = self._tokens[shard], 0
        pieces = self._plan(shard, seq_len).pieces_of(number)
        for document, (start, length) in enumerate(pieces):
            rows.input_ids[row, at : at + length] = tokens[start : start + length]
            rows.labels[row, at : at + length] = self._checked(
                np.asarray(tokens[start + 1 : start + 1 + length], np.int64)
            )
            rows.document_ids[row, at : at + length] = document
            at += length
        rows.document_ids[row, at:] = PADDING

    def n_labels(self, seq_len: int) -> int:
        return sum(self._plan(i, seq_len).n_labels for i in range(len(self.shards)))


@dataclass(frozen=True)
class Plan:
    """Which pieces lie in which row of a shard: `starts` and `lengths` sorted by row,
    and where each row's pieces begin.
    """

    starts: np.ndarray
    lengths: np.ndarray
    row_starts: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def n_labels(self) -> int:
        return int(self.lengths.sum())

    def pieces_of(self, row: int) -> Sequence[tuple[int, int]]:
        """(first input token, length) of the pieces of a row."""
        chosen = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        return list(zip(self.starts[chosen].tolist(), self.lengths[chosen].tolist()))


def _fits(result: Plan, seq_len: int) -> bool:
    """Whether every row has a piece, and none more labels than it has places."""
    before = np.concatenate([[0], np.cumsum(result.lengths)])[result.row_starts]
    n_labels = np.diff(before)
    return bool(((n_labels >= 1) & (n_labels <= seq_len)).all())


@require(lambda seq_len: seq_len >= 1, "a row holds at least one token")
@ensure(_fits, "a row of a plan has a piece, and no more labels than places")
def plan(document_starts: np.ndarray, n_tokens: int, seq_len: int) -> Plan:
    """Best-fit decreasing: long pieces first, each into the fullest row with enough room.

    The inputs of a document are the end-of-text token before it and its tokens without the last
    one, an end-of-text token; so its labels are exactly its tokens.
    """
    first = np.asarray(document_starts, np.int64) - 1
    n_labels = np.diff(np.append(first, n_tokens - 1))
    counts = -(-n_labels // seq_len)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(first, counts) + within * seq_len
    lengths = np.minimum(np.repeat(n_labels, counts) - within * seq_len, seq_len)
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    row_of[order] = _best_fit(lengths[order].tolist(), seq_len)
    by_row = np.lexsort((starts, row_of))
    n_rows = int(row_of.max()) + 1 if len(row_of) else 0
    return Plan(
        starts[by_row], lengths[by_row], np.searchsorted(row_of[by_row], np.arange(n_rows + 1))
    )


def _best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Row of every piece. Bit r of `rooms` is set if a row has room for exactly r more tokens."""
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, n_rows, chosen = 0, 0, []
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            room, row, n_rows = capacity, n_rows, n_rows + 1
        chosen.append(row)
        if room > length:
            rows_with[room - length].append(row)
            rooms |= 1 << (room - length)
    return chosen

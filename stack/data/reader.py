"""Draws training rows in a declared order.
The position is one integer; only a bandit's order has a state besides.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackproof.contracts.conditions import ensure, require
from stackproof.data.order import Draws, Order, UniformOrder
from stackproof.data.packing import IGNORE_INDEX, Rows
from stackproof.spec.errors import DataError, StreamExhausted


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-step. Shapes (R, T) int64; `sample_ids` are window numbers;
    cursors count samples over all ranks.

    `document_ids` (R, T) where documents are kept apart; `sources` and `epochs` per row,
    an epoch being one of its source.
    """

    input_ids: Tensor
    labels: Tensor
    sample_ids: tuple[int, ...]
    epoch: int
    cursor_before: int
    cursor_after: int
    document_ids: Tensor | None = None
    sources: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens of the rows, padding aside."""
        return (
            self.input_ids.numel()
            if self.document_ids is None
            else int((self.labels != IGNORE_INDEX).sum())
        )


def model_inputs(batch: Any, device: torch.device | str) -> tuple[Any, ...]:
    """A batch as the positional arguments of a model's forward, on `device`.

    (ids,), or (ids, no cache, document ids) if documents are kept apart.
    """
    ids_BT = batch.input_ids.to(device, non_blocking=True)
    documents_BT = getattr(batch, "document_ids", None)
    return (
        (ids_BT,)
        if documents_BT is None
        else (ids_BT, None, documents_BT.to(device, non_blocking=True))
    )


class Reader:
    """Batches of one rank. `cursor`, the number of samples drawn by all ranks together,
    says where it is.

    `on_exhausted` is "wrap" or "error"; `on_wrap(epoch, tokens)` is told of every epoch that
    begins. Without an `order` the windows of the whole stream are shuffled. Raises DataError if the
    stream is shorter than one window.
    """

    @require(
        lambda seq_len, rows, cursor: seq_len >= 1 and rows >= 1 and cursor >= 0,
        "seq_len and rows are at least 1, cursor 0",
    )
    @require(
        lambda on_exhausted: on_exhausted in ("wrap", "error"), "on_exhausted is wrap or error"
    )
    def __init__(
        self,
        stream,
        *,
        seq_len: int,
        seed: int,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
        on_exhausted: str = "wrap",
        cursor: int = 0,
        order: Order | None = None,
        on_wrap: Callable[[int, int], None] = lambda epoch, tokens: None,
    ):
        if not 0 <= rank < world_size:
            raise DataError(
                f"rank {rank} is not one of {world_size}", allowed=f"0 … {world_size - 1}"
            )
        self.stream, self.seq_len, self.seed, self.rows = stream, seq_len, seed, rows
        self.rank, self.world_size, self.on_exhausted, self.on_wrap = (
            rank,
            world_size,
            on_exhausted,
            on_wrap,
        )
        self.cursor = cursor
        self.n_windows = stream.n_windows(seq_len)
        if self.n_windows < 1:
            raise DataError(
                "the training split is shorter than one window",
                value=f"{stream.n_tokens} tokens",
                allowed=f"at least {seq_len + 1}",
                next_step="add text or lower model.max_seq_len",
            )
        self.order = order or UniformOrder(self.n_windows, seed)
        self._n_windows = np.array([max(1, s.n_windows) for s in self.order.sources])

    @ensure(
        lambda self, result: result.input_ids.shape == (self.rows, self.seq_len), "a batch is full"
    )
    def draw(self) -> Batch:
        """The next rows of this rank. Raises StreamExhausted at the end of
        a source unless it wraps.
        """
        before = self.cursor
        after = before + self.rows * self.world_size
        rounds = self.order.counts(before) // self._n_windows
        self.order.decide(before, after)
        counts = self.order.counts(after)
        if self.on_exhausted == "error" and (counts > self._n_windows).any():
            raise self._exhausted(before, after, int(np.argmax(counts - self._n_windows)))
        draws = self.order.at(before + self.rank * self.rows + np.arange(self.rows))
        rows = self.stream.rows(draws.windows, self.seq_len)
        self.cursor = after
        if (counts // self._n_windows > rounds).any():
            self.on_wrap(int((counts // self._n_windows).max()), after * self.seq_len)
        return as_batch(rows, draws, before, after)

    def _exhausted(self, before: int, after: int, source: int) -> StreamExhausted:
        arm = self.order.sources[source]
        left = (
            max(0, arm.n_windows - int(self.order.counts(before)[source]))
            if len(self.order.sources) == 1
            else 0
        )
        return StreamExhausted(
            f"the corpus is exhausted after {before} samples: source {arm.name} has "
            f"{arm.n_windows} windows",
            value=f"{after - before} windows wanted, {left} left",
            allowed="data.on_exhausted = wrap, or fewer steps",
            next_step="--set data.on_exhausted=wrap, or add text",
        )


def as_batch(rows: Rows, draws: Draws, before: int, after: int) -> Batch:
    """Rows of a stream and what they are, as tensors."""
    ids = None if rows.document_ids is None else torch.from_numpy(rows.document_ids)
    return Batch(
        torch.from_numpy(rows.input_ids),
        torch.from_numpy(rows.labels),
        tuple(draws.windows.tolist()),
        int(draws.epochs.max()),
        before,
        after,
        ids,
        tuple(draws.sources.tolist()),
        tuple(draws.epochs.tolist()),
    )


@require(
    lambda seq_len, batch_size, n_batches: min(seq_len, batch_size, n_batches) >= 1,
    "sizes are at least 1",
)
def eval_batches(stream, seq_len: int, batch_size: int, n_batches: int) -> list[Batch]:
    """Always the same windows, spread evenly over the stream.
    Raises DataError naming what the split can give.
    """
    available, wanted = stream.n_windows(seq_len), batch_size * n_batches
    if wanted > available:
        raise DataError(
            f"the held-out split has {available} windows of {seq_len} tokens, {wanted} are needed",
            value=f"{n_batches} batches of {batch_size}",
            allowed=f"at most {available // batch_size} batches",
            next_step="lower eval.batches or eval.batch_size, or raise data.split.validation_frac",
        )
    chosen = (np.arange(wanted) * available) // wanted
    return [
        rows_batch(stream, chosen[i : i + batch_size], seq_len)
        for i in range(0, wanted, batch_size)
    ]


def rows_batch(stream, numbers: np.ndarray, seq_len: int) -> Batch:
    """Rows of a stream by number, outside any order."""
    nothing = np.zeros(len(numbers), np.int64)
    return as_batch(
        stream.rows(numbers, seq_len), Draws(nothing, numbers, nothing), 0, len(numbers)
    )


def probe_batches(stream, seq_len: int, n_windows: int) -> dict[str, Batch]:
    """For every source the same few windows of a split, spread evenly over it; a source without a
    window there is left out.
    """
    batches = {}
    for source, (first, available) in stream.spans(seq_len).items():
        if n := min(n_windows, available):
            batches[source] = rows_batch(stream, first + (np.arange(n) * available) // n, seq_len)
    return batches


def batch_hash(batches: Sequence[Batch]) -> str:
    """sha256 over the tokens and labels of batches; equal hashes mean equal held-out data."""
    digest = hashlib.sha256()
    for b in batches:
        digest.update(b.input_ids.contiguous().numpy().tobytes())
        digest.update(b.labels.contiguous().numpy().tobytes())
        if b.document_ids is not None:
            digest.update(b.document_ids.contiguous().numpy().tobytes())
    return digest.hexdigest()

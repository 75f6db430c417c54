"""The data loader: draws training rows in a declared order.
Its position is one integer; the order of a bandit has additional state.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackproof.contracts.conditions import ensure, require
from stackproof.data.packing import Rows
from stackproof.data.sampler import SampleIndices, Sampler, ShuffledSampler
from stackproof.spec.errors import DataError, StreamExhausted


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-step. Shapes (R, T) int64; `sample_ids` are window numbers;
    cursors count samples over all ranks.

    `document_ids` (R, T) if attention is masked between documents. `sources` and `epochs` are per
    row; epochs count per source. `rows_before` counts the rows that lower ranks have in the same
    micro-step.
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
    rows_before: int = 0

    @property
    def rows(self) -> range:
        """The number of each row in the order that all ranks draw from."""
        first = self.cursor_before + self.rows_before
        return range(first, first + len(self.input_ids))

    @property
    def n_tokens(self) -> int:
        """Tokens of the rows, without padding."""
        if self.document_ids is None:
            return self.input_ids.numel()
        return int((self.document_ids >= 0).sum())


def model_inputs(batch: Any, device: torch.device | str) -> tuple[Any, ...]:
    """A batch as the positional arguments of a model's forward, on `device`.

    (ids,), or (ids, None, document ids) if attention is masked between documents.
    """
    ids_BT = batch.input_ids.to(device, non_blocking=True)
    documents_BT = getattr(batch, "document_ids", None)
    if documents_BT is None:
        return (ids_BT,)
    return ids_BT, None, documents_BT.to(device, non_blocking=True)


class DataLoader:
    """Batches of one rank. The position `cursor` is the number of samples drawn by all ranks.

    `on_exhausted` is "wrap" or "error". Without a `sampler` the windows of the whole stream are
    shuffled. Raises DataError if the stream is shorter than one window.
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
        sampler: Sampler | None = None,
    ):
        if not 0 <= rank < world_size:
            raise DataError(
                f"rank {rank} is not one of {world_size}", allowed=f"0 … {world_size - 1}"
            )
        self.stream, self.seq_len, self.seed, self.rows = stream, seq_len, seed, rows
        self.rank, self.world_size = rank, world_size
        self.on_exhausted = on_exhausted
        self.cursor = cursor
        self.n_windows = stream.n_windows(seq_len)
        if self.n_windows < 1:
            raise DataError(
                "the training split is shorter than one window",
                value=f"{stream.n_tokens} tokens",
                allowed=f"at least {seq_len + 1}",
                next_step="add text or lower model.max_seq_len",
            )
        self.sampler = sampler or ShuffledSampler(self.n_windows, seed)
        self._n_windows = np.array([max(1, s.n_windows) for s in self.sampler.sources])

    @ensure(
        lambda self, result: result.input_ids.shape == (self.rows, self.seq_len), "a batch is full"
    )
    def next_batch(self) -> Batch:
        """The next rows of this rank. Raises StreamExhausted at the end of a source if
        `on_exhausted` is "error".
        """
        before = self.cursor
        after = before + self.rows * self.world_size
        self.sampler.decide(before, after)
        counts = self.sampler.counts(after)
        if self.on_exhausted == "error" and (counts > self._n_windows).any():
            raise self._exhausted(before, after, int(np.argmax(counts - self._n_windows)))
        draws = self.sampler.at(before + self.rank * self.rows + np.arange(self.rows))
        rows = self.stream.rows(draws.windows, self.seq_len)
        self.cursor = after
        return as_batch(rows, draws, before, after, self.rows * self.rank)

    def _exhausted(self, before: int, after: int, source: int) -> StreamExhausted:
        drawn, left = self.sampler.sources[source], 0
        if len(self.sampler.sources) == 1:
            left = max(0, drawn.n_windows - int(self.sampler.counts(before)[source]))
        return StreamExhausted(
            f"the corpus is exhausted after {before} samples: source {drawn.name} has "
            f"{drawn.n_windows} windows",
            value=f"{after - before} windows needed, {left} left",
            allowed="data.on_exhausted = wrap, or fewer steps",
            next_step="--set data.on_exhausted=wrap, or add text",
        )


def as_batch(
    rows: Rows, draws: SampleIndices, before: int, after: int, rows_before: int = 0
) -> Batch:
    """A batch of tensors from rows of a stream and their metadata."""
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
        rows_before,
    )


@require(
    lambda seq_len, batch_size, n_batches: min(seq_len, batch_size, n_batches) >= 1,
    "sizes are at least 1",
)
def eval_batches(stream, seq_len: int, batch_size: int, n_batches: int) -> list[Batch]:
    """Fixed held-out windows, spread evenly over the stream.
    Raises DataError with the available number if the split is too short.
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
    """A batch from rows of a stream by number."""
    nothing = np.zeros(len(numbers), np.int64)
    return as_batch(
        stream.rows(numbers, seq_len), SampleIndices(nothing, numbers, nothing), 0, len(numbers)
    )


def probe_batches(stream, seq_len: int, n_windows: int) -> dict[str, Batch]:
    """Fixed held-out windows for every source, spread evenly over the split; a source without a
    window is skipped.
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
        # Padding counts as one more document, as in the hashes of earlier versions.
        ids = b.document_ids
        ids = None if ids is None else ids.where(ids >= 0, ids.amax(1, keepdim=True) + 1)
        for tensor in (b.input_ids, b.labels, ids):
            if tensor is not None:
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()

"""Draws training windows in an order that is a pure function of (seed, epoch, index); the whole state is one integer."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contracts.conditions import ensure, require
from spec.errors import DataError, StreamExhausted

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-step. Shapes (R, T) int64; `sample_ids` are window numbers; cursors count samples over all ranks."""

    input_ids: Tensor
    labels: Tensor
    sample_ids: tuple[int, ...]
    epoch: int
    cursor_before: int
    cursor_after: int


_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 finaliser of x + key, vectorised; uint64 in, uint64 out."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


ROUNDS = 6


@require(lambda n: 1 <= n <= 2**48, "the domain has 1 … 2^48 elements")
def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Image of `positions` (int64, 0 … n-1) under a keyed bijection of 0 … n-1.

    A Feistel network over the next even number of bits; images outside the domain walk on until they fall inside
    (cycle walking), so nothing is ever materialised: O(1) memory and start-up for any n.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    x = positions.astype(np.uint64)
    pending = np.ones(x.shape, bool)
    while pending.any():
        x[pending] = _feistel(x[pending], half, mask, key)
        pending = x >= np.uint64(n)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: int, mask: np.uint64, key: int) -> np.ndarray:
    left, right = x >> np.uint64(half), x & mask
    for r in range(ROUNDS):
        left, right = right, left ^ (_mix(right, key + r * 0x9E3779B97F4A7C15) & mask)
    return (left << np.uint64(half)) | right


def order_key(seed: int, epoch: int) -> int:
    """64-bit key of one epoch's order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big")


def window_order(indices: np.ndarray, n_windows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, window) of global sample numbers; epochs follow each other without a gap."""
    epochs, positions = np.divmod(indices, n_windows)
    windows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(positions[chosen], n_windows, order_key(seed, int(epoch)))
    return epochs, windows


class Reader:
    """Batches of one rank. `cursor`, the number of samples drawn by all ranks together, is its only state.

    `on_exhausted` is "wrap" or "error"; `on_wrap(epoch, tokens)` is told of every epoch that begins.
    Raises DataError if the stream is shorter than one window.
    """

    @require(lambda seq_len, rows, cursor: seq_len >= 1 and rows >= 1 and cursor >= 0, "seq_len and rows are at least 1, cursor 0")
    @require(lambda on_exhausted: on_exhausted in ("wrap", "error"), "on_exhausted is wrap or error")
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
        on_wrap: Callable[[int, int], None] = lambda epoch, tokens: None,
    ):
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is not one of {world_size}", allowed=f"0 … {world_size - 1}")
        self.stream, self.seq_len, self.seed, self.rows = stream, seq_len, seed, rows
        self.rank, self.world_size, self.on_exhausted, self.on_wrap = rank, world_size, on_exhausted, on_wrap
        self.cursor = cursor
        self.n_windows = stream.n_windows(seq_len)
        if self.n_windows < 1:
            raise DataError(
                "the training split is shorter than one window",
                value=f"{stream.n_tokens} tokens",
                allowed=f"at least {seq_len + 1}",
                next_step="add text or lower model.max_seq_len",
            )

    @ensure(lambda self, result: result.input_ids.shape == (self.rows, self.seq_len), "a batch is full")
    def draw(self) -> Batch:
        """The next `rows` windows of this rank. Raises StreamExhausted at the end of the corpus unless it wraps."""
        before = self.cursor
        after = before + self.rows * self.world_size
        if self.on_exhausted == "error" and after > self.n_windows:
            raise StreamExhausted(
                f"the corpus is exhausted after {before} of {self.n_windows} windows",
                value=f"{after - before} windows wanted, {self.n_windows - before} left",
                allowed="data.on_exhausted = wrap, or fewer steps",
                next_step="--set data.on_exhausted=wrap, or add text",
            )
        indices = before + self.rank * self.rows + np.arange(self.rows)
        epochs, windows = window_order(indices, self.n_windows, self.seed)
        tokens_RT = torch.from_numpy(self.stream.windows(windows, self.seq_len))
        self.cursor = after
        if after // self.n_windows > before // self.n_windows:
            self.on_wrap(after // self.n_windows, after * self.seq_len)
        return Batch(tokens_RT[:, :-1], tokens_RT[:, 1:], tuple(windows.tolist()), int(epochs[-1]), before, after)


@require(lambda seq_len, batch_size, n_batches: min(seq_len, batch_size, n_batches) >= 1, "sizes are at least 1")
def eval_batches(stream, seq_len: int, batch_size: int, n_batches: int) -> list[Batch]:
    """Always the same windows, spread evenly over the stream. Raises DataError naming what the split can give."""
    available, wanted = stream.n_windows(seq_len), batch_size * n_batches
    if wanted > available:
        raise DataError(
            f"the held-out split has {available} windows of {seq_len} tokens, {wanted} are needed",
            value=f"{n_batches} batches of {batch_size}",
            allowed=f"at most {available // batch_size} batches",
            next_step="lower eval.batches or eval.batch_size, or raise data.split.validation_frac",
        )
    chosen = (np.arange(wanted) * available) // wanted
    batches = []
    for start in range(0, wanted, batch_size):
        windows = chosen[start : start + batch_size]
        tokens_RT = torch.from_numpy(stream.windows(windows, seq_len))
        batches.append(Batch(tokens_RT[:, :-1], tokens_RT[:, 1:], tuple(windows.tolist()), 0, start, start + batch_size))
    return batches


def batch_hash(batches: Sequence[Batch]) -> str:
    """sha256 over the tokens and labels of batches; equal hashes mean equal held-out data."""
    digest = hashlib.sha256()
    for b in batches:
        digest.update(b.input_ids.contiguous().numpy().tobytes())
        digest.update(b.labels.contiguous().numpy().tobytes())
    return digest.hexdigest()

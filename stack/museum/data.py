"""Plants in corpora, shards and the reader."""

from dataclasses import replace

import numpy as np

from stackproof.contracts import data as checks
from stackproof.data import permutation, reader, shards, stages
from stackproof.museum.plant import swap
from stackproof.train import loop


def epoch_order_constant():
    original = permutation.order_key

    with swap(permutation, "order_key", lambda seed, epoch, source="": original(seed, 0, source)):
        yield


def sequential_order():
    with swap(permutation, "permute", lambda positions, n, key: positions):
        yield


def rank_shards_overlap():
    original = reader.Reader.draw

    def as_rank_zero(self):
        rank, self.rank = self.rank, 0
        try:
            return original(self)
        finally:
            self.rank = rank

    with swap(reader.Reader, "draw", as_rank_zero):
        yield


def rank_stride_one():
    original = reader.Reader.draw

    def one_row_apart(self):
        rank, before = self.rank, self.cursor
        self.rank, self.cursor = 0, before + rank
        try:
            b = original(self)
        finally:
            self.rank, self.cursor = rank, before
        self.cursor = before + self.rows * self.world_size
        return reader.Batch(b.input_ids, b.labels, b.sample_ids, b.epoch, before, self.cursor)

    with swap(reader.Reader, "draw", one_row_apart):
        yield


def split_then_mix():
    original = reader.Reader.draw

    def own_copy(self):
        rank, world_size, before = self.rank, self.world_size, self.cursor
        self.rank, self.world_size, self.cursor = 0, 1, before // world_size
        try:
            b = original(self)
        finally:
            self.rank, self.world_size, self.cursor = (
                rank,
                world_size,
                before + self.rows * world_size,
            )
        return replace(b, cursor_before=before, cursor_after=self.cursor)

    with swap(reader.Reader, "draw", own_copy):
        yield


def workers_share_generator():
    original = reader.Reader.draw

    def copied(self):
        b = original(self)
        self.copied = getattr(self, "copied", None) or np.random.default_rng(self.seed)
        windows = self.copied.integers(0, self.n_windows, self.rows)
        rows = self.stream.rows(windows, self.seq_len)
        tokens = {
            "input_ids": reader.torch.from_numpy(rows.input_ids),
            "labels": reader.torch.from_numpy(rows.labels),
        }
        return replace(b, **tokens, sample_ids=tuple(windows.tolist()))

    with swap(reader.Reader, "draw", copied):
        yield


def head_only():
    original = permutation.permute

    def truncated(positions, n, key):
        return original(positions, n, key) % max(1, n // 2)

    with swap(permutation, "permute", truncated):
        yield


def labels_unshifted():
    original = reader.Reader.draw

    def unshifted(self):
        b = original(self)
        return replace(b, labels=b.input_ids.clone())

    with swap(reader.Reader, "draw", unshifted):
        yield


def placeholder_on_exhaustion():
    original = reader.Reader.draw

    def placeholder(self):
        try:
            return original(self)
        except reader.StreamExhausted:
            zeros = reader.torch.zeros(self.rows, self.seq_len, dtype=reader.torch.int64)
            return reader.Batch(
                zeros,
                zeros,
                (0,) * self.rows,
                0,
                self.cursor,
                self.cursor,
                None,
                (0,) * self.rows,
                (0,) * self.rows,
            )

    with swap(reader.Reader, "draw", placeholder):
        yield


def silent_wrap():
    original = reader.Reader.draw

    def wrapping(self):
        self.on_exhausted = "wrap"
        return original(self)

    with swap(reader.Reader, "draw", wrapping):
        yield


def id_overflow():
    def wrapped(ids, vocab_size):
        return np.asarray(ids, np.int64).astype(np.uint8).astype(shards.token_dtype(vocab_size))

    with swap(shards, "pack_ids", wrapped):
        yield


def eos_missing():
    original = shards.pack_ids

    def without_end(ids, vocab_size):
        packed = original(ids, vocab_size)
        return packed[:0] if len(packed) == 1 else packed

    with swap(shards, "pack_ids", without_end):
        yield


def split_overlap():
    original = stages.sides

    def overlapping(cfg, texts, hashes):
        for n, (split, text, digest) in enumerate(original(cfg, texts, hashes)):
            yield split, text, digest
            if split == "validation" and n % 10 < 8:
                yield "train", text, digest

    with swap(stages, "sides", overlapping):
        yield


def blind_scanner():
    original = checks.span_hashes
    calls = [0]

    def differently_salted(tokens, span):
        calls[0] += 1
        return original(tokens, span) ^ np.uint64(calls[0])

    with swap(checks, "span_hashes", differently_salted):
        yield


def tiny_corpus():
    original = stages.sides

    def tiny(cfg, texts, hashes):
        for split, text, digest in original(cfg, texts, hashes):
            yield split, text if split == "validation" else text[:60], digest

    with swap(stages, "sides", tiny):
        yield


def window_drawn_twice():
    original = reader.Reader.draw

    def stale(self):
        b = original(self)
        last = getattr(self, "_last", b)
        self._last = b
        return replace(
            last, epoch=b.epoch, cursor_before=b.cursor_before, cursor_after=b.cursor_after
        )

    with swap(reader.Reader, "draw", stale):
        yield


def position_skips():
    original = reader.Reader.draw

    def skipping(self):
        b = original(self)
        self.cursor += self.rows
        return b

    with swap(reader.Reader, "draw", skipping):
        yield


def batch_held_back():
    original, held = loop.draw, []

    def late(trainer):
        held.append(original(trainer))
        return held[-2:][0]

    with swap(loop, "draw", late):
        yield

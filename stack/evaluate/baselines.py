"""Baselines of held-out text: unigram and bigram models fitted on training tokens, and a
compressor. V vocab.
"""

import lzma
import math
from typing import Any

import numpy as np

from stackproof.contracts.conditions import require
from stackproof.spec.formulas import bits_per_byte

MAX_FIT_TOKENS = 20_000_000


def unigram_probs(train_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """p(b) = (count + 1) / (n + V), shape (V,) float64: above 0 everywhere, sums to 1."""
    counts = np.bincount(train_ids, minlength=vocab_size)
    return (counts + 1.0) / (len(train_ids) + vocab_size)


class Bigram:
    """p(b|a) = (count(a,b) + k(a)·p(b)) / (count(a) + k(a)), with k(a) the number of kinds
    seen after a, at least 1.

    Witten-Bell interpolation with the add-one unigram: above 0 everywhere, sums to 1 for each a.
    Source: Witten & Bell 1991.
    """

    def __init__(self, train_ids: np.ndarray, vocab_size: int):
        self.vocab_size, self.unigram = vocab_size, unigram_probs(train_ids, vocab_size)
        self.pairs, self.pair_counts = np.unique(
            _pair_keys(train_ids, vocab_size), return_counts=True
        )
        first = (self.pairs // vocab_size).astype(np.int64)
        self.totals = np.bincount(first, weights=self.pair_counts, minlength=vocab_size)
        self.kinds = np.maximum(np.bincount(first, minlength=vocab_size), 1)

    def probs(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """p(b|a) for aligned arrays of ids, float64."""
        keys = a.astype(np.int64) * self.vocab_size + b
        if len(self.pairs):
            at = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
            counts = np.where(self.pairs[at] == keys, self.pair_counts[at], 0)
        else:
            counts = np.zeros(len(keys))
        return (counts + self.kinds[a] * self.unigram[b]) / (self.totals[a] + self.kinds[a])


def _pair_keys(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    return ids[:-1].astype(np.int64) * vocab_size + ids[1:]


def tokens_of(stream: Any, limit: int | None = None) -> np.ndarray:
    """The first `limit` tokens of a TokenStream, int64."""
    n = stream.n_tokens if limit is None else min(stream.n_tokens, limit)
    return np.asarray(stream.token_range(0, n)).astype(np.int64)


def _bits_per_byte(probs: np.ndarray, labels: np.ndarray, tokenizer: Any) -> float:
    return bits_per_byte(
        float(-np.log(probs).sum()),
        int(np.asarray(tokenizer.token_bytes)[labels].sum(dtype=np.int64)),
    )


@require(lambda validation: validation.n_tokens >= 2, "there are held-out tokens to score")
def unigram_bits_per_byte(train: Any, validation: Any, tokenizer: Any) -> float:
    """Held-out bits per byte of the add-one unigram, fitted on at most MAX_FIT_TOKENS tokens. The
    first held-out token is not scored.
    """
    labels = tokens_of(validation)[1:]
    probs = unigram_probs(tokens_of(train, MAX_FIT_TOKENS), tokenizer.vocab_size)
    return _bits_per_byte(probs[labels], labels, tokenizer)


@require(lambda validation: validation.n_tokens >= 2, "there are held-out tokens to score")
def bigram_bits_per_byte(train: Any, validation: Any, tokenizer: Any) -> float:
    """Held-out bits per byte of the interpolated bigram, over the same labels as the unigram."""
    ids = tokens_of(validation)
    model = Bigram(tokens_of(train, MAX_FIT_TOKENS), tokenizer.vocab_size)
    return _bits_per_byte(model.probs(ids[:-1], ids[1:]), ids[1:], tokenizer)


BASELINES = {  # by the metric of a record
    "baseline_unigram_bits_per_byte": unigram_bits_per_byte,
    "baseline_bigram_bits_per_byte": bigram_bits_per_byte,
}


def compressed_bits_per_byte(text: str, *, after: str) -> float:
    """Bits per byte by which a text makes the LZMA2 stream of another one longer; inf for no
    text.
    """
    held_out, known = text.encode(), after.encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    if not held_out:
        return math.inf
    return 8 * (size(known + held_out) - size(known)) / len(held_out)


def uniform_loss_nats(vocab_size: int) -> float:
    """Loss in nats of a uniform distribution over the vocabulary: ln V."""
    return math.log(vocab_size)

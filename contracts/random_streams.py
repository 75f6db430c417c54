"""Gate of random streams: rows and dropout masks are those that the seed of a run gives by the
published formulas, computed here from them alone. D d_model, T tokens
"""

import hashlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
from torch import Tensor

from stackproof.contracts.dropout import TOKENS, Draw, branch_draws
from stackproof.contracts.gate import Verdict, decide_all, decides
from stackproof.contracts.subject import Curriculum, Source, Subject, Trainee

ROWS_PER_SOURCE = 128
WORD = (1 << 32) - 1


@decides("runtime.streams")
def streams(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The first rows of every source, and the dropout masks of the first train step."""
    seed, architecture = subject.declared.seed, subject.declared.architecture
    wrong_rows, n_rows = _wrong_rows(seed, subject.curriculum)
    wrong, n_elements = 0, 0
    if (dropout := architecture["dropout"]) > 0:
        wrong, n_elements = _wrong_elements(seed, dropout, subject.training.trainee())
    wrong_frac = wrong / n_elements if n_elements else 0.0
    return decide_all(
        [
            wrong_rows > limits.wrong_rows_max
            and f"{wrong_rows} of {n_rows} rows are not those that the seed {seed} gives",
            wrong_frac > limits.wrong_elements_frac_max
            and f"{wrong} of {n_elements} elements are not dropped or kept as the seed {seed} "
            "decides",
        ],
        "another program with this seed draws otherwise: ",
        wrong_rows=wrong_rows,
        rows=n_rows,
        wrong_elements_frac=wrong_frac,
        elements=n_elements,
    )


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named stream: the first 63 bits of SHA-256 of "seed/name/0"."""
    return int(hashlib.sha256(f"{seed}/{name}/0".encode()).hexdigest()[:16], 16) >> 1


# --- the order of rows ----------------------------------------------------------------------------


def _wrong_rows(seed: int, curriculum: Curriculum) -> tuple[int, int]:
    """How many of the first rows of each source are others than those of its shuffled windows, and
    how many were compared.
    """
    order, wrong, compared = curriculum.sampler_order(), 0, 0
    n = ROWS_PER_SOURCE * len(order.sources)
    order.decide(0, n)
    drawn = order.at(np.arange(n))
    for number, source in enumerate(order.sources):
        rows = drawn.windows[drawn.sources == number][:ROWS_PER_SOURCE].tolist()
        truth = shuffled_windows(stream_seed(seed, "order"), source, len(order.sources), len(rows))
        wrong += sum(row != window for row, window in zip(rows, truth))
        compared += len(rows)
    return wrong, compared


def shuffled_windows(seed: int, source: Source, n_sources: int, n_rows: int) -> Iterator[int]:
    """The windows of the first rows of a source, epoch after epoch."""
    suffix = f"/{source.name}" if n_sources > 1 else ""
    for row in range(n_rows):
        epoch, place = divmod(row, source.n_windows)
        digest = hashlib.sha256(f"{seed}/{epoch}{suffix}".encode()).hexdigest()
        yield source.first + _image(place, source.n_windows, int(digest[:16], 16))


def _image(place: int, n: int, key: int) -> int:
    """Image of a place under the keyed permutation of 0 … n-1: a Feistel network of six rounds on
    the next even number of bits, repeated until the image is below n.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    while True:
        left, right = place >> half, place % (1 << half)
        for r in range(6):
            mixed = _splitmix64(right + key + r * 0x9E3779B97F4A7C15) % (1 << half)
            left, right = right, left ^ mixed
        place = (left << half) + right
        if place < n:
            return place


def _splitmix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    x %= 1 << 64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return x ^ (x >> 31)


# --- dropout --------------------------------------------------------------------------------------


def _wrong_elements(seed: int, dropout: float, trainee: Trainee) -> tuple[int, int]:
    """How many elements behind the branches were kept where they are to be dropped or the other way
    round, on some tokens of the first row of each micro-batch of one step, and how many were
    compared. Where a branch gave 0 nothing can be seen. A block that skips tokens is left out.
    """
    stream, n_kept = stream_seed(seed, "dropout-masks"), max(1, round((1 - dropout) * 65536))
    batches = trainee.draw()
    draws = branch_draws(trainee, batches)
    per_batch, row, found = len(draws) // len(batches), 0, []
    for number, batch in enumerate(batches):
        n_rows, n_tokens = batch.input_ids.shape
        for draw in draws[number * per_batch : (number + 1) * per_batch]:
            if len(draw[1]) == min(TOKENS, n_tokens):
                found.append(_compared(stream, n_kept, row, draw))
        row += n_rows
    return sum(wrong for wrong, _ in found), sum(n for _, n in found)


def _compared(stream: int, n_kept: int, row: int, draw: Draw) -> tuple[int, int]:
    """Wrong and compared elements of four tokens, at both ends of the features."""
    (layer, branch), given_TD, added_TD = draw
    site, width = 2 * layer + (branch == "ffn"), given_TD.shape[1]
    wrong = n = 0
    for token in sorted({1, len(given_TD) // 3, len(given_TD) // 2, len(given_TD) - 1}):
        for block in sorted({0, 1, (width - 1) // 8}):
            first, last = 8 * block, min(8 * block + 8, width)
            halves = _halves(stream, (block + (site << 16), token, row, 1))
            kept = [half < n_kept for half in halves[: last - first]]
            seen = _seen(given_TD[token, first:last], added_TD[token, first:last])
            pairs = [(k, s) for k, s in zip(kept, seen) if s is not None]
            wrong += sum(k != s for k, s in pairs)
            n += len(pairs)
    return wrong, n


def _seen(given: Tensor, added: Tensor) -> Sequence[bool | None]:
    """Whether each element was kept; None where the branch gave 0."""
    return [a != 0 if g != 0 else None for g, a in zip(given.tolist(), added.tolist())]


def _halves(stream: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Eight numbers of 16 bits: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) of
    a counter of four words, keyed by the low and the high word of a stream's seed.
    """
    a, b, c, d = counter
    low, high = stream & WORD, stream >> 32
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ low, q & WORD, (p >> 32) ^ d ^ high, p & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return [half for word in (a, b, c, d) for half in (word & 0xFFFF, word >> 16)]

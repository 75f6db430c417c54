"""Deduplication of documents, exact and near, and word n-grams shared with evaluation sets.
Memory is bounded by buckets.

Near duplicates: MinHash signatures (Broder 1997) of word n-grams by the library rensa. Equal bands
of rows give the candidates, the whole signature decides. With 128 values the estimate of the
Jaccard similarity has a standard error of at most 0.045.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from stackproof.data.filters import UNSPACED
from stackproof.spec.errors import EnvironmentUnfit

WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
GRAM_WORDS = 13  # arXiv:2005.14165, appendix C
SIGNATURE = 128
ROWS_IN_MEMORY, PAIRS_AT_ONCE = 2**24, 2**15
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MINHASH_SEED = 42


def word_hashes(text: str) -> np.ndarray:
    """32-bit hash of every word, uint64 (n,): without case, punctuation and Unicode variants; equal
    in every process.
    """
    words = WORD.findall(
        (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    )
    return np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint64, len(words))


def runs(words: np.ndarray, length: int) -> np.ndarray:
    """64-bit hash of every n-gram of `length` words, uint64 (max(0, n − length + 1),)."""
    n = max(0, len(words) - length + 1)
    return _folded((words[k : k + n] for k in range(length)), n)


def _folded(columns: Iterable[np.ndarray], n: int) -> np.ndarray:
    """One 64-bit hash per row of n rows given by columns; the order of columns matters.
    uint64 (n,).
    """
    total = np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            total = (total + column) * MULTIPLIER
            total ^= total >> np.uint64(29)
    return total


def first_of_each(hashes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which values occur for the first time, over all arrays in order; bool arrays of the same
    lengths.
    """
    keep = [np.ones(len(h), bool) for h in hashes]
    for bucket in _buckets(sum(map(len, hashes))):
        value, where = _gather(hashes, bucket)
        order = np.lexsort((where, value))
        repeated = np.zeros(len(value), bool)
        repeated[1:] = value[order][1:] == value[order][:-1]
        _strike(keep, hashes, where[order][repeated])
    return keep


def _buckets(n: int) -> Iterator[tuple[int, int]]:
    """(remainder, modulus) pairs that split n values into buckets that fit in memory."""
    modulus = 1 + n // ROWS_IN_MEMORY
    yield from ((remainder, modulus) for remainder in range(modulus))


def _gather(arrays: Iterable[np.ndarray], bucket: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values of one bucket and their positions in the concatenation of all arrays."""
    values, places, first = [], [], 0
    for array in arrays:
        value = np.asarray(array).view(np.uint64)
        chosen = np.flatnonzero(value % np.uint64(bucket[1]) == bucket[0])
        values.append(value[chosen])
        places.append(chosen + first)
        first += len(array)
    return np.concatenate([np.zeros(0, np.uint64), *values]), np.concatenate(
        [np.zeros(0, np.int64), *places]
    )


def _strike(keep: Sequence[np.ndarray], arrays: Sequence[np.ndarray], places: np.ndarray) -> None:
    """Clear the flags at positions of the concatenation."""
    for index, _, within in _owners(np.cumsum([len(a) for a in arrays]), places):
        keep[index][within] = False


def _owners(ends: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(array, which of the places lie in it, these places within it) for positions of the
    concatenation of arrays with these ends.
    """
    owner = np.searchsorted(ends, places, side="right")
    for index in np.unique(owner).tolist():
        chosen = owner == index
        yield index, chosen, places[chosen] - (ends[index - 1] if index else 0)


# --- near repeats ---------------------------------------------------------------------------------


def require_library() -> None:
    """Raises EnvironmentUnfit if the library for near duplicates is missing."""
    try:
        import rensa  # noqa: F401
    except ImportError as e:
        raise EnvironmentUnfit(
            "data.dedup.kind = near needs the library rensa",
            next_step="pip install 'stackproof[train]', or --set data.dedup.kind=exact",
        ) from e


def signatures(texts: Sequence[str], shingle_words: int) -> np.ndarray:
    """MinHash signatures, uint32 (n, SIGNATURE).
    A text shorter than an n-gram counts as one n-gram, a text without words as one word.
    """
    from rensa import RMinHash

    shingles = []
    for text in texts:
        words = word_hashes(text)
        if not len(words):
            words = np.array([zlib.crc32(text.encode())], np.uint64)
        shingles.append(runs(words, min(shingle_words, max(1, len(words)))))
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    flat = np.concatenate([np.zeros(0, np.uint64), *shingles])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, SIGNATURE, MINHASH_SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), SIGNATURE)


def near_repeats(
    signature_parts: Sequence[np.ndarray], keep: Sequence[np.ndarray], similarity_min: float
) -> list[np.ndarray]:
    """Which documents are near duplicates of an earlier kept one: estimated Jaccard similarity at
    least `similarity_min`. bool arrays.

    Indexing `signature_parts` may open memory maps; one band of one bucket is in memory at a time.
    If the document that a duplicate refers to is dropped too, the duplicate is compared again, so
    the result equals that of a sequential pass.
    """
    if not keep:
        return []
    rows = _Rows(signature_parts)
    alive = np.concatenate(keep)
    like = np.full(len(alive), -1)  # the earlier document that a dropped one duplicates
    while True:
        for band in range(_bands(similarity_min)):
            for bucket in _buckets(len(alive)):
                value, where = _gather(
                    (_one_band(s, band, _bands(similarity_min)) for s in signature_parts), bucket
                )
                open_yet = alive[where] & (like[where] < 0)
                order = np.argsort(value[open_yet], kind="stable")
                _strike_groups(
                    value[open_yet][order], where[open_yet][order], rows, like, similarity_min
                )
        struck = like >= 0
        orphans = struck & struck[like]
        if not orphans.any():
            break
        like[orphans] = -1
    return np.split(struck, np.cumsum([len(k) for k in keep])[:-1])


def _bands(similarity_min: float) -> int:
    """Number of bands of a signature: 16 of 8 rows find 90 percent of the pairs 0.03 above a
    similarity of 0.8; 32 of 4 rows do so from 0.5 on.
    """
    return 16 if similarity_min >= 0.8 else 32


def _one_band(signature: np.ndarray, band: int, bands: int) -> np.ndarray:
    """One hash per document over the rows of a band, uint64 (n,). Documents with equal hashes are
    candidates.
    """
    width = SIGNATURE // bands
    columns = (
        np.asarray(signature[:, k]).astype(np.uint64)
        for k in range(band * width, (band + 1) * width)
    )
    return _folded(columns, len(signature))


def _strike_groups(
    value: np.ndarray, where: np.ndarray, rows: "_Rows", like: np.ndarray, similarity_min: float
) -> None:
    """Drop candidates that duplicate an earlier one with the same hash. Input is sorted by hash,
    then position.

    Each round handles all groups at once: all members are compared with the first of their group,
    which then leaves it.
    """
    while len(value):
        first = np.concatenate([[True], value[1:] != value[:-1]])
        leader = np.flatnonzero(first)[np.cumsum(first) - 1]
        others = np.flatnonzero(~first)
        for piece in np.array_split(others, 1 + len(others) // PAIRS_AT_ONCE):
            alike = piece[
                (rows[where[piece]] == rows[where[leader[piece]]]).mean(1) >= similarity_min
            ]
            like[where[alike]] = where[leader[alike]]
        left = ~first & (like[where] < 0)
        value, where = value[left], where[left]


class _Rows:
    """Row access to several matrices as one."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts, self.ends = parts, np.cumsum([len(p) for p in parts])

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        out = np.empty((len(numbers), SIGNATURE), np.uint32)
        for index, chosen, within in _owners(self.ends, numbers):
            out[chosen] = self.parts[index][within]
        return out


# --- evaluation sets ------------------------------------------------------------------------------


def gram_set(texts: Iterable[str]) -> np.ndarray:
    """Hashes of all n-grams of GRAM_WORDS words of the texts, sorted, unique, uint64."""
    return np.unique(
        np.concatenate([np.zeros(0, np.uint64), *(runs(word_hashes(t), GRAM_WORDS) for t in texts)])
    )


def is_long(text: str) -> bool:
    """Whether a text has at least GRAM_WORDS words; shorter texts cannot be found."""
    return len(word_hashes(text)) >= GRAM_WORDS


def shares_gram(text: str, grams: np.ndarray) -> bool:
    """Whether a text contains an n-gram of the set."""
    own = runs(word_hashes(text), GRAM_WORDS)
    if not len(own) or not len(grams):
        return False
    places = np.minimum(np.searchsorted(grams, own), len(grams) - 1)
    return bool((grams[places] == own).any())


def finds_hidden(text: str, grams: np.ndarray) -> bool:
    """Whether the scanner finds a text of the set inside another."""
    return shares_gram(f"before it {text} after it", grams)

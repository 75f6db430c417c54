"""A shuffled order in O(1) memory: a keyed bijection, evaluated on demand."""

import hashlib
from functools import lru_cache

import numpy as np

from stackproof.contracts.conditions import require

ROUNDS = 6
# positions computed together: up to some thousands, the calls dominate the cost
AHEAD = 4096
BLOCKS_KEPT = 24


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 finaliser of x + key; uint64 arrays in and out.
    Arrays wrap around without a warning, scalars warn.
    """
    x = x + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@require(lambda n: 1 <= n <= 2**48, "the domain has 1 … 2^48 elements")
def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Image of `positions` (int64, 0 … n-1) under a keyed bijection of 0 … n-1.

    A Feistel network over the next even number of bits, with cycle walking for images outside the
    domain: O(1) memory and start-up time for any n.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    x = _feistel(positions.astype(np.uint64), half, mask, key)
    while (outside := np.flatnonzero(x >= np.uint64(n))).size:
        x[outside] = _feistel(x[outside], half, mask, key)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: int, mask: np.uint64, key: int) -> np.ndarray:
    left, right = x >> np.uint64(half), x & mask
    for r in range(ROUNDS):
        left, right = right, left ^ (_mix(right, key + r * 0x9E3779B97F4A7C15) & mask)
    return (left << np.uint64(half)) | right


class Shuffle:
    """`permute` for sequential access: computed in blocks, the last few of which are cached."""

    def __init__(self):
        self._block = lru_cache(BLOCKS_KEPT)(_block)

    def permute(self, positions: np.ndarray, n: int, key: int) -> np.ndarray:
        """As `permute`."""
        images, blocks = np.empty(len(positions), np.int64), positions // AHEAD
        for block in set(blocks.tolist()):
            here = blocks == block
            images[here] = self._block(block, n, key)[positions[here] - block * AHEAD]
        return images


def _block(block: int, n: int, key: int) -> np.ndarray:
    return permute(np.arange(block * AHEAD, min((block + 1) * AHEAD, n)), n, key)


def order_key(seed: int, epoch: int, source: str = "") -> int:
    """64-bit key of the order of one epoch, and of one source in a mixture."""
    named = f"/{source}" if source else ""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}{named}".encode()).digest()[:8], "big")

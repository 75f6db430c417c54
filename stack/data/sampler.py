"""Samplers: which window of which source is sample number i. A shuffled stream, or a mixture by
fixed shares.

Sources are spans of windows of one stream. Sample numbers count over all ranks. The orders here are
pure functions of (seed, number). The order of a bandit (stackproof.data.bandit) depends on its
measurements; its state is part of the checkpoint.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from stackproof.config import check_shares
from stackproof.data import permutation
from stackproof.spec.errors import ConfigError

# rows of a block, in which a static mixture meets its shares exactly; the smallest share is one row
BLOCK = 1024


@dataclass(frozen=True)
class Source:
    """One source: its windows in the stream, and its shares of the rows (0-1)."""

    name: str
    first: int
    n_windows: int
    weight: float
    cap: float
    floor: float


@dataclass(frozen=True)
class SampleIndices:
    """Epoch, window number and source number of each sample, int64 (n,).
    Epochs count per source.
    """

    epochs: np.ndarray
    windows: np.ndarray
    sources: np.ndarray


class Sampler(Protocol):
    """Interface of a sampler."""

    sources: Sequence[Source]

    def decide(self, before: int, after: int) -> None:
        """Decide samples before … after-1; orders that are pure functions do nothing."""

    def at(self, numbers: np.ndarray) -> SampleIndices: ...
    def counts(self, after: int) -> np.ndarray:
        """Samples of each source among the first `after`, int64."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load a saved state. Returns the names of its sources that do not exist here and were
        dropped.
        """


class ShuffledSampler:
    """All windows shuffled, a new order every epoch."""

    def __init__(self, n_windows: int, seed: int, name: str = "all"):
        self.sources = (Source(name, 0, n_windows, 1.0, 1.0, 0.0),)
        self._start, self._base = 0, 0
        self.seed, self._shuffle = seed, permutation.Shuffle()

    def decide(self, before: int, after: int) -> None:
        return None

    def at(self, numbers: np.ndarray) -> SampleIndices:
        source = np.zeros(len(numbers), np.int64)
        k = numbers - self._start + self._base
        return SampleIndices(*locate(self.sources, source, k, self.seed, self._shuffle), source)

    def counts(self, after: int) -> np.ndarray:
        return np.array([after - self._start + self._base])

    def state_dict(self) -> dict:
        return {"start": self._start, "base": {self.sources[0].name: self._base}}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        self._start, base, dropped = _known_counts(state, self.sources)
        self._base = int(base[0])
        return dropped


def shares(sources: Sequence[Source]) -> np.ndarray:
    """Shares in proportion to the weights, clipped to [floor, cap], with sum 1; float64.

    Raises ConfigError if no such shares exist.
    """
    try:
        check_shares([s.name for s in sources], [(s.weight, s.cap, s.floor) for s in sources])
    except ValueError as e:
        raise ConfigError(
            str(e), next_step="change curriculum.weights, curriculum.caps or curriculum.floors"
        ) from e
    weight, cap, floor = (
        np.array([getattr(s, k) for s in sources]) for k in ("weight", "cap", "floor")
    )
    at_most = np.clip(np.where(weight > 0, math.inf, 0), floor, cap).sum()
    if at_most < 1 - 1e-9:
        raise ConfigError(
            f"the sources with a weight can take {at_most:g} of the rows at most",
            allowed="1",
            next_step="raise a cap, or give another source a weight",
        )
    low, high = 0.0, 1.0
    while np.clip(high * weight, floor, cap).sum() < 1 - 1e-12 and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break  # adjacent floating-point numbers
        low, high = (
            (middle, high) if np.clip(middle * weight, floor, cap).sum() < 1 else (low, middle)
        )
    return np.clip(high * weight, floor, cap)


def in_warmup(sources: Sequence[Source], listed: Iterable[str]) -> list[Source]:
    """The sources during a warm-up from the listed ones: shares follow the weights alone."""
    listed = [s.name for s in sources if s.name in listed and s.cap > 0]
    unweighted = not any(s.weight for s in sources if s.name in listed)
    return [
        replace(s, weight=1.0 if unweighted else s.weight, cap=1.0, floor=0.0)
        if s.name in listed
        else replace(s, weight=0.0, cap=0.0, floor=0.0)
        for s in sources
    ]


@dataclass(frozen=True)
class Phase:
    """A range of samples with fixed quotas per block; `base` counts the earlier samples of each
    source.
    """

    start: int
    quotas: np.ndarray
    base: np.ndarray

    def pattern(self) -> tuple[np.ndarray, np.ndarray]:
        return pattern(tuple(self.quotas.tolist()))

    def counts(self, after: int) -> np.ndarray:
        block, rest = divmod(after - self.start, BLOCK)
        return (
            self.base
            + block * self.quotas
            + np.bincount(self.pattern()[0][:rest], minlength=len(self.quotas))
        )


@lru_cache(maxsize=8)
def pattern(quotas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Source of every position of a block, and how many positions before it have the same source;
    int64 (BLOCK,).

    Smooth weighted round robin: over any range the count of a source differs from its share by at
    most the number of sources.
    """
    share, credit = np.array(quotas) / BLOCK, np.zeros(len(quotas))
    source, rank, drawn = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64), [0] * len(quotas)
    for i in range(BLOCK):
        credit += share
        s = int(np.argmax(credit))
        credit[s] -= 1
        source[i], rank[i] = s, drawn[s]
        drawn[s] += 1
    return source, rank


class MixtureSampler:
    """Fixed shares, met exactly in every block of BLOCK rows. A warm-up is a separate phase."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        *,
        warmup_rows: int = 0,
        warmup_sources: Sequence[str] = (),
    ):
        self.sources, self.seed = tuple(sources), seed
        self._warmup, self._shuffle = (warmup_rows, tuple(warmup_sources)), permutation.Shuffle()
        self.load_state_dict({})

    def _phases(self, start: int, base: np.ndarray) -> list[Phase]:
        until, listed = self._warmup
        phases = []
        if start < until:
            phases.append(Phase(start, quotas(in_warmup(self.sources, listed)), base))
            start, base = until, phases[0].counts(until)
        return [*phases, Phase(start, quotas(self.sources), base)]

    def decide(self, before: int, after: int) -> None:
        return None

    def at(self, numbers: np.ndarray) -> SampleIndices:
        draws = SampleIndices(*(np.empty(len(numbers), np.int64) for _ in range(3)))
        starts = [p.start for p in self.phases]
        phase_of = np.searchsorted(starts, numbers, side="right") - 1
        for i, phase in enumerate(self.phases):
            chosen = phase_of == i
            blocks, positions = np.divmod(numbers[chosen] - phase.start, BLOCK)
            source, rank = (part[positions] for part in phase.pattern())
            draws.sources[chosen] = source
            k = phase.base[source] + blocks * phase.quotas[source] + rank
            draws.epochs[chosen], draws.windows[chosen] = locate(
                self.sources, source, k, self.seed, self._shuffle
            )
        return draws

    def counts(self, after: int) -> np.ndarray:
        return next(p for p in reversed(self.phases) if p.start <= after).counts(after)

    def state_dict(self) -> dict:
        return {
            "start": self.phases[0].start,
            "base": dict(zip((s.name for s in self.sources), self.phases[0].base.tolist())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        start, base, dropped = _known_counts(state, self.sources)
        self.phases = self._phases(start, base)
        return dropped


def quotas(sources: Sequence[Source]) -> np.ndarray:
    """Rows of each source in a block, by largest remainder; int64, sums to BLOCK.
    Raises ConfigError for a share below half a row.
    """
    exact = shares(sources) * BLOCK
    made = np.floor(exact).astype(np.int64)
    for i in np.argsort(made - exact, kind="stable")[: BLOCK - int(made.sum())]:
        made[i] += 1
    lost = [s.name for s, q, e in zip(sources, made, exact) if e > 0 and q == 0]
    if lost:
        raise ConfigError(
            f"the share of source {lost[0]} is too small to be met",
            allowed=f"at least 1/{BLOCK}",
            next_step="raise its weight, or leave it out",
        )
    return made


def _known_counts(
    state: Mapping[str, Any], sources: Sequence[Source]
) -> tuple[int, np.ndarray, list[str]]:
    """(start, earlier samples of each source, names in the state that are not sources here)."""
    base = state.get("base", {})
    known = {s.name for s in sources if s.cap > 0}
    counts = np.array([int(base.get(s.name, 0)) for s in sources], np.int64)
    return (
        int(state.get("start", 0)),
        counts,
        sorted(n for n, k in base.items() if n not in known and k),
    )


def locate(
    sources: Sequence[Source],
    source: np.ndarray,
    k: np.ndarray,
    seed: int,
    shuffle: permutation.Shuffle,
) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, window of the stream) of the k-th sample of each source."""
    epochs, windows = np.empty(len(k), np.int64), np.empty(len(k), np.int64)
    for s in set(source.tolist()):
        mine, drawn = source == s, sources[s]
        name = drawn.name if len(sources) > 1 else ""
        epochs[mine], position = np.divmod(k[mine], drawn.n_windows)
        placed = np.empty(len(position), np.int64)
        for epoch in set(epochs[mine].tolist()):
            now = epochs[mine] == epoch
            placed[now] = shuffle.permute(
                position[now], drawn.n_windows, permutation.order_key(seed, epoch, name)
            )
        windows[mine] = drawn.first + placed
    return epochs, windows

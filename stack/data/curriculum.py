"""Which window of which source is sample number i: one shuffled stream, a mixture by fixed shares, or a bandit's mixture.

Sources are spans of windows of one stream. Sample numbers count over all ranks. The first two orders are pure functions of
(seed, number); the bandit's depends on what it measured, and its state travels in the checkpoint.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, assert_never

import numpy as np

from spec.canonical import sha256_json
from spec.errors import ConfigError, DataError
from stack.config import BanditCurriculum, RunConfig, StaticCurriculum, check_shares
from stack.data import permutation

BLOCK = 1024  # rows in which the shares of a static mixture come out exactly; the finest share is one row of a block
REWARD_SIGMAS = 2.0  # drops further from their mean than this count as this far


@dataclass(frozen=True)
class Source:
    """One arm: its windows in the stream, and its shares of the rows (0-1)."""

    name: str
    first: int
    n_windows: int
    weight: float
    cap: float
    floor: float


@dataclass(frozen=True)
class Draws:
    """Epoch, window number and source number of each sample, int64 (n,). Epochs count per source."""

    epochs: np.ndarray
    windows: np.ndarray
    sources: np.ndarray


class Order(Protocol):
    """What the reader asks."""

    sources: Sequence[Source]

    def decide(self, before: int, after: int) -> None:
        """Fix what samples before … after-1 are; orders that are pure functions have nothing to fix."""

    def at(self, numbers: np.ndarray) -> Draws: ...
    def counts(self, after: int) -> np.ndarray:
        """Samples of each source among the first `after`, int64."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over a saved state; returns the names of arms that were dropped because they are no arms here."""


class UniformOrder:
    """All windows shuffled, a new order every epoch."""

    def __init__(self, n_windows: int, seed: int, name: str = "all"):
        self.sources = (Source(name, 0, n_windows, 1.0, 1.0, 0.0),)
        self._start, self._base = 0, 0
        self.seed, self._shuffle = seed, permutation.Shuffle()

    def decide(self, before: int, after: int) -> None:
        return None

    def at(self, numbers: np.ndarray) -> Draws:
        numbers = numbers - self._start + self._base
        epochs, windows = permutation.window_order(numbers, self.sources[0].n_windows, self.seed, self._shuffle)
        return Draws(epochs, windows, np.zeros(len(numbers), np.int64))

    def counts(self, after: int) -> np.ndarray:
        return np.array([after - self._start + self._base])

    def state_dict(self) -> dict:
        return {"start": self._start, "base": {self.sources[0].name: self._base}}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        self._start, base, dropped = _known_counts(state, self.sources)
        self._base = int(base[0])
        return dropped


def shares(sources: Sequence[Source]) -> np.ndarray:
    """Shares in proportion to the weights, pushed into [floor, cap], that sum to 1; float64.

    Raises ConfigError if there are none.
    """
    try:
        check_shares([s.name for s in sources], [(s.weight, s.cap, s.floor) for s in sources])
    except ValueError as e:
        raise ConfigError(str(e), next_step="change curriculum.weights, curriculum.caps or curriculum.floors") from e
    weight, cap, floor = (np.array([getattr(s, k) for s in sources]) for k in ("weight", "cap", "floor"))
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
        low, high = (middle, high) if np.clip(middle * weight, floor, cap).sum() < 1 else (low, middle)
    return np.clip(high * weight, floor, cap)


def in_warmup(sources: Sequence[Source], listed: Iterable[str]) -> list[Source]:
    """The sources as they are while only the listed ones may be read."""
    return [s if s.name in listed else replace(s, weight=0.0, cap=0.0, floor=0.0) for s in sources]


@dataclass(frozen=True)
class Phase:
    """A stretch of samples with fixed quotas per block; `base` counts what each source had before it."""

    start: int
    quotas: np.ndarray
    base: np.ndarray

    def pattern(self) -> tuple[np.ndarray, np.ndarray]:
        return pattern(tuple(self.quotas.tolist()))

    def counts(self, after: int) -> np.ndarray:
        block, rest = divmod(after - self.start, BLOCK)
        return self.base + block * self.quotas + np.bincount(self.pattern()[0][:rest], minlength=len(self.quotas))


@lru_cache(maxsize=8)
def pattern(quotas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Source of every position of a block, and how many positions before it have the same source; int64 (BLOCK,).

    Smooth weighted round robin: over any stretch a source has its share to within as many rows as there are sources.
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


class StaticMixture:
    """Fixed shares, met exactly in every block of BLOCK rows; warm-up, if any, is a phase of its own."""

    def __init__(self, sources: Sequence[Source], seed: int, *, warmup_rows: int = 0, warmup_sources: Sequence[str] = ()):
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

    def at(self, numbers: np.ndarray) -> Draws:
        draws = Draws(*(np.empty(len(numbers), np.int64) for _ in range(3)))
        starts = [p.start for p in self.phases]
        phase_of = np.searchsorted(starts, numbers, side="right") - 1
        for i, phase in enumerate(self.phases):
            chosen = phase_of == i
            blocks, positions = np.divmod(numbers[chosen] - phase.start, BLOCK)
            source, rank = (part[positions] for part in phase.pattern())
            draws.sources[chosen] = source
            k = phase.base[source] + blocks * phase.quotas[source] + rank
            draws.epochs[chosen], draws.windows[chosen] = _locate(self.sources, source, k, self.seed, self._shuffle)
        return draws

    def counts(self, after: int) -> np.ndarray:
        return next(p for p in reversed(self.phases) if p.start <= after).counts(after)

    def state_dict(self) -> dict:
        return {"start": self.phases[0].start, "base": dict(zip((s.name for s in self.sources), self.phases[0].base.tolist()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        start, base, dropped = _known_counts(state, self.sources)
        self.phases = self._phases(start, base)
        return dropped


def quotas(sources: Sequence[Source]) -> np.ndarray:
    """Rows of each source in a block, by largest remainder; int64, sums to BLOCK. Raises ConfigError for a share below half a row."""
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


def _known_counts(state: Mapping[str, Any], sources: Sequence[Source]) -> tuple[int, np.ndarray, list[str]]:
    """(start, samples each source had before it, names in the state that are no source here)."""
    base = state.get("base", {})
    known = {s.name for s in sources if s.cap > 0}
    counts = np.array([int(base.get(s.name, 0)) for s in sources], np.int64)
    return int(state.get("start", 0)), counts, sorted(n for n, k in base.items() if n not in known and k)


def _locate(
    sources: Sequence[Source], source: np.ndarray, k: np.ndarray, seed: int, shuffle: permutation.Shuffle
) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, window of the stream) of the k-th sample of each source."""
    epochs, windows = np.empty(len(k), np.int64), np.empty(len(k), np.int64)
    for s in set(source.tolist()):
        mine, arm = source == s, sources[s]
        name = arm.name if len(sources) > 1 else ""
        epochs[mine], position = np.divmod(k[mine], arm.n_windows)
        placed = np.empty(len(position), np.int64)
        for epoch in set(epochs[mine].tolist()):
            now = epochs[mine] == epoch
            placed[now] = shuffle.permute(position[now], arm.n_windows, permutation.order_key(seed, epoch, name))
        windows[mine] = arm.first + placed
    return epochs, windows


class Bandit:
    """Shares that move towards one source per turn, chosen by discounted UCB on what a turn did to the held-out loss of all sources.

    A turn's shares lie in [floor, cap] for every source, and rows follow them by smooth weighted round robin, so that over any n rows
    a source gets its share to within as many rows as there are sources. Rewards are drops of the weighted held-out loss, standardised
    by their own discounted mean and spread and cut at ±REWARD_SIGMAS, in 0-1 (Garivier & Moulines, arXiv:0805.3415).
    """

    def __init__(self, sources: Sequence[Source], seed: int, cfg: BanditCurriculum, *, warmup_rows: int = 0):
        self.sources, self.seed, self.cfg = tuple(sources), seed, cfg
        self._warmup_rows, self._shuffle = warmup_rows, permutation.Shuffle()
        self._base_shares = shares(self.sources)
        self._warm = in_warmup(self.sources, cfg.warmup_sources) if warmup_rows else list(self.sources)
        self.arms = [i for i, s in enumerate(self.sources) if s.cap > 0]
        self.fingerprint = sha256_json([[s.name, s.weight, s.cap, s.floor] for s in self.sources])
        self._reset(np.zeros(len(self.sources), np.int64))

    def _reset(self, drawn: np.ndarray) -> None:
        self.drawn = drawn
        self.credit = np.zeros(len(self.sources))
        self.pulls, self.rewards = np.zeros(len(self.sources)), np.zeros(len(self.sources))
        self.drop_mean, self.drop_var, self.n_drops = 0.0, 0.0, 0
        self.last_losses: dict[str, float] = {}
        self.focus = self._choose()
        self._decided = (0, np.zeros(0, np.int64), np.zeros(0, np.int64))

    def target(self, position: int) -> np.ndarray:
        """Shares of the present turn, each in [floor, cap]; in the warm-up those of the listed sources alone."""
        if position < self._warmup_rows:
            return shares(self._warm)
        if not self.last_losses and not self.n_drops:
            return self._base_shares
        f = self.cfg.focus_share
        f = min(f, 1 - 1e-6)  # what the cap of the source in focus leaves goes to the others
        wanted = (1 - f) * self._base_shares + f * (np.arange(len(self.sources)) == self.focus)
        return shares([replace(s, weight=float(w)) for s, w in zip(self.sources, wanted)])

    def decide(self, before: int, after: int) -> None:
        """Choose the sources of samples before … after-1, going on with each source where it stands."""
        share, chosen, rank = None, np.empty(after - before, np.int64), np.empty(after - before, np.int64)
        for i in range(after - before):
            if share is None or before + i == self._warmup_rows:
                share = self.target(before + i)
                self.credit *= share > 0
            self.credit += share
            source = int(np.argmax(np.where(share > 0, self.credit, -np.inf)))
            self.credit[source] -= 1
            chosen[i], rank[i] = source, self.drawn[source]
            self.drawn[source] += 1
        self._decided = (before, chosen, rank)

    def at(self, numbers: np.ndarray) -> Draws:
        first, chosen, rank = self._decided
        source, k = chosen[numbers - first], rank[numbers - first]
        return Draws(*_locate(self.sources, source, k, self.seed, self._shuffle), source)

    def counts(self, after: int) -> np.ndarray:
        return self.drawn.copy()

    def reward(self, losses: Mapping[str, float]) -> dict[str, Any]:
        """End a turn with the held-out loss of every source in nats per token, and begin the next; returns a line for the log."""
        line: dict[str, Any] = {"focus": self.sources[self.focus].name, "losses_nats": dict(losses)}
        if self.last_losses:
            drop = self.drop(losses)
            line |= {"drop_nats": drop, "reward": self._learn(drop)}
        self.last_losses = dict(losses)
        self.focus = self._choose()
        return line | {"next_focus": self.sources[self.focus].name, "means": dict(zip(self._names(), self._means().tolist()))}

    def drop(self, losses: Mapping[str, float]) -> float:
        """By how much the held-out loss of all sources, in their shares, fell during the turn; nats per token."""
        return sum(w * (self.last_losses[s.name] - losses[s.name]) for w, s in zip(self._base_shares, self.sources) if w > 0)

    def _learn(self, drop: float) -> float:
        """Credit the source in focus with a standardised drop."""
        spread = math.sqrt(self.drop_var)
        z = (drop - self.drop_mean) / spread if self.n_drops > 1 and spread > 0 else 0.0
        reward = 0.5 + max(-1.0, min(1.0, z / REWARD_SIGMAS)) / 2
        step = 1 / (min(self.n_drops, 1 / (1 - self.cfg.discount)) + 1)
        self.drop_var += step * ((drop - self.drop_mean) ** 2 * (1 - step) - self.drop_var)
        self.drop_mean += step * (drop - self.drop_mean)
        self.n_drops += 1
        self.pulls *= self.cfg.discount
        self.rewards *= self.cfg.discount
        self.pulls[self.focus] += 1
        self.rewards[self.focus] += reward
        return reward

    def _means(self) -> np.ndarray:
        return np.divide(self.rewards, self.pulls, out=np.full(len(self.sources), 0.5), where=self.pulls > 0)

    def _choose(self) -> int:
        """The arm with the highest upper confidence bound; one never tried goes first. Ties go to the first in order."""
        candidates = [i for i in self.arms if self.sources[i].weight > 0]
        untried = [i for i in candidates if self.pulls[i] == 0]
        if untried:
            return untried[0]
        bonus = self.cfg.exploration * np.sqrt(np.log(1 + self.pulls.sum()) / np.maximum(self.pulls, 1e-9))
        bound = self._means() + bonus
        return max(candidates, key=lambda i: (bound[i], -i))

    def _names(self) -> list[str]:
        return [s.name for s in self.sources]

    def state_dict(self) -> dict:
        arms = {
            s.name: {"drawn": int(self.drawn[i]), **{k: float(getattr(self, k)[i]) for k in ("credit", "pulls", "rewards")}}
            for i, s in enumerate(self.sources)
            if s.cap > 0
        }
        numbers = {k: getattr(self, k) for k in ("drop_mean", "drop_var", "n_drops", "last_losses")}
        return {"fingerprint": self.fingerprint, "arms": arms, "focus": self.sources[self.focus].name, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Arms are those of the configuration with windows and a cap above 0; others in the state are dropped, with all they remember.

        A state of other arms or shares than these gives its positions and nothing else.
        """
        saved = {n: a["drawn"] for n, a in state["arms"].items()} if "arms" in state else state.get("base", {})
        known = {self.sources[i].name for i in self.arms}
        dropped = sorted(n for n in saved if n not in known)
        drawn = np.array([int(saved.get(s.name, 0)) if s.name in known else 0 for s in self.sources], np.int64)
        self._reset(drawn)
        if state.get("fingerprint") != self.fingerprint or dropped:
            return dropped
        for i in self.arms:
            arm = state["arms"][self.sources[i].name]
            self.credit[i], self.pulls[i], self.rewards[i] = (float(arm[k]) for k in ("credit", "pulls", "rewards"))
        self.drop_mean, self.drop_var = float(state["drop_mean"]), float(state["drop_var"])
        self.n_drops, self.last_losses = int(state["n_drops"]), {n: float(v) for n, v in state["last_losses"].items()}
        self.focus = self._names().index(state["focus"])
        return []


def sources_of(entries: Mapping[str, Mapping[str, Any]], spans: Mapping[str, tuple[int, int]]) -> list[Source]:
    """Arms out of a manifest's sources and their windows in the stream; a source without a shard has no window."""
    return [Source(name, *spans.get(name, (0, 0)), *(float(e[k]) for k in ("weight", "cap", "floor"))) for name, e in entries.items()]


def run_order(cfg: RunConfig, dataset: Any, *, seed: int) -> UniformOrder | StaticMixture | Bandit:
    """The order in which a run draws from its data set."""
    seq_len = cfg.model.max_seq_len
    arms = sources_of(dataset.sources, dataset.train.spans(seq_len))
    return make_order(cfg.curriculum, arms, seed=seed, rows_per_step=cfg.train.tokens_per_step // seq_len)


def make_order(
    cfg: StaticCurriculum | BanditCurriculum, sources: Sequence[Source], *, seed: int, rows_per_step: int
) -> UniformOrder | StaticMixture | Bandit:
    """The declared order. One source needs no mixing. Raises ConfigError for names or shares that no order can meet."""
    arms = apply_shares(cfg, sources)
    if len(arms) == 1 and isinstance(cfg, StaticCurriculum):
        return UniformOrder(arms[0].n_windows, seed, arms[0].name)
    for arm in arms:
        if arm.cap > 0 and not arm.n_windows:
            raise DataError(
                f"source {arm.name} holds no window, and its cap is {arm.cap:g}",
                next_step=f"give it more text, or --set curriculum.caps.{arm.name}=0",
            )
    warmup_rows = cfg.warmup_steps * rows_per_step
    match cfg:
        case StaticCurriculum():
            return StaticMixture(arms, seed, warmup_rows=warmup_rows, warmup_sources=cfg.warmup_sources)
        case BanditCurriculum():
            return Bandit(arms, seed, cfg, warmup_rows=warmup_rows)
        case _:
            assert_never(cfg)


def apply_shares(cfg: StaticCurriculum | BanditCurriculum, sources: Sequence[Source]) -> list[Source]:
    """Sources with the values of the configuration in place of their own. Raises ConfigError for a name that is no source."""
    names = [s.name for s in sources]
    tables = {"weights": cfg.weights, "caps": cfg.caps, "floors": cfg.floors, "warmup_sources": dict.fromkeys(cfg.warmup_sources, 0)}
    for key, table in tables.items():
        if unknown := [n for n in table if n not in names]:
            raise ConfigError(f"curriculum.{key} names a source that is not there", value=unknown[0], allowed=", ".join(names))
    made = [
        replace(s, weight=cfg.weights.get(s.name, s.weight), cap=cfg.caps.get(s.name, s.cap), floor=cfg.floors.get(s.name, s.floor))
        for s in sources
    ]
    shares(made)
    return made

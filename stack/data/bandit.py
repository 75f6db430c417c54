"""A mixture with shares that follow the gain in held-out loss, by a bandit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from stackproof.config import BanditCurriculum
from stackproof.data import permutation
from stackproof.data.sampler import SampleIndices, Source, in_warmup, locate, shares
from stackproof.spec.canonical import sha256_json

REWARD_SIGMAS = 2.0  # limit of the standardised drop


class DropScale:
    """Running mean and variance of drops of the loss; with a discount, older ones fade."""

    def __init__(self, discount: float):
        self.discount = discount
        self.mean, self.var, self.n = 0.0, 0.0, 0

    def standardised(self, drop: float) -> float:
        """A drop in spreads from the mean of those before it, which then includes it."""
        spread = math.sqrt(self.var)
        z = (drop - self.mean) / spread if self.n > 1 and spread > 0 else 0.0
        step = 1 / (min(self.n, 1 / (1 - self.discount)) + 1)
        self.var += step * ((drop - self.mean) ** 2 * (1 - step) - self.var)
        self.mean += step * (drop - self.mean)
        self.n += 1
        return z


class DiscountedUcb:
    """Discounted upper confidence bounds over arms (Garivier & Moulines, arXiv:0805.3415)."""

    def __init__(self, n_arms: int, discount: float, exploration: float):
        self.discount, self.exploration = discount, exploration
        self.pulls, self.rewards = np.zeros(n_arms), np.zeros(n_arms)

    def learn(self, arm: int, reward: float) -> None:
        """Fade all arms and credit one with a reward in 0-1."""
        self.pulls *= self.discount
        self.rewards *= self.discount
        self.pulls[arm] += 1
        self.rewards[arm] += reward

    def means(self) -> np.ndarray:
        """Mean reward of each arm; 0.5 for one that was never tried."""
        untried = np.full(len(self.pulls), 0.5)
        return np.divide(self.rewards, self.pulls, out=untried, where=self.pulls > 0)

    def choose(self, candidates: Sequence[int]) -> int:
        """The candidate with the highest upper confidence bound; one never tried goes first.
        Ties go to the first in order.
        """
        untried = [i for i in candidates if self.pulls[i] == 0]
        if untried:
            return untried[0]
        bonus = self.exploration * np.sqrt(
            np.log(1 + self.pulls.sum()) / np.maximum(self.pulls, 1e-9)
        )
        bound = self.means() + bonus
        return max(candidates, key=lambda i: (bound[i], -i))


class BanditSampler:
    """Shares that move towards one source per turn. Discounted UCB chooses the source; the reward
    is the drop of the held-out loss of all sources.

    The shares of a turn are in [floor, cap] for every source. Rows follow them by smooth weighted
    round robin: over any n rows the count of a source differs from its share by at most the number
    of sources. Rewards are drops of the weighted held-out loss, standardised by their discounted
    mean and standard deviation, clipped at ±REWARD_SIGMAS and scaled to 0-1.
    """

    def __init__(
        self, sources: Sequence[Source], seed: int, cfg: BanditCurriculum, *, warmup_rows: int = 0
    ):
        self.sources, self.seed, self.cfg = tuple(sources), seed, cfg
        self._warmup_rows, self._shuffle = warmup_rows, permutation.Shuffle()
        self._base_shares = shares(self.sources)
        self._warm = (
            in_warmup(self.sources, cfg.warmup_sources) if warmup_rows else list(self.sources)
        )
        self._reset(np.zeros(len(self.sources), np.int64))

    @cached_property
    def arms(self) -> list[int]:
        """Numbers of the sources that may be drawn."""
        return [i for i, s in enumerate(self.sources) if s.cap > 0]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the arms and their declared shares."""
        return sha256_json([[s.name, s.weight, s.cap, s.floor] for s in self.sources])

    def _reset(self, drawn: np.ndarray) -> None:
        self.drawn = drawn
        self.credit = np.zeros(len(self.sources))
        self.ucb = DiscountedUcb(len(self.sources), self.cfg.discount, self.cfg.exploration)
        self.scale = DropScale(self.cfg.discount)
        self.last_losses: dict[str, float] = {}
        # Nothing is learned about the focus of a turn that has rows of the warm-up.
        self.in_warmup = False
        self.focus = self._choose()
        self._decided = (0, np.zeros(0, np.int64), np.zeros(0, np.int64))

    def target(self, position: int) -> np.ndarray:
        """Shares of the current turn, each in [floor, cap]; in the warm-up, of the listed sources
        only.
        """
        if position < self._warmup_rows:
            return shares(self._warm)
        if not self.last_losses and not self.scale.n:
            return self._base_shares
        # the share above the cap of the source in focus goes to the others
        f = min(self.cfg.focus_share, 1 - 1e-6)
        wanted = (1 - f) * self._base_shares + f * (np.arange(len(self.sources)) == self.focus)
        return shares([replace(s, weight=float(w)) for s, w in zip(self.sources, wanted)])

    def decide(self, before: int, after: int) -> None:
        """Choose the sources of samples before … after-1; each source continues at its position."""
        self.in_warmup = self.in_warmup or before < self._warmup_rows
        share, n = None, after - before
        chosen, rank = np.empty(n, np.int64), np.empty(n, np.int64)
        for i in range(n):
            if share is None or before + i == self._warmup_rows:
                share = self.target(before + i)
                self.credit *= share > 0
            self.credit += share
            source = int(np.argmax(np.where(share > 0, self.credit, -np.inf)))
            self.credit[source] -= 1
            chosen[i], rank[i] = source, self.drawn[source]
            self.drawn[source] += 1
        self._decided = (before, chosen, rank)

    def at(self, numbers: np.ndarray) -> SampleIndices:
        first, chosen, rank = self._decided
        source, k = chosen[numbers - first], rank[numbers - first]
        return SampleIndices(*locate(self.sources, source, k, self.seed, self._shuffle), source)

    def counts(self, after: int) -> np.ndarray:
        return self.drawn.copy()

    def reward(self, losses: Mapping[str, float]) -> dict[str, Any]:
        """End a turn with the held-out loss of every source in nats per token, and start the next.
        Returns a line for the log.
        """
        line: dict[str, Any] = {"focus": self.sources[self.focus].name, "losses_nats": dict(losses)}
        if self.last_losses and not self.in_warmup:
            drop = self.drop(losses)
            line |= {"drop_nats": drop, "reward": self._learn(drop)}
        self.last_losses, self.in_warmup = dict(losses), False
        self.focus = self._choose()
        return line | {
            "next_focus": self.sources[self.focus].name,
            "means": dict(zip(self._names(), self.ucb.means().tolist())),
        }

    def drop(self, losses: Mapping[str, float]) -> float:
        """Drop of the held-out loss of all sources, weighted by shares, during the turn; nats per
        token.
        """
        return sum(
            w * (self.last_losses[s.name] - losses[s.name])
            for w, s in zip(self._base_shares, self.sources)
            if w > 0
        )

    def _learn(self, drop: float) -> float:
        """Credit the source in focus with a standardised drop."""
        z = self.scale.standardised(drop)
        reward = 0.5 + max(-1.0, min(1.0, z / REWARD_SIGMAS)) / 2
        self.ucb.learn(self.focus, reward)
        return reward

    def _choose(self) -> int:
        return self.ucb.choose([i for i in self.arms if self.sources[i].weight > 0])

    def _names(self) -> list[str]:
        return [s.name for s in self.sources]

    def state_dict(self) -> dict:
        arms = {
            s.name: {
                "drawn": int(self.drawn[i]),
                "credit": float(self.credit[i]),
                "pulls": float(self.ucb.pulls[i]),
                "rewards": float(self.ucb.rewards[i]),
            }
            for i, s in enumerate(self.sources)
            if s.cap > 0
        }
        parked = {s.name: int(n) for s, n in zip(self.sources, self.drawn) if s.cap == 0 and n}
        return {
            "fingerprint": self.fingerprint,
            "arms": arms,
            "focus": self.sources[self.focus].name,
            "parked": parked,
            "drop_mean": self.scale.mean,
            "drop_var": self.scale.var,
            "n_drops": self.scale.n,
            "last_losses": self.last_losses,
            "in_warmup": self.in_warmup,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load a state. Arms of the configuration with windows and a cap above 0 are kept; other
        arms of the state are dropped.

        If arms or shares of the state differ, only its positions are loaded. Raises ValueError if
        a loss that the next reward needs is missing.
        """
        saved = (
            {n: a["drawn"] for n, a in state["arms"].items()}
            if "arms" in state
            else state.get("base", {})
        )
        known = {self.sources[i].name for i in self.arms}
        dropped = sorted(n for n in saved if n not in known)
        # the position of a source without a share is kept for a later curriculum
        places = {**state.get("parked", {}), **saved}
        drawn = np.array([int(places.get(s.name, 0)) for s in self.sources], np.int64)
        self._reset(drawn)
        if state.get("fingerprint") != self.fingerprint or dropped:
            return dropped
        for i in self.arms:
            arm = state["arms"][self.sources[i].name]
            self.credit[i] = float(arm["credit"])
            self.ucb.pulls[i], self.ucb.rewards[i] = float(arm["pulls"]), float(arm["rewards"])
        self.scale.mean, self.scale.var = float(state["drop_mean"]), float(state["drop_var"])
        self.scale.n = int(state["n_drops"])
        self.last_losses = {n: float(v) for n, v in state["last_losses"].items()}
        needed = {s.name for s, share in zip(self.sources, self._base_shares) if share > 0}
        if self.last_losses and (unmeasured := needed - self.last_losses.keys()):
            raise ValueError(f"last_losses has no loss of {', '.join(sorted(unmeasured))}")
        self.focus, self.in_warmup = self._names().index(state["focus"]), bool(state["in_warmup"])
        return []

"""A mixture with shares that follow the gain in held-out loss, by a bandit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stackproof.config import BanditCurriculum
from stackproof.data import permutation
from stackproof.data.order import Draws, Source, in_warmup, locate, shares
from stackproof.spec.canonical import sha256_json

REWARD_SIGMAS = 2.0  # limit of the standardised drop


class Bandit:
    """Shares that move towards one source per turn. Discounted UCB chooses the source; the reward
    is the drop of the held-out loss of all sources.

    The shares of a turn are in [floor, cap] for every source. Rows follow them by smooth weighted
    round robin: over any n rows the count of a source differs from its share by at most the number
    of sources. Rewards are drops of the weighted held-out loss, standardised by their discounted
    mean and standard deviation, clipped at ±REWARD_SIGMAS and scaled to 0-1 (Garivier & Moulines,
    arXiv:0805.3415).
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
        self.arms = [i for i, s in enumerate(self.sources) if s.cap > 0]
        self.fingerprint = sha256_json([[s.name, s.weight, s.cap, s.floor] for s in self.sources])
        self._reset(np.zeros(len(self.sources), np.int64))

    def _reset(self, drawn: np.ndarray) -> None:
        self.drawn = drawn
        self.credit = np.zeros(len(self.sources))
        self.pulls, self.rewards = np.zeros(len(self.sources)), np.zeros(len(self.sources))
        self.drop_mean, self.drop_var, self.n_drops = 0.0, 0.0, 0
        self.last_losses: dict[str, float] = {}
        # whether the current turn has rows of the warm-up; such a turn gives no reward
        self.in_warmup = False
        self.focus = self._choose()
        self._decided = (0, np.zeros(0, np.int64), np.zeros(0, np.int64))

    def target(self, position: int) -> np.ndarray:
        """Shares of the current turn, each in [floor, cap]; in the warm-up, of the listed sources
        only.
        """
        if position < self._warmup_rows:
            return shares(self._warm)
        if not self.last_losses and not self.n_drops:
            return self._base_shares
        # the share above the cap of the source in focus goes to the others
        f = min(self.cfg.focus_share, 1 - 1e-6)
        wanted = (1 - f) * self._base_shares + f * (np.arange(len(self.sources)) == self.focus)
        return shares([replace(s, weight=float(w)) for s, w in zip(self.sources, wanted)])

    def decide(self, before: int, after: int) -> None:
        """Choose the sources of samples before … after-1; each source continues at its position."""
        self.in_warmup = self.in_warmup or before < self._warmup_rows
        share, chosen, rank = (
            None,
            np.empty(after - before, np.int64),
            np.empty(after - before, np.int64),
        )
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
        return Draws(*locate(self.sources, source, k, self.seed, self._shuffle), source)

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
            "means": dict(zip(self._names(), self._means().tolist())),
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
        return np.divide(
            self.rewards, self.pulls, out=np.full(len(self.sources), 0.5), where=self.pulls > 0
        )

    def _choose(self) -> int:
        """The arm with the highest upper confidence bound; untried arms first, ties to the first in
        order.
        """
        candidates = [i for i in self.arms if self.sources[i].weight > 0]
        untried = [i for i in candidates if self.pulls[i] == 0]
        if untried:
            return untried[0]
        bonus = self.cfg.exploration * np.sqrt(
            np.log(1 + self.pulls.sum()) / np.maximum(self.pulls, 1e-9)
        )
        bound = self._means() + bonus
        return max(candidates, key=lambda i: (bound[i], -i))

    def _names(self) -> list[str]:
        return [s.name for s in self.sources]

    def state_dict(self) -> dict:
        arms = {
            s.name: {
                "drawn": int(self.drawn[i]),
                **{k: float(getattr(self, k)[i]) for k in ("credit", "pulls", "rewards")},
            }
            for i, s in enumerate(self.sources)
            if s.cap > 0
        }
        numbers = {
            k: getattr(self, k)
            for k in ("drop_mean", "drop_var", "n_drops", "last_losses", "in_warmup")
        }
        parked = {s.name: int(n) for s, n in zip(self.sources, self.drawn) if s.cap == 0 and n}
        return {
            "fingerprint": self.fingerprint,
            "arms": arms,
            "focus": self.sources[self.focus].name,
            "parked": parked,
            **numbers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load a state. Arms of the configuration with windows and a cap above 0 are kept; other
        arms of the state are dropped.

        If arms or shares of the state differ, only its positions are loaded.
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
            self.credit[i], self.pulls[i], self.rewards[i] = (
                float(arm[k]) for k in ("credit", "pulls", "rewards")
            )
        self.drop_mean, self.drop_var = float(state["drop_mean"]), float(state["drop_var"])
        self.n_drops, self.last_losses = (
            int(state["n_drops"]),
            {n: float(v) for n, v in state["last_losses"].items()},
        )
        self.focus, self.in_warmup = self._names().index(state["focus"]), bool(state["in_warmup"])
        return []

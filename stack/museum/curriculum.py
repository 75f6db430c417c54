"""Plants in the mixing of sources: shares, warm-up, bandit, its state,
and what happens when sources change.
"""

from dataclasses import replace

import numpy as np

from stackproof.data import bandit, reader
from stackproof.data import curriculum as mixing
from stackproof.museum.plant import swap, touch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


def floor_ignored():
    def plain(sources):
        weights = np.array([s.weight for s in sources])
        return weights / weights.sum()

    with swap(bandit, "shares", plain):
        yield


def bounds_left_behind():
    original = mixing.sources_of

    def unbounded(entries, spans):
        return [replace(s, cap=1.0, floor=0.0) for s in original(entries, spans)]

    with swap(mixing, "sources_of", unbounded):
        yield


def capped_source_drawn():
    original = bandit.shares

    def truthy(sources):
        return original([replace(s, cap=s.cap or 1.0) for s in sources])

    with swap(bandit, "shares", truthy):
        yield


def warmup_forgotten():
    with swap(bandit, "in_warmup", lambda sources, listed: list(sources)):
        yield


def warmup_outlasts_its_rows():
    original = bandit.Bandit.decide

    def whole_call(self, before, after):
        rows, inside = self._warmup_rows, before < self._warmup_rows
        self._warmup_rows = after if inside else rows
        original(self, before, after)
        self._warmup_rows = rows

    with swap(bandit.Bandit, "decide", whole_call):
        yield


def head_of_source_only():
    original = bandit.locate

    def first_rows(sources, source, k, seed, shuffle):
        return original(
            [replace(s, n_windows=max(1, s.n_windows // 4)) for s in sources],
            source,
            k,
            seed,
            shuffle,
        )

    with swap(bandit, "locate", first_rows):
        yield


def reward_from_own_loss():
    def own(self, losses):
        name = self.sources[self.focus].name
        return self.last_losses[name] - losses[name]

    with swap(bandit.Bandit, "drop", own):
        yield


def reward_unnormalised():
    def thousandfold(self, drop):
        self.n_drops += 1
        self.pulls[self.focus] += 1
        self.rewards[self.focus] += max(0.0, drop) * 1000
        return max(0.0, drop) * 1000

    with swap(bandit.Bandit, "_learn", thousandfold):
        yield


def never_looks_back():
    def greedy(self):
        candidates = [i for i in self.arms if self.sources[i].weight > 0]
        untried = [i for i in candidates if self.pulls[i] == 0]
        return untried[0] if untried else max(candidates, key=lambda i: (self._means()[i], -i))

    with swap(bandit.Bandit, "_choose", greedy):
        yield


def rewards_never_fade():
    original = bandit.Bandit._learn

    def remembering(self, drop):
        before = self.rewards.copy()
        reward = original(self, drop)
        self.rewards += (1 - self.cfg.discount) * before
        return reward

    with swap(bandit.Bandit, "_learn", remembering):
        yield


def trend_is_merit():
    original = bandit.Bandit._learn

    def uncentred(self, drop):
        reward = original(self, drop)
        self.drop_mean = 0.0
        return reward

    with swap(bandit.Bandit, "_learn", uncentred):
        yield


def focus_shuns():
    original = bandit.Bandit.target

    def away(self, position):
        share = original(self, position)
        rest = np.where(np.arange(len(share)) == self.focus, 0.0, self._base_shares)
        return (
            bandit.shares([replace(s, weight=float(w)) for s, w in zip(self.sources, rest)])
            if self.last_losses
            else share
        )

    with swap(bandit.Bandit, "target", away):
        yield


def shares_drift_together():
    original = bandit.Bandit.target

    def evened(self, position):
        share = original(self, position)
        return np.where(share > 0, share / 2 + 0.5 / max(1, (share > 0).sum()), 0.0)

    with swap(bandit.Bandit, "target", evened):
        yield


def zombie_arm():
    original = bandit.Bandit.load_state_dict

    def merging(self, state):
        dropped = original(self, state)
        for name in dropped:
            at = (
                [s.name for s in self.sources].index(name)
                if name in [s.name for s in self.sources]
                else len(self.sources)
            )
            revived = replace(self.sources[0], name=name, cap=1.0, weight=1.546)
            self.sources = (*self.sources[:at], revived, *self.sources[at + 1 :])
            self.arms = [i for i, s in enumerate(self.sources) if s.cap > 0]
            for array in ("drawn", "credit", "pulls", "rewards"):
                former = getattr(self, array)
                setattr(
                    self,
                    array,
                    np.append(former, 0).astype(former.dtype) if at == len(former) else former,
                )
            self._base_shares = bandit.shares(self.sources)
        return dropped

    with swap(bandit.Bandit, "load_state_dict", merging):
        yield


def state_forgets_positions():
    original = bandit.Bandit.load_state_dict

    def from_the_top(self, state):
        dropped = original(self, state)
        self.drawn = np.zeros_like(self.drawn)
        return dropped

    with swap(bandit.Bandit, "load_state_dict", from_the_top):
        yield


def state_forgets_spread():
    original = bandit.Bandit.load_state_dict

    def half(self, state):
        return original(self, {**state, "drop_mean": 0.0, "drop_var": 0.0, "n_drops": 0})

    with swap(bandit.Bandit, "load_state_dict", half):
        yield


def state_forgets_warmup():
    original = bandit.Bandit.load_state_dict

    def unmarked(self, state):
        return original(self, {**state, "in_warmup": False})

    with swap(bandit.Bandit, "load_state_dict", unmarked):
        yield


def ledger_names_another_source():
    original = reader.as_batch

    def neighbours(rows, draws, before, after):
        n = max(2, int(draws.sources.max()) + 1)
        return original(rows, replace(draws, sources=(draws.sources + 1) % n), before, after)

    with swap(reader, "as_batch", neighbours):
        yield


def floor_starved():
    def first_alone(self, position):
        return (np.arange(len(self.sources)) == 0).astype(float)

    with swap(bandit.Bandit, "target", first_alone):
        yield


def shock_at_switch():
    original, former = steps.accumulate, [()]

    def shaken(state, batches):
        result = original(state, batches)
        mix = tuple(np.bincount([s for b in batches for s in b.sources or (0,)], minlength=8))
        if former[0] not in ((), mix) and state.step >= 12:
            touch()
            for gradient in opt.gradients(state.model):
                gradient.mul_(100)
        former[0] = mix
        return result

    with swap(steps, "accumulate", shaken, counted=False):
        yield

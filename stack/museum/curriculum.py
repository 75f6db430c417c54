"""Plants in the mixing of sources that are more than changed text."""

from dataclasses import replace

import numpy as np

from stackproof.data import bandit
from stackproof.museum.plant import swap, touch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


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

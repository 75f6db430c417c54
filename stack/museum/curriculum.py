"""A plant in the mixing of sources that waits for a state: a change of sources."""

import numpy as np

from stackproof.museum.plant import swap, touch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


# Waits for a change of sources.
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

"""Which tensors an update moved, to the bit."""

import torch
from torch import nn

from contracts.callbacks.digest import checksums
from contracts.witness import LeftAlone, Moved

VISIBLE_RATE = 1e-7


class Movement:
    """Remembers a checksum of every parameter, and for how many updates each has stood still."""

    def __init__(self, model: nn.Module):
        self._names, self._parameters = map(list, zip(*model.named_parameters()))
        self._frozen_at_first = [not p.requires_grad for p in self._parameters]
        self._first = self._sums = checksums(self._parameters)
        self._still = [0] * len(self._parameters)

    def settle(self) -> None:
        """Take the weights as they are, as when a checkpoint was loaded into them."""
        self._sums = checksums(self._parameters)

    def between(self, step: int) -> LeftAlone:
        """What has changed since the last update was judged."""
        changed = (checksums(self._parameters) != self._sums).tolist()
        return LeftAlone(step, tuple(n for n, c in zip(self._names, changed) if c), len(changed))

    def judge(self, step: int, optimizer: torch.optim.Optimizer, rates: tuple[float, ...]) -> Moved:
        """What the update that ended `step` moved; `rates` are those it used, by group of the optimizer."""
        before, self._sums = self._sums, checksums(self._parameters)
        changed = (self._sums != before).tolist()
        ever = (self._sums != self._first).tolist()
        frozen = [not p.requires_grad and was for p, was in zip(self._parameters, self._frozen_at_first)]
        visible = {id(p) for g, rate in zip(optimizer.param_groups, rates) if rate >= VISIBLE_RATE for p in g["params"]}
        owned = [i for i, p in enumerate(self._parameters) if p.requires_grad and id(p) in visible]
        for i in owned:
            judged = self._parameters[i].ndim >= 2 and "expert" not in self._names[i]
            self._still[i] = 0 if changed[i] or not judged else self._still[i] + 1
        stillest = max(range(len(self._still)), key=self._still.__getitem__)
        return Moved(
            step=step,
            frozen_moved=tuple(n for n, f, e in zip(self._names, frozen, ever) if f and e),
            longest_still=self._still[stillest],
            stillest=self._names[stillest],
            moved_frac=sum(changed[i] for i in owned) / max(1, len(owned)),
        )

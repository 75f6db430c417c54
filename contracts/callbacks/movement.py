"""Which tensors an update moved, to the bit, and whether its first step went downhill."""

import torch
from torch import Tensor, nn

from contracts.callbacks.digest import checksums
from contracts.witness import LeftAlone, Moved

VISIBLE_RATE = 1e-7
SLOPE_ENTRIES = 1_000_000  # of weights, copied once


class Movement:
    """Remembers a checksum of every parameter, and for how many updates each has stood still."""

    def __init__(self, model: nn.Module):
        self._names, self._parameters = map(list, zip(*model.named_parameters()))
        self._frozen_at_first = [not p.requires_grad for p in self._parameters]
        self._first = self._sums = checksums(self._parameters)
        self._still = [0] * len(self._parameters)
        self._before: list[tuple[Tensor, Tensor, float, float]] | None = None

    def settle(self) -> None:
        """Take the weights as they are, as when a checkpoint was loaded into them."""
        self._sums = checksums(self._parameters)

    def between(self, step: int) -> LeftAlone:
        """What has changed since the last update was judged."""
        changed = (checksums(self._parameters) != self._sums).tolist()
        return LeftAlone(step, tuple(n for n, c in zip(self._names, changed) if c), len(changed))

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep some weights as they are, if this optimizer has yet to take its first step. Whole tensors, up to SLOPE_ENTRIES."""
        if self._before is not None:
            return
        self._before, left = [], SLOPE_ENTRIES
        for group in optimizer.param_groups if not optimizer.state else ():
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse and group["lr"] >= VISIBLE_RATE and p.numel() <= left:
                    left -= p.numel()
                    self._before.append((p, p.detach().float().clone(), float(group["lr"]), float(group.get("weight_decay") or 0.0)))

    def _uphill(self) -> float:
        """Cosine of movement and gradient in the first update, 0 where it is not known. Decay, in the gradient or beside it, is taken out.

        Without moments every rule in use steps against the gradient: plain, scaled by entry, by its sign, or orthogonalised.
        """
        kept, self._before = self._before or [], []
        along, along_coupled, moved, slope = 0.0, 0.0, 0.0, 0.0
        for p, before, rate, decay in kept:
            if p.grad is None:
                return 0.0
            then, step, gradient = (x.flatten() for x in (before, p.detach().float() - before, p.grad.detach().float()))
            pairs = (step, gradient), (then, gradient), (step, then), (step, step), (gradient, gradient)
            descent, pull, shrink, moved_p, slope_p = torch.stack([torch.dot(a, b) for a, b in pairs]).tolist()
            along, along_coupled = along + descent + rate * decay * pull, along_coupled + descent + decay * shrink
            moved, slope = moved + moved_p, slope + slope_p
        scale = (moved * slope) ** 0.5
        return max(-1.0, min(along, along_coupled) / scale) if scale > 0 else 0.0

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
            uphill=self._uphill(),
        )

"""Which tensors an update changed, to the bit, and whether the first such update goes against the
gradient.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks.digest import checksums, gathered
from stackproof.contracts.events import StateCompared, WeightsUpdated

VISIBLE_RATE = 1e-7
SLOPE_ENTRIES = 1_000_000  # of weights, copied once


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parameter before an update, and the sum of its gradients while its optimizer had no
    state.
    """

    parameter: Tensor
    group: dict[str, Any]
    before: Tensor
    slopes: Tensor

    def slope(self) -> Tensor:
        """The gradient to go against: with the sign turned where the optimizer maximizes."""
        return self.parameter.grad.detach().float() * (-1.0 if self.group.get("maximize") else 1.0)

    def products(self, slope: Tensor) -> list[float]:
        """Step·slope, weights·slope, step·weights, step·step, slope·slope."""
        then, step, slope = (
            x.flatten() for x in (self.before, self.parameter.detach().float() - self.before, slope)
        )
        return torch.stack(
            [
                torch.dot(a, b)
                for a, b in (
                    (step, slope),
                    (then, slope),
                    (step, then),
                    (step, step),
                    (slope, slope),
                )
            ]
        ).tolist()


def _cosine(
    kept: list[_Kept], slopes: list[Tensor], n_decays: int, rate_of: dict[int, float]
) -> float | None:
    """Cosine of the step and a slope that holds coupled decay `n_decays` times, over all tensors;
    decay of either kind is removed.

    None if it is not defined: the slope is zero, or something is not finite.
    """
    along, along_coupled, moved, steep = 0.0, 0.0, 0.0, 0.0
    for k, slope in zip(kept, slopes):
        descent, pull, shrink, moved_k, steep_k = k.products(slope)
        decay = float(k.group.get("weight_decay") or 0.0)
        along, along_coupled = (
            along + descent + rate_of[id(k.parameter)] * decay * pull,
            along_coupled + descent + n_decays * decay * shrink,
        )
        moved, steep = moved + moved_k, steep + steep_k
    scale = (moved * steep) ** 0.5
    if not (scale > 0 and all(map(math.isfinite, (along, along_coupled, scale)))):
        return None
    return max(-1.0, min(along, along_coupled) / scale)


class MovementTracker:
    """Keeps a checksum of every parameter, and the number of updates since each has changed."""

    def __init__(self, model: nn.Module):
        self._names, self._parameters = map(list, zip(*model.named_parameters()))
        self._frozen_at_first = [not p.requires_grad for p in self._parameters]
        self._first = self._sums = checksums(self._parameters)
        self._still = [0] * len(self._parameters)
        self._kept: list[_Kept] | None = None
        self._waited = 0  # updates whose gradients are in the sums

    def settle(self) -> None:
        """Accept the weights as they are, as after loading a checkpoint."""
        self._sums = checksums(self._parameters)
        if self._kept:
            self._kept = []

    def between(self, step: int) -> StateCompared:
        """The parameters that have changed since the last update."""
        changed = (checksums(self._parameters) != self._sums).tolist()
        names = tuple(n for n, c in zip(self._names, changed) if c)
        return StateCompared(step, "time since the last update", len(changed), names)

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy whole tensors, up to SLOPE_ENTRIES, if the optimizer has taken no step yet."""
        if self._kept is not None:
            return
        self._kept, left = [], SLOPE_ENTRIES
        for group in (
            sorted(optimizer.param_groups, key=lambda g: g["lr"] < VISIBLE_RATE)
            if not optimizer.state
            else ()
        ):
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse and p.numel() <= left:
                    left -= p.numel()
                    now = p.detach().float()
                    self._kept.append(_Kept(p, group, now.clone(), torch.zeros_like(now)))

    def _uphill(self, rate_of: dict[int, float]) -> tuple[float | None, str]:
        """(cosine of update and gradient at the first update that changes anything, else None;
        the reason why it cannot be known, or an empty string).

        A fresh optimizer steps against its gradient, whatever its rule: plain, scaled by entry, by
        sign, or orthogonalized. After updates at rate 0 its moments may hold their gradients too;
        so an update climbs only if it goes along both the last gradient and the sum. An update that
        changes nothing and whose gradient is not finite was skipped, as under a loss scale: the
        moments hold none of it.
        """
        kept = self._kept
        if not kept:
            return None, ""
        if any(k.parameter.grad is None for k in kept):
            self._kept = []
            return (
                None,
                (
                    "gradients were freed before the first update was over, so that its direction "
                    "is not known"
                ),
            )
        visible = [k for k in kept if rate_of.get(id(k.parameter), 0.0) >= VISIBLE_RATE]
        stood = not any(bool((k.parameter.detach().float() != k.before).any()) for k in visible)
        if finite := self._finite():
            self._waited += 1
            for k in kept:
                k.slopes.add_(k.slope())
        if stood:
            for k in kept:
                k.before.copy_(k.parameter.detach())
            return None, ""
        self._kept = []
        last = _cosine(visible, [k.slope() for k in visible], 1, rate_of) if finite else None
        both = (
            _cosine(visible, [k.slopes for k in visible], self._waited, rate_of) if finite else None
        )
        if last is None or both is None:
            return (
                None,
                (
                    "the gradients of the first update that changed anything are zero or not "
                    "finite, so that its direction is not known"
                ),
            )
        return min(last, both), ""

    def _finite(self) -> bool:
        """Whether all gradients are finite, also those of tensors that are not copied."""
        held = [
            p.grad.detach() for p in self._parameters if p.grad is not None and not p.grad.is_sparse
        ]
        return bool(gathered([g.isfinite().all() for g in held], torch.int64).all())

    def judge(
        self, step: int, optimizer: torch.optim.Optimizer, rates: tuple[float, ...]
    ) -> WeightsUpdated:
        """The event of the update that ended `step`; `rates` are those it used, by group of the
        optimizer.
        """
        before, self._sums = self._sums, checksums(self._parameters)
        changed = (self._sums != before).tolist()
        ever = (self._sums != self._first).tolist()
        frozen = [
            not p.requires_grad and was for p, was in zip(self._parameters, self._frozen_at_first)
        ]
        visible = {
            id(p)
            for g, rate in zip(optimizer.param_groups, rates)
            if rate >= VISIBLE_RATE
            for p in g["params"]
        }
        owned = [i for i, p in enumerate(self._parameters) if p.requires_grad and id(p) in visible]
        for i in owned:
            judged = self._parameters[i].ndim >= 2 and "expert" not in self._names[i]
            self._still[i] = 0 if changed[i] or not judged else self._still[i] + 1
        stillest = max(range(len(self._still)), key=self._still.__getitem__)
        uphill, unknown = self._uphill(
            {id(p): rate for g, rate in zip(optimizer.param_groups, rates) for p in g["params"]}
        )
        return WeightsUpdated(
            step=step,
            lr=rates[0] if rates else 0.0,
            frozen_changed=tuple(n for n, f, e in zip(self._names, frozen, ever) if f and e),
            longest_still=self._still[stillest],
            stillest=self._names[stillest],
            moved_frac=sum(changed[i] for i in owned) / max(1, len(owned)),
            uphill=uphill,
            unknown=unknown,
        )

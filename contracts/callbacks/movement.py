"""Which tensors an update changed, to the bit, whether the first such update goes against the
gradient, and what changed between updates.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.between_updates import BetweenUpdates
from stackproof.contracts.callbacks.rounding import LostUpdates
from stackproof.contracts.checksums import checksums, gathered
from stackproof.contracts.events import WeightsUpdated

VISIBLE_RATE = 1e-7
SLOPE_ENTRIES = 1_000_000  # of weights, copied once
FREED = "gradients were freed before the first update was over"
NOT_FINITE = "the gradients of the first update that changed anything are zero or not finite"
UNKNOWN = ", so that its direction is not known"


class MovementTracker:
    """Keeps a checksum of every parameter, and the number of updates since each has changed or had
    a gradient other than zero.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._names, self._parameters = map(list, zip(*model.named_parameters()))
        self._frozen_at_first = [not p.requires_grad for p in self._parameters]
        self._first = self._sums = checksums(self._parameters)
        self._still = [0] * len(self._parameters)
        self._direction: FirstUpdate | None = None
        self._counters: dict[int, float] = {}
        self.optimizer = optimizer
        self.lost = LostUpdates(optimizer)
        self.state = BetweenUpdates(model, optimizer)

    def settle(self) -> None:
        """Accept the weights as they are, as after loading a checkpoint."""
        self._sums = checksums(self._parameters)
        self.state.settle(self._sums)
        if self._direction:
            self._direction.kept = []

    def prepare(self) -> None:
        """Called when the gradients of an update are known; before the first, copies weights for
        its direction.
        """
        if self._direction is None:
            self._direction = FirstUpdate(self.optimizer, self._parameters)

    def begin(self) -> None:
        """Called right before each update."""
        self._counters = self._counts()
        self.lost.begin()

    def judge(
        self, step: int, rates: tuple[float, ...], norms: Tensor | None = None
    ) -> WeightsUpdated:
        """The event of the update that ended `step`; `rates` are those it used, by group of the
        optimizer, `norms` (P,) those of the gradients that it used, None where they are not known.
        """
        before, self._sums = self._sums, checksums(self._parameters)
        changed, ever = (self._sums != before).tolist(), (self._sums != self._first).tolist()
        self.state.settle(self._sums, updated=True)
        groups = zip(self.optimizer.param_groups, rates)
        rate_of = {id(p): rate for g, rate in groups for p in g["params"]}
        owned = [
            i
            for i, p in enumerate(self._parameters)
            if p.requires_grad and rate_of.get(id(p), 0.0) >= VISIBLE_RATE
        ]
        # Decay alone changes a tensor that the loss does not reach.
        reached = [True] * len(changed) if norms is None else (norms != 0).tolist()
        for i in owned:
            judged = self._parameters[i].ndim >= 2 and "expert" not in self._names[i]
            learns = changed[i] and reached[i]
            self._still[i] = 0 if learns or not judged else self._still[i] + 1
        parameters = zip(self._names, self._parameters, self._frozen_at_first, ever)
        stillest = max(range(len(self._still)), key=self._still.__getitem__)
        uphill, unknown = self._direction.judge(rate_of)
        return WeightsUpdated(
            step=step,
            lr=rates[0] if rates else 0.0,
            frozen_changed=tuple(
                n
                for (n, p, was, has), moved in zip(parameters, changed)
                if not p.requires_grad and (moved or (was and has))
            ),
            longest_still=self._still[stillest],
            stillest=self._names[stillest],
            moved_frac=sum(changed[i] for i in owned) / max(1, len(owned)),
            uphill=uphill,
            unknown=unknown,
            miscounted=self._miscounted(norms),
            lost_frac=self.lost.judge(),
        )

    def _counts(self) -> dict[int, float]:
        """The number of updates that the optimizer has counted for each parameter, by its place,
        where it counts.
        """
        states = ((i, self.optimizer.state.get(p, {})) for i, p in enumerate(self._parameters))
        found = {i: s["step"] for i, s in states if "step" in s}
        tensors = [torch.as_tensor(n).detach().reshape(()) for n in found.values()]
        return dict(zip(found, gathered(tensors).tolist())) if tensors else {}

    def _miscounted(self, norms: Tensor | None) -> tuple[str, ...]:
        """The parameters for which the optimizer did not count one update. None where a gradient is
        not finite, as an optimizer may skip those.
        """
        before, now = self._counters, self._counts()
        if norms is None or not bool(norms.isfinite().all()):
            return ()
        held = [i for i in before.keys() & now.keys() if self._parameters[i].grad is not None]
        return tuple(self._names[i] for i in sorted(held) if now[i] - before[i] != 1)


# --- the direction of the first update ------------------------------------------------------------


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

    def changed(self) -> bool:
        return bool((self.parameter.detach().float() != self.before).any())


class FirstUpdate:
    """Copies of whole tensors, up to SLOPE_ENTRIES, if the optimizer has taken no step yet."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]):
        self.parameters, self.kept = parameters, []
        self.waited = 0  # updates whose gradients are in the sums
        left = SLOPE_ENTRIES
        groups = [] if optimizer.state else optimizer.param_groups
        for group in sorted(groups, key=lambda g: g["lr"] < VISIBLE_RATE):
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse and p.numel() <= left:
                    left -= p.numel()
                    now = p.detach().float()
                    self.kept.append(_Kept(p, group, now.clone(), torch.zeros_like(now)))

    def judge(self, rate_of: dict[int, float]) -> tuple[float | None, str]:
        """(cosine of update and gradient at the first update that changes anything, else None;
        the reason why it cannot be known, or an empty string).

        A fresh optimizer steps against its gradient, whatever its rule: plain, scaled by entry, by
        sign, or orthogonalized. After updates at rate 0 its moments may hold their gradients too;
        so an update climbs only if it goes along both the last gradient and the sum. An update that
        changes nothing and whose gradient is not finite was skipped, as under a loss scale: the
        moments hold none of it.
        """
        if not (kept := self.kept):
            return None, ""
        if any(k.parameter.grad is None for k in kept):
            self.kept = []
            return None, FREED + UNKNOWN
        if finite := self._finite():
            self.waited += 1
            for k in kept:
                k.slopes.add_(k.slope())
        visible = [k for k in kept if rate_of.get(id(k.parameter), 0.0) >= VISIBLE_RATE]
        if not any(k.changed() for k in visible):
            for k in kept:
                k.before.copy_(k.parameter.detach())
            return None, ""
        self.kept = []
        if finite:
            last = _cosine(visible, [k.slope() for k in visible], 1, rate_of)
            both = _cosine(visible, [k.slopes for k in visible], self.waited, rate_of)
            if last is not None and both is not None:
                return min(last, both), ""
        return None, NOT_FINITE + UNKNOWN

    def _finite(self) -> bool:
        """Whether all gradients are finite, also those of tensors that are not copied."""
        held = [p.grad for p in self.parameters if p.grad is not None and not p.grad.is_sparse]
        return bool(gathered([g.detach().isfinite().all() for g in held]).all())


def _cosine(
    kept: list[_Kept], slopes: list[Tensor], n_decays: int, rate_of: dict[int, float]
) -> float | None:
    """Cosine of the step and a slope that holds coupled decay `n_decays` times, over all tensors;
    decay of either kind is removed.

    None if it is not defined: the slope is zero, or something is not finite.
    """
    along, along_coupled, moved, steep = 0.0, 0.0, 0.0, 0.0
    for k, slope in zip(kept, slopes):
        slope, then = slope.flatten(), k.before.flatten()
        step = (k.parameter.detach().float() - k.before).flatten()
        pairs = ((step, slope), (then, slope), (step, then), (step, step), (slope, slope))
        products = torch.stack([torch.dot(a, b) for a, b in pairs]).tolist()
        descent, pull, shrink, moved_k, steep_k = products
        decay = float(k.group.get("weight_decay") or 0.0)
        along = along + descent + rate_of[id(k.parameter)] * decay * pull
        along_coupled = along_coupled + descent + n_decays * decay * shrink
        moved, steep = moved + moved_k, steep + steep_k
    scale = (moved * steep) ** 0.5
    if not (scale > 0 and all(map(math.isfinite, (along, along_coupled, scale)))):
        return None
    return max(-1.0, min(along, along_coupled) / scale)

"""The gradients of one step, from its first backward pass to its update, as events."""

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.events import GradientsAccumulated

# Backward passes without an update, from which on an event is made at each power of two.
WAITING = 32


class GradientReader:
    """Norms of all gradients around each backward pass and before the update.

    They stay on the device; `pending` and `accumulated` are two halves of one read.
    """

    def __init__(self, model: nn.Module, settings: TrainerSettings):
        self.settings = settings
        self._parameters = list(model.parameters())
        self._most_passes = 0
        self._used: Tensor | None = None
        self.in_backward = False
        self.reset()

    def reset(self) -> None:
        """A new step begins."""
        self.passes = 0
        self._stale: Tensor | None = None
        self._lost: Tensor | int = 0
        self._norms_after: Tensor | None = None

    def begin_pass(self, step: int) -> GradientsAccumulated | None:
        """A backward pass begins. Returns an event where many passes have had no update."""
        self.in_backward = True
        norms = self._norms()
        if self.passes == 0:
            self._stale = norms
        elif self._norms_after is not None:
            self._lost = self._lost + (norms.nan_to_num() != self._norms_after.nan_to_num()).any()
        self.passes += 1
        if self.passes <= WAITING or self.passes & (self.passes - 1):
            return None
        return GradientsAccumulated(step, self.passes, 0.0, 0, 0.0, self._most_passes)

    def end_pass(self) -> None:
        """A backward pass is over."""
        self.in_backward = False
        self._norms_after = self._norms()

    def pending(self) -> list[Tensor]:
        """Float64 vectors on the device, for `accumulated`, just before the update."""
        lost = torch.as_tensor(self._lost).double().reshape(1)
        return [self._norms_after, self._norms(), self._stale, lost]

    def accumulated(
        self, step: int, after: Tensor, used: Tensor, stale: Tensor, lost: Tensor
    ) -> GradientsAccumulated:
        """The event of an update, from the fetched values of `pending`."""
        self._used = used
        usual, self._most_passes = self._most_passes, max(self._most_passes, self.passes)
        spread = 0.0 if self.settings.clips_values else _factor_spread(after, used)
        return GradientsAccumulated(
            step, self.passes, float(stale.norm()), int(lost), spread, usual
        )

    def reused(self, step: int) -> GradientsAccumulated | None:
        """The event of an update without a backward pass whose gradients are those of the update
        before it; None for others, as of another objective.
        """
        now = self._norms().cpu()
        if self._used is None or not bool(now.any()) or not torch.equal(now, self._used.cpu()):
            return None
        return GradientsAccumulated(step, 0, float(now.norm()), 0, 0.0, self._most_passes)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """(P,) float64: the norm of each parameter's gradient, 0 without a gradient; on the device
        of the first parameter.
        """
        home = self._parameters[0].device
        held = [(i, p.grad) for i, p in enumerate(self._parameters) if p.grad is not None]
        norms = torch.zeros(len(self._parameters), dtype=torch.float64, device=home)
        if held:
            places, gradients = zip(*held)
            found = torch._foreach_norm([g.detach() for g in gradients], 2, dtype=torch.float32)
            norms[list(places)] = torch.stack([n.to(home) for n in found]).double()
        return norms


def _factor_spread(after: Tensor, used: Tensor) -> float:
    """How unequally tensors were scaled between the last backward pass and the update (0-1)."""
    seen = after > 1e-6 * after.norm()
    if not bool(seen.any()):
        return 0.0
    factors = used[seen] / after[seen]
    largest = float(factors.max())
    return float((factors.max() - factors.min()) / factors.max()) if largest > 0 else 1.0

"""Updates that are lost in the rounding of weights, as in half precision."""

import torch
from torch import Tensor

ENTRIES = 2**16  # of one tensor at each update
NEAR_PEAK = 0.5  # of the peak rate; smaller ones are those of a warm-up, or of an end


class LostUpdates:
    """Counts the entries of one trained matrix, another at each update, that an update leaves as
    they are although they have a gradient. Matrices in half precision come first.

    Only for optimizers of torch: others may keep what is lost, or round at random.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self._turn = optimizer, 0
        self.judges = type(optimizer).__module__.startswith("torch.optim")
        self._kept: tuple[Tensor, Tensor] | None = None

    def begin(self) -> None:
        """Keep the entries before an update."""
        self._kept = None
        if not self.judges or not (held := self._held()):
            return
        p = held[self._turn % len(held)]
        self._turn += 1
        entries = p.detach().reshape(-1)[:ENTRIES]
        self._kept = (p, entries.clone())

    def judge(self) -> float | None:
        """The share (0-1) of entries with a gradient that the update has not changed; None where
        nothing was kept.
        """
        kept, self._kept = self._kept, None
        if kept is None or kept[0].grad is None or kept[0].grad.is_sparse:
            return None
        p, before = kept
        learns = p.grad.detach().reshape(-1)[:ENTRIES] != 0
        still = (p.detach().reshape(-1)[:ENTRIES] == before) & learns
        n_still, n = torch.stack([still.sum(), learns.sum()]).tolist()
        return n_still / n if n else None

    def _held(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        near = (g for g in groups if g["lr"] >= NEAR_PEAK * g.get("initial_lr", g["lr"]) > 0)
        held = [p for g in near for p in g["params"] if p.ndim >= 2 and p.requires_grad]
        return [p for p in held if p.element_size() < 4] or held

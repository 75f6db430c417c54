"""The learning rates of each update, as events."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.events import RatesUsed


class RateReader:
    """The rates that an optimizer uses, and those that its scheduler declares. `used` are the
    rates of the update that comes next or was just made, by group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, settings: TrainerSettings):
        self.optimizer, self.scheduler, self.settings = optimizer, scheduler, settings
        self.used: tuple[float, ...] = ()
        self._first_tick = self._tick = self._ticks()

    def read(self) -> None:
        """Read the rates just before an update."""
        self.used = tuple(float(g["lr"]) for g in self.optimizer.param_groups)
        self._tick = self._ticks()

    def event(self, step: int, updates: int) -> RatesUsed | None:
        """The event of update number `updates` of the observed run; None without a scheduler."""
        if self.scheduler is None or not self.used:
            return None
        ticks = self._tick - self._first_tick
        declared = _by_group(self._declared(step))
        return RatesUsed(step, _by_group(self.used), declared, ticks, updates - 1)

    def _declared(self, step: int) -> list[float]:
        scheduler = self.scheduler
        if isinstance(scheduler, LambdaLR):
            at = step - 1 if self.settings.ticks_per_update else self._tick
            rules = zip(scheduler.base_lrs, scheduler.lr_lambdas)
            return [float(base * rule(at)) for base, rule in rules]
        if hasattr(scheduler, "get_last_lr"):
            return [float(lr) for lr in scheduler.get_last_lr()]
        return []

    def _ticks(self) -> int:
        return getattr(self.scheduler, "last_epoch", 0)


def _by_group(rates: Sequence[float]) -> dict[str, float]:
    return {f"group {i}": rate for i, rate in enumerate(rates)}

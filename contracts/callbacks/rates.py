"""The learning rates of each update, as events."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

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
        self._first_epoch: int | None = None

    def read(self) -> None:
        """Read the rates just before an update."""
        self.used = tuple(float(g["lr"]) for g in self.optimizer.param_groups)
        self._tick = self._ticks()

    def event(self, step: int, updates: int, epoch: int | None = None) -> RatesUsed | None:
        """The event of update number `updates` of the observed run, in an epoch if it is stated;
        None without a scheduler.
        """
        if self.scheduler is None or not self.used:
            return None
        ticks = self._tick - self._first_tick
        return RatesUsed(
            step,
            _by_group(self.used),
            _by_group(self._declared(step)),
            ticks,
            updates - 1,
            epochs=self._epochs(epoch),
            **self._ends(),
        )

    def _epochs(self, epoch: int | None) -> int:
        """Epochs since the first update; 0 for a schedule that ticks by a measurement."""
        self._first_epoch = epoch if self._first_epoch is None else self._first_epoch
        waits = isinstance(self.scheduler, ReduceLROnPlateau)
        return 0 if epoch is None or waits else epoch - self._first_epoch

    def _ends(self) -> dict[str, int]:
        settings = self.settings
        if settings.accumulates < 2 or not settings.ticks_per_update:
            return {}
        n = settings.updates * settings.accumulates
        return {"horizon": horizon_of(self.scheduler), "micro_batches": n}

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


def horizon_of(scheduler: Any) -> int:
    """The number of ticks after which a schedule ends, 0 where it does not state one."""
    found = [getattr(scheduler, name, 0) for name in ("T_max", "total_steps")]
    for rule in getattr(scheduler, "lr_lambdas", ()):
        found.append(getattr(rule, "keywords", {}).get("num_training_steps", 0))
    return max((n for n in found if isinstance(n, int)), default=0)


def _by_group(rates: Sequence[float]) -> dict[str, float]:
    return {f"group {i}": rate for i, rate in enumerate(rates)}

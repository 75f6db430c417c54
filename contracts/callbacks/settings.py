"""Settings of another trainer that its model and optimizer do not show."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainerSettings:
    """What an adapter tells about its trainer.

    `max_grad_norm` is None where unknown and infinity where nothing is clipped. `ticks_per_update`:
    the schedule ticks once per update; otherwise it may tick more rarely. `loss_scale()` is the
    factor of a loss scaler. `absolute`: the weight of a token can be compared with 1/N, as in one
    process. `warmup_steps` are those of the learning rate.
    """

    pad_id: int | None = None
    eos_id: int | None = None
    smoothing: float = 0.0
    max_grad_norm: float | None = None
    clips_values: bool = False
    ticks_per_update: bool = False
    loss_scale: Callable[[], float] = lambda: 1.0
    absolute: bool = True
    warmup_steps: int = 12

"""Learning rate as a pure function of the step number; there is no scheduler object to step, save or forget."""

import math

from contracts.conditions import ensure, require
from stack.config import AdamW, Cosine


@require(lambda step: step >= 1, "steps count from 1")
@ensure(lambda result, peak: 0 <= result <= peak, "the learning rate stays between zero and its peak")
def cosine_lr(step: int, *, peak: float, schedule: Cosine, max_steps: int) -> float:
    """Learning rate of update `step` (1 … max_steps): linear to the peak at `warmup_steps`, half cosine to the end."""
    if step <= schedule.warmup_steps:
        return peak * (step / schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / (max_steps - schedule.warmup_steps))
    final = peak * schedule.final_lr_frac
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_at(step: int, optim: AdamW, schedule: Cosine, max_steps: int) -> float:
    """Learning rate of update `step` under the run's configuration."""
    return cosine_lr(step, peak=optim.lr, schedule=schedule, max_steps=max_steps)

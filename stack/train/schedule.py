"""Learning rate as a pure function of the step number; there is no scheduler object to step,
save or forget.
"""

import math
from typing import assert_never

from stackproof.config import Cosine, Schedule, Wsd
from stackproof.contracts.conditions import ensure, require


@require(lambda step: step >= 1, "steps count from 1")
@ensure(
    lambda result, peak: 0 <= result <= peak, "the learning rate stays between zero and its peak"
)
def lr_at(step: int, *, peak: float, schedule: Schedule, max_steps: int) -> float:
    """Learning rate of update `step` (1 … max_steps): the declared decay,
    times a linear warm-up to `warmup_steps`.
    """
    return decayed(step, peak=peak, schedule=schedule, max_steps=max_steps) * warmup_factor(
        step, schedule
    )


def warmup_factor(step: int, schedule: Schedule) -> float:
    """min(1, step / warmup_steps)."""
    return min(1.0, step / schedule.warmup_steps)


def decayed(step: int, *, peak: float, schedule: Schedule, max_steps: int) -> float:
    """The learning rate without its warm-up: the peak until the decay begins,
    `final_lr_frac` of it at the last step.
    """
    begins = decay_begins(schedule, max_steps)
    if step <= begins:
        return peak
    final = peak * schedule.final_lr_frac
    done = min(1.0, (step - begins) / (max_steps - begins))
    return min(peak, final + (peak - final) * remaining(done, schedule))


def decay_begins(schedule: Schedule, max_steps: int) -> int:
    """The step up to which the rate does not decay."""
    match schedule:
        case Cosine():
            return 0 if schedule.decay_from == "start" else schedule.warmup_steps
        case Wsd():
            return schedule.decay_begins(max_steps)
    assert_never(schedule)


def remaining(done: float, schedule: Schedule) -> float:
    """Share of the fall from peak to final rate that is still to come (1-0),
    when `done` (0-1) of the decay is over.
    """
    match schedule:
        case Cosine():
            return 0.5 * (1 + math.cos(math.pi * done))
        case Wsd():
            return 1 - (done if schedule.decay_shape == "linear" else math.sqrt(done))
    assert_never(schedule)

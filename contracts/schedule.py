"""The gate of the schedule: the learning rates the optimizer really used equal the
closed form at every update.
"""

import math
from collections.abc import Mapping
from typing import Any

from stackproof.contracts.events import Event, Started, StepTaken
from stackproof.contracts.gate import Verdict, decide, decides, failed


def closed_form(step: int, *, peak: float, schedule: Mapping[str, Any], max_steps: int) -> float:
    """Written independently of the stack, for both kinds of schedule.

    cosine: peak·min(1, s/W)·(f + (1 − f)·(1 + cos πx)/2), x from 0 at step W, or at step 0 where
    the decay is declared to start there. wsd: peak·min(1, s/W)·(f + (1 − f)·r), r = 1 − x or 1 −
    √x, x from 0 to 1 over the last `decay_frac` of all steps, a whole number.
    """
    warmup, floor = schedule["warmup_steps"], schedule["final_lr_frac"]
    match schedule["kind"]:
        case "cosine":
            first = {"peak": warmup, "start": 0}[schedule["decay_from"]]
            left = (1 + math.cos(math.pi * _share(step, first, max_steps))) / 2
        case "wsd":
            x = _share(
                step, max_steps - max(1, round(schedule["decay_frac"] * max_steps)), max_steps
            )
            left = {"linear": 1 - x, "1-sqrt": 1 - x**0.5}[schedule["decay_shape"]]
        case other:
            raise ValueError(f"no closed form for a schedule of kind {other}")
    return peak * min(step, warmup) / warmup * (floor + (1 - floor) * left)


def _share(step: int, first: int, last: int) -> float:
    """How much of the way from `first` to `last` is done, 0-1."""
    return min(1.0, max(0.0, (step - first) / (last - first)))


@decides("schedule.trace")
class ScheduleTrace:
    """One tick per optimizer update, the declared rate and that of every parameter group equal to
    the closed form of what was declared.
    """

    events = (Started, StepTaken)

    def __init__(self, limits):
        self.limits, self.plan, self.last_step = limits, None, None

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.plan, self.last_step = event.plan, event.step
            return None
        if self.plan is None:
            return failed("the run never declared its schedule")
        if event.step != self.last_step + 1:
            return failed(f"update {event.step} follows update {self.last_step}", step=event.step)
        self.last_step = event.step
        peaks = {"all": self.plan["peak_lr"], **self.plan["peak_lrs"]}
        used = {"all": event.lr, **event.group_lrs}
        if odd := sorted(peaks.keys() ^ used.keys()):
            return failed(
                f"step {event.step}: groups with a declared rate and groups with a rate differ: "
                f"{', '.join(odd)}",
                odd=len(odd),
            )
        declared = {
            g: closed_form(
                event.step,
                peak=peak,
                schedule=self.plan["schedule"],
                max_steps=self.plan["max_steps"],
            )
            for g, peak in peaks.items()
        }
        error = {g: abs(used[g] - declared[g]) / peaks[g] for g in peaks}
        worst = max(error, key=lambda g: math.inf if math.isnan(error[g]) else error[g])
        return decide(
            error[worst] <= self.limits.rel_error_max,
            f"step {event.step}: learning rate of {worst} {used[worst]:.6g}, declared "
            f"{declared[worst]:.6g}",
            rel_error=error[worst],
            lr=event.lr,
            declared_lr=declared["all"],
            groups=len(event.group_lrs),
        )

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None

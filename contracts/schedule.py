"""The gate of the schedule: the learning rate the optimizer really used equals the closed form at every update."""

import math

from contracts.events import Event, Started, StepTaken
from contracts.gate import Verdict, decide, decides, failed


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, max_steps: int, final_frac: float) -> float:
    """Closed form, written independently of the stack: linear to the peak at `warmup_steps`, half cosine to `final_frac`·peak."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    angle = math.pi * (step - warmup_steps) / (max_steps - warmup_steps)
    return peak * (final_frac + (1 - final_frac) * (1 + math.cos(angle)) / 2)


@decides("schedule.trace")
class ScheduleTrace:
    """One tick per optimizer update, each equal to the closed form of what was declared."""

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
        expected = warmup_cosine(
            event.step,
            peak=self.plan["peak_lr"],
            warmup_steps=self.plan["warmup_steps"],
            max_steps=self.plan["max_steps"],
            final_frac=self.plan["final_lr_frac"],
        )
        error = abs(event.lr - expected) / self.plan["peak_lr"]
        return decide(
            error <= self.limits.rel_error_max,
            f"step {event.step}: learning rate {event.lr:.6g}, declared {expected:.6g}",
            rel_error=error,
            lr=event.lr,
            declared_lr=expected,
        )

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None

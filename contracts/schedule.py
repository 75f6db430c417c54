"""The gate of the learning-rate schedule: every update uses the rate that is declared for it."""

import math
from collections.abc import Mapping
from typing import Any

from stackproof.contracts.events import Event, RatesUsed, Started
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide_all, decides, failed, not_run


def closed_form(step: int, *, peak: float, schedule: Mapping[str, Any], max_steps: int) -> float:
    """Learning rate of a step, computed independently of `stack/train/schedule.py`.

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
    """Share (0-1) of the way from `first` to `last` that is done at `step`."""
    return min(1.0, max(0.0, (step - first) / (last - first)))


@decides("schedule.rate")
class Rate(RuntimeCheck):
    """Each update uses the declared rate in every parameter group, one tick per update.

    The declared rate is the closed form of the declared schedule, with errors in units of the
    group's peak; in a trainer that declares none, it is that of its own scheduler, with relative
    errors.
    """

    events = (Started, RatesUsed)
    kept = ("zeros",)

    def __init__(self, limits):
        super().__init__(limits)
        self.plan, self.last_step, self.zeros = None, 0, 0

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.plan, self.last_step = event.plan, event.step
            return None
        if self.plan is None:
            return failed("the run did not declare its schedule")
        declared = event.declared
        if "schedule" in self.plan:
            if event.step != self.last_step + 1:
                return failed(
                    f"update {event.step} follows update {self.last_step}", step=event.step
                )
            self.last_step = event.step
            peaks = {"all": self.plan["peak_lr"], **self.plan["peak_lrs"]}
            declared = {g: self._rate(event.step, peak) for g, peak in peaks.items()}
            if odd := sorted(peaks.keys() ^ event.used.keys()):
                return failed(
                    f"step {event.step}: groups with a declared rate and groups with a rate "
                    f"differ: {', '.join(odd)}",
                    odd=len(odd),
                )
            error = {g: abs(event.used[g] - declared[g]) / peaks[g] for g in peaks}
        else:
            error = {g: _rel_error(event.used[g], rate) for g, rate in declared.items()}
        verdict = self._judged(event, declared, error)
        if verdict.passed and not declared:
            return not_run(f"step {event.step}: neither the run nor its scheduler declares a rate")
        return verdict

    def _judged(
        self, event: RatesUsed, declared: Mapping[str, float], error: Mapping[str, float]
    ) -> Verdict:
        worst = max(error, key=lambda g: math.inf if math.isnan(error[g]) else error[g], default="")
        rel_error = error.get(worst, 0.0)
        self.zeros = self.zeros + 1 if min(event.used.values()) == 0 else 0
        first = next(iter(event.used))
        return decide_all(
            [
                not rel_error <= self.limits.rel_error_max
                and (
                    f"the learning rate of {worst} is {event.used.get(worst, 0.0):.6g}, declared "
                    f"is {declared.get(worst, 0.0):.6g}"
                ),
                event.ticks - event.updates > self.limits.ticks_ahead_max
                and f"the schedule has ticked {event.ticks} times in {event.updates} updates",
                event.epochs > self.limits.epochs_without_tick_max
                and not event.ticks
                and f"the schedule has not ticked in {event.epochs} epoch(s)",
                bool(event.micro_batches)
                and abs(event.horizon / event.micro_batches - 1) < self.limits.micro_batches_off_min
                and (
                    f"the schedule ends after {event.horizon} ticks, which is the number of the "
                    "run's micro-batches and not that of its updates"
                ),
                self.zeros > self.limits.zero_updates_max
                and f"a learning rate is 0 at {self.zeros} updates in a row",
            ],
            f"step {event.step}: ",
            **({"rel_error": rel_error} if error else {}),
            ticks=event.ticks,
            updates=event.updates,
            zero_updates=self.zeros,
            lr=event.used[first],
            groups=len(event.used),
            **({"declared_lr": declared[first]} if first in declared else {}),
        )

    def _rate(self, step: int, peak: float) -> float:
        return closed_form(
            step, peak=peak, schedule=self.plan["schedule"], max_steps=self.plan["max_steps"]
        )


def _rel_error(used: float, declared: float) -> float:
    return abs(used - declared) / max(abs(declared), abs(used)) if used != declared else 0.0

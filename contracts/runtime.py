"""Gates of every step: its numbers are finite and plausible, modes and intervals are as declared,
and the seed decides.
"""

import math
from collections import deque
from statistics import median
from types import SimpleNamespace
from typing import Any

from stackproof.contracts.events import (
    BatchDrawn,
    Evaluated,
    Event,
    Finished,
    ModuleModes,
    Recomputed,
    Sampled,
    Saved,
    Started,
    StepTaken,
)
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    failed,
    passed,
)
from stackproof.contracts.subject import Subject, TraineeOptions, Training

FIRST_DRAWS = 8


@decides("runtime.finite")
class Finite(RuntimeCheck):
    """Loss and gradient norm are finite at every step, before any masking."""

    events = (StepTaken,)

    def observe(self, event: Event) -> Verdict:
        ok = (
            math.isfinite(event.loss_nats)
            and math.isfinite(event.grad_norm)
            and event.overflow_retries <= self.limits.overflow_retries_max
        )
        # As text, since JSON has no NaN.
        return decide(
            ok,
            f"step {event.step}: loss {event.loss_nats}, gradient norm {event.grad_norm}, "
            f"{event.overflow_retries} overflow(s)",
            loss_nats=str(event.loss_nats),
            grad_norm=str(event.grad_norm),
            overflow_retries=event.overflow_retries,
        )


@decides("runtime.mode")
class Mode(RuntimeCheck):
    """Training steps run in training mode, also after an evaluation, a sample or a save; held-out
    batches are scored in evaluation mode, with the same logits each time.
    """

    events = (ModuleModes,)
    kept = ("trained",)

    def __init__(self, limits):
        super().__init__(limits)
        self.trained = False

    def missing(self) -> str:
        return "" if self.trained else "the mode of a training step"

    def observe(self, event: ModuleModes) -> Verdict:
        self.trained = self.trained or event.phase == "training"
        n, repeat = len(event.wrong), event.repeat_abs or 0.0
        first = (event.wrong[0] or "the model") if n else ""
        return decide_all(
            [
                n > self.limits.wrong_modules_max
                and f"{n} module(s) not in {event.phase} mode, first {first}",
                event.draws_repeated
                and "the pass begins with the random state of an earlier one: dropout repeats its "
                "masks",
                repeat > self.limits.repeat_abs_max
                and f"two evaluations of one batch give logits {repeat:.3g} apart",
            ],
            f"step {event.step}, {event.phase}: ",
            phase=event.phase,
            wrong_modules=n,
            **({} if event.repeat_abs is None else {"repeat_abs": repeat}),
        )


@decides("runtime.seed")
def seed(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The seed decides every use of chance: the same seed begins the same run, another seed another
    run.

    The order of a corpus of fewer than `windows_min` windows is not judged.
    """
    first, again, other = (_beginning(subject.training, offset) for offset in (0, 0, 1))
    unlike = [name for name in first if first[name] != again[name]]
    alike = [
        n
        for n in first
        if first[n] == other[n]
        and (n != "order" or subject.data_loader.n_rows >= limits.windows_min)
    ]
    text = (
        f"two runs of one seed begin with other {', '.join(unlike)}"
        if unlike
        else f"the seed does not reach {', '.join(alike)}"
    )
    return decide(
        not unlike and not alike and len(first) >= limits.uses_min,
        text,
        unlike=len(unlike),
        alike=len(alike),
        uses=len(first),
    )


def _beginning(training: Training, seed_offset: int) -> dict[str, Any]:
    """What a run begins with under its seed plus an offset: its weights, the numbers of its first
    rows, the seed of its dropout masks, and torch's random state.
    """
    trainee = training.trainee(TraineeOptions(seed_offset=seed_offset))
    state = trainee.digest()
    batches = [batch for _ in range(FIRST_DRAWS) for batch in trainee.draw()]
    return {
        "weights": {name: part for name, part in state.items() if name.startswith("weights.")},
        "order": [number for batch in batches for number in batch.sample_ids],
        "masks": state["dropout"],
        "random state": state["rng.cpu"],
    }


@decides("runtime.loss-not-constant")
class LossNotConstant(RuntimeCheck):
    """The loss is measured. The same float several steps in a row is a placeholder, and so is a
    loss of 1 with a gradient norm of 1.
    """

    events = (StepTaken,)
    kept = ("last", "repeats")

    def __init__(self, limits):
        super().__init__(limits)
        self.last, self.repeats = None, 1

    def observe(self, event: Event) -> Verdict:
        self.repeats = self.repeats + 1 if event.loss_nats == self.last else 1
        self.last = event.loss_nats
        if not math.isfinite(event.loss_nats + event.grad_norm):
            # runtime.finite judges numbers that are not finite
            return passed("", equal_steps=self.repeats)
        off_one = max(abs(event.loss_nats - 1), abs(event.grad_norm - 1))
        return decide(
            self.repeats <= self.limits.equal_steps_max and off_one > self.limits.off_one_min,
            f"step {event.step}: the loss is {event.loss_nats!r} for the {self.repeats}th step in "
            f"a row, at a gradient norm of {event.grad_norm!r}",
            equal_steps=self.repeats,
            off_one=off_one,
        )


@decides("runtime.step-time")
class StepTime(RuntimeCheck):
    """A step takes the time its arithmetic needs: it is not faster than the machine can compute,
    nor far below the median step.

    A step far below the median is red only near the peak rate, since a machine that was busy and is
    free again is faster, too. Where no rate is known (`flops` of 0, as in a log), the median
    decides alone.
    """

    events = (StepTaken,)
    WINDOW = 32

    def __init__(self, limits):
        super().__init__(limits)
        self.recent = deque(maxlen=self.WINDOW)

    def observe(self, event: Event) -> Verdict:
        rate = event.flops / event.peak_flops if event.flops else 0.0
        achieved_frac = rate / event.wall_s if event.wall_s > 0 else math.inf
        typical = median(self.recent) if len(self.recent) >= 8 else event.wall_s
        self.recent.append(event.wall_s)
        over_median = event.wall_s / typical if typical else 0.0
        fast = achieved_frac > self.limits.sudden_peak_frac_max or not event.flops
        sudden = over_median < self.limits.median_frac_min and fast
        ok = achieved_frac <= self.limits.peak_frac_max and not sudden
        return decide(
            ok,
            f"step {event.step}: {event.wall_s * 1e3:.3g} ms would be {achieved_frac:.2g} of the "
            f"machine's peak rate, {over_median:.2g} of the median step",
            peak_frac=achieved_frac,
            median_frac=over_median,
        )


@decides("runtime.loss-spike")
class LossSpike(RuntimeCheck):
    """The loss stays near its recent past, and below that of guessing.

    Red if the loss is more than `robust_z_max` scaled median deviations and `jump_nats_min` above
    the recent median for `steps_in_a_row` steps, or if it is more than `over_random_nats_max` above
    random guessing after the warm-up.
    """

    events = (Started, StepTaken)
    WINDOW, WARM = 48, 12
    kept = ("recent", "high")

    def __init__(self, limits):
        super().__init__(limits)
        self.recent, self.high, self.plan = deque(maxlen=self.WINDOW), 0, {}

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.plan = event.plan
            return None
        if len(self.recent) < self.WARM:
            self.recent.append(event.loss_nats)
            return passed("", robust_z=0.0, jump_nats=0.0)
        middle = median(self.recent)
        spread = max(1.4826 * median(abs(x - middle) for x in self.recent), 1e-3)
        jump, z = event.loss_nats - middle, (event.loss_nats - middle) / spread
        spiked = z > self.limits.robust_z_max and jump > self.limits.jump_nats_min
        self.high = self.high + 1 if spiked else 0
        if not spiked:
            self.recent.append(event.loss_nats)
        excess = (
            event.loss_nats - self.plan["random_loss_nats"]
            if event.step > self.plan["warmup_steps"]
            else 0.0
        )
        ok = self.high < self.limits.steps_in_a_row and excess <= self.limits.over_random_nats_max
        return decide(
            ok,
            f"step {event.step}: loss {event.loss_nats:.4g} is {jump:.3g} nats above its recent "
            f"median for {self.high} step(s)",
            robust_z=z,
            jump_nats=jump,
            steps_high=self.high,
        )


@decides("runtime.cadence")
class Cadence(RuntimeCheck):
    """Monitors are declared to run often enough, and run as often as declared.

    `Started.plan["intervals"]` holds, by event name, the steps between two events and the
    configuration key that sets them. They are judged before step 1. Afterwards every event judges
    how long ago each of the others last came.
    """

    events = (Started, BatchDrawn, StepTaken, Recomputed, Evaluated, Sampled, Saved, Finished)
    EVERY_STEP = {"BatchDrawn": (1, "every step"), "StepTaken": (1, "every step")}
    MONITORS = {
        "Evaluated": "evaluated_gap_steps_max",
        "Sampled": "sampled_gap_steps_max",
        "Saved": "saved_gap_steps_max",
        "Recomputed": "recomputed_gap_steps_max",
    }

    kept = ("last", "every")

    def __init__(self, limits):
        super().__init__(limits)
        self.intervals: dict[str, tuple[int, str]] = {}
        self.last: dict[str, int] = {}
        self.every: dict[str, int] = {}

    def observe(self, event: Event) -> Verdict:
        if isinstance(event, Started):
            self._begin(event)
            return self._declared()
        if isinstance(event, Finished):
            return self._ended(event)
        self.last[type(event).__name__] = event.step
        gaps = {name: event.step - self.last.get(name, event.step) for name in self.intervals}
        late = max(gaps, key=lambda name: gaps[name] - self.intervals[name][0])
        every, key = self.intervals[late]
        return decide(
            gaps[late] <= every,
            f"step {event.step}: no {late} for {gaps[late]} steps, declared is one in {every} "
            f"({key})",
            gap_steps=gaps[late],
            declared_steps=every,
            monitor=late,
        )

    def _begin(self, event: Started) -> None:
        """Set the steps of the last events. Those of a resumed run are kept, but for saves and for
        an interval that was changed, which count from here.
        """
        self.intervals = {
            **self.EVERY_STEP,
            **{name: tuple(v) for name, v in event.plan["intervals"].items()},
        }
        for name, (every, _) in self.intervals.items():
            goes_on = self.every.get(name) == every and name != "Saved"
            self.last[name] = (
                max(self.last.get(name, 0), event.step - every) if goes_on else event.step
            )
        self.every = {name: every for name, (every, _) in self.intervals.items()}

    def _ended(self, event: Finished) -> Verdict:
        """Every run evaluates and samples at its end, also if it is shorter than its intervals."""
        unseen = sorted(
            name for name in ("Evaluated", "Sampled") if self.last.get(name) != event.step
        )
        return decide(
            not unseen,
            f"the run ended at step {event.step} without {', '.join(unseen)} there",
            unseen=len(unseen),
        )

    def _declared(self) -> Verdict:
        """Every monitor has an interval, and none is longer than the spec allows."""
        if absent := sorted(self.MONITORS.keys() - self.intervals.keys()):
            return failed(
                f"the run declares no interval for {', '.join(absent)}", monitor=absent[0]
            )
        problems = {}
        for name, limit in self.MONITORS.items():
            every, key = self.intervals[name]
            allowed = int(getattr(self.limits, limit))
            if every > allowed:
                problems[name] = f"{key} is {every} steps and at most {allowed} are allowed"
        if problems:
            return failed(
                f"{'; '.join(problems.values())}: --set each lower", monitor=", ".join(problems)
            )
        return passed(
            "",
            gap_steps=0,
            declared_steps=max(every for every, _ in self.intervals.values()),
            monitor="all",
        )


@decides("runtime.trend")
class Trend(RuntimeCheck):
    """The mean loss stays near its minimum, and so does the mean gradient norm while the loss no
    longer falls.

    Both are exponential means over about `SPAN` steps, of the loss and of the logarithm of the
    norm, so that single steps do not count. A run that diverges slowly stays within any band around
    its recent past, but not near its minimum.
    """

    events = (Started, StepTaken)
    SPAN = 50
    kept = ("steps", "away", "loss", "log_norm", "least_loss", "least_log_norm")

    def __init__(self, limits):
        super().__init__(limits)
        self.steps, self.away, self.warmup_steps = 0, 0, 0
        self.loss, self.log_norm = None, None
        self.least_loss, self.least_log_norm = math.inf, math.inf

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.warmup_steps = event.plan["warmup_steps"]
            return None
        self.loss = self._mean(self.loss, event.loss_nats)
        self.log_norm = self._mean(self.log_norm, math.log(max(event.grad_norm, 1e-30)))
        self.steps += 1
        if min(self.steps, event.step - self.warmup_steps) < self.SPAN:
            return passed("", rise_nats=0.0, norm_ratio=1.0, steps_away=0)
        self.least_loss, self.least_log_norm = (
            min(self.least_loss, self.loss),
            min(self.least_log_norm, self.log_norm),
        )
        rise, ratio = (
            self.loss - self.least_loss,
            math.exp(min(self.log_norm - self.least_log_norm, 700.0)),
        )
        away = rise > self.limits.rise_nats_max or (
            ratio > self.limits.norm_ratio_max and rise > self.limits.stale_nats_min
        )
        self.away = self.away + 1 if away else 0
        return decide(
            self.away < self.limits.steps_in_a_row,
            f"step {event.step}: the mean loss is {rise:.3g} nats above its minimum and the mean "
            f"gradient norm {ratio:.3g} times its own, for {self.away} step(s)",
            rise_nats=rise,
            norm_ratio=ratio,
            steps_away=self.away,
        )

    def _mean(self, before: float | None, now: float) -> float:
        return now if before is None else before + (now - before) / self.SPAN

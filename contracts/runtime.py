"""Gates of every step: it did real, finite, bounded work, from the declared seed.
Most see plain numbers the loop already has.
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
from stackproof.contracts.gate import Stateless, Verdict, decide, decides, failed, passed
from stackproof.contracts.subject import Subject, TraineeOptions, Training

FIRST_DRAWS = 8


@decides("runtime.finite")
class Finite(Stateless):
    """Loss and gradient norm are finite at every step, before any masking."""

    events = (StepTaken,)

    def observe(self, event: Event) -> Verdict:
        ok = (
            math.isfinite(event.loss_nats)
            and math.isfinite(event.grad_norm)
            and event.overflow_retries <= self.limits.overflow_retries_max
        )
        return Verdict(
            "pass" if ok else "fail",
            ""
            if ok
            else (
                f"step {event.step}: loss {event.loss_nats}, gradient norm {event.grad_norm}, "
                f"{event.overflow_retries} overflow(s)"
            ),
            {
                "loss_nats": str(event.loss_nats),
                "grad_norm": str(event.grad_norm),
                "overflow_retries": event.overflow_retries,
            },
        )


@decides("runtime.mode")
class Mode(Stateless):
    """Training steps run in training mode, also after an evaluation, a sample or a save; held-out
    batches are scored in evaluation mode, with the same logits each time.
    """

    events = (ModuleModes,)

    def observe(self, event: ModuleModes) -> Verdict:
        n, repeat = len(event.wrong), event.repeat_abs or 0.0
        first = (event.wrong[0] or "the model") if n else ""
        problems = {
            f"{n} module(s) not in {event.phase} mode, first {first}": (
                n > self.limits.wrong_modules_max
            ),
            f"two evaluations of one batch give logits {repeat:.3g} apart": (
                repeat > self.limits.repeat_abs_max
            ),
        }
        wrong = [text for text, found in problems.items() if found]
        return decide(
            not wrong,
            f"step {event.step}, {event.phase}: {'; '.join(wrong)}",
            phase=event.phase,
            wrong_modules=n,
            repeat_abs=repeat,
        )


@decides("runtime.seed")
def seed(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """A run is what its seed makes of it: the same seed begins the same run, another one another,
    in every use of chance.

    The order of a corpus too small to be shuffled otherwise (`windows_min`) is not judged.
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
    rows, and the random state that dropout masks are drawn from.
    """
    trainee = training.trainee(TraineeOptions(seed_offset=seed_offset))
    state = trainee.digest()
    batches = [batch for _ in range(FIRST_DRAWS) for batch in trainee.draw()]
    return {
        "weights": {name: part for name, part in state.items() if name.startswith("weights.")},
        "order": [number for batch in batches for number in batch.sample_ids],
        "masks": state["rng.cpu"],
    }


@decides("runtime.loss-not-constant")
class LossNotConstant:
    """The same float loss several steps in a row is a placeholder, not a measurement; so is a loss
    of 1 with a gradient norm of 1.
    """

    events = (StepTaken,)

    def __init__(self, limits):
        self.limits, self.last, self.repeats = limits, None, 1

    def observe(self, event: Event) -> Verdict:
        self.repeats = self.repeats + 1 if event.loss_nats == self.last else 1
        self.last = event.loss_nats
        if not math.isfinite(event.loss_nats + event.grad_norm):
            # what is no number is the business of runtime.finite
            return passed("", equal_steps=self.repeats)
        off_one = max(abs(event.loss_nats - 1), abs(event.grad_norm - 1))
        return decide(
            self.repeats <= self.limits.equal_steps_max and off_one > self.limits.off_one_min,
            f"step {event.step}: the loss is {event.loss_nats!r} for the {self.repeats}th step in "
            f"a row, at a gradient norm of {event.grad_norm!r}",
            equal_steps=self.repeats,
            off_one=off_one,
        )

    def state_dict(self) -> dict:
        return {"last": self.last, "repeats": self.repeats}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.repeats = state["last"], state["repeats"]


@decides("runtime.step-time")
class StepTime:
    """A step takes the time its arithmetic needs: not faster than the machine can compute,
    nor far below its own median.

    Against the median alone a machine that was crowded and is free again would be accused; its
    steps stay well below its peak rate. Where no rate is known (`flops` of 0, as in a log), the
    median decides alone.
    """

    events = (StepTaken,)
    WINDOW = 32

    def __init__(self, limits):
        self.limits, self.recent = limits, deque(maxlen=self.WINDOW)

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

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None


@decides("runtime.loss-spike")
class LossSpike:
    """Loss and gradient norm stay within a robust band of their recent past.

    Red if a loss stands more than `robust_z_max` scaled median deviations and `jump_nats_min` above
    the recent median for `steps_in_a_row` steps, or if it is above random guessing by
    `over_random_nats` after the warm-up.
    """

    events = (Started, StepTaken)
    WINDOW, WARM = 48, 12

    def __init__(self, limits):
        self.limits, self.recent, self.high, self.plan = limits, deque(maxlen=self.WINDOW), 0, {}

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

    def state_dict(self) -> dict:
        return {"recent": list(self.recent), "high": self.high}

    def load_state_dict(self, state: dict) -> None:
        self.recent, self.high = deque(state["recent"], maxlen=self.WINDOW), state["high"]


@decides("runtime.cadence")
class Cadence:
    """Monitors are declared to look often enough, and look as often as they were declared to.

    `Started.plan["intervals"]` holds by event name the steps between two of them and the key that
    says so. They are judged before step 1; afterwards every event asks how long ago each of the
    others was last announced.
    """

    events = (Started, BatchDrawn, StepTaken, Recomputed, Evaluated, Sampled, Saved, Finished)
    EVERY_STEP = {"BatchDrawn": (1, "every step"), "StepTaken": (1, "every step")}
    MONITORS = {
        "Evaluated": "evaluated_gap_steps_max",
        "Sampled": "sampled_gap_steps_max",
        "Saved": "saved_gap_steps_max",
        "Recomputed": "recomputed_gap_steps_max",
    }

    def __init__(self, limits):
        self.limits, self.intervals = limits, {}
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
        """Clocks of a resumed run go on; one whose interval was changed meanwhile, and that of
        saves, starts where the run does.
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
        """A run whose interval is longer than it is looks once, at its end; so does every other."""
        unseen = sorted(
            name for name in ("Evaluated", "Sampled") if self.last.get(name) != event.step
        )
        return decide(
            not unseen,
            f"the run ended at step {event.step} without {', '.join(unseen)} there",
            unseen=len(unseen),
        )

    def _declared(self) -> Verdict:
        """No monitor is without an interval, and none is slower than the spec allows.
        The last step of a run is always looked at.
        """
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

    def state_dict(self) -> dict:
        return {"last": self.last, "every": self.every}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.every = dict(state["last"]), dict(state["every"])


@decides("runtime.trend")
class Trend:
    """The mean loss does not climb away from its minimum, nor the gradient norm from its own while
    the loss no longer falls.

    Both are exponential means over about `SPAN` steps, of the loss and of the logarithm of the
    norm, so that no single step shows. A run that diverges slowly stays inside every band drawn
    around its recent past; it cannot stay near its minimum.
    """

    events = (Started, StepTaken)
    SPAN = 50

    def __init__(self, limits):
        self.limits, self.steps, self.away, self.warmup_steps = limits, 0, 0, 0
        self.loss, self.log_norm, self.least_loss, self.least_log_norm = (
            None,
            None,
            math.inf,
            math.inf,
        )

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

    def state_dict(self) -> dict:
        means = {"loss": self.loss, "log_norm": self.log_norm}
        least = (
            {"least_loss": self.least_loss, "least_log_norm": self.least_log_norm}
            if math.isfinite(self.least_loss)
            else {}
        )
        return {"steps": self.steps, "away": self.away, **means, **least}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)

"""Gates of what a run reports about itself: how long its steps took, how many operations they are,
and that the machine repeats them.
"""

import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stackproof.contracts.events import (
    BatchDrawn,
    Evaluated,
    Event,
    Finished,
    MemorizationMeasured,
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
    decides,
    first_of,
    not_run,
    passed,
)
from stackproof.contracts.subject import MicroBatch, Subject


@decides("runtime.recomputed-step")
class RecomputedStep(RuntimeCheck):
    """A step that was computed twice from one state came to the same bits."""

    events = (Recomputed,)

    def observe(self, event: Event) -> Verdict:
        return decide(
            event.n_compared > 0 and len(event.differing) <= self.limits.differing_max,
            f"step {event.step}: of {event.n_compared} gradients {len(event.differing)} differ "
            f"between two computations ({first_of(event.differing)})",
            differing=len(event.differing),
            n_compared=event.n_compared,
        )


@decides("runtime.learned")
class Learned(RuntimeCheck):
    """A run that has ended has a lower loss than the one it began with,
    over the first and the last `SPAN` steps.
    """

    events = (Started, StepTaken, Finished)
    SPAN = 8
    kept = ("first", "last")

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.first, self.unseen = [], False
        self.last: deque[float] = deque(maxlen=self.SPAN)

    def observe(self, event: Event) -> Verdict | None:
        match event:
            case Started(step=step):
                self.unseen = step > 0 and not self.first
            case StepTaken(loss_nats=loss):
                self.last.append(loss)
                if len(self.first) < self.SPAN and not self.unseen:
                    self.first.append(loss)
            case Finished():
                return self._judge(event.step)
        return None

    def _judge(self, step: int) -> Verdict:
        if self.unseen or step < self.limits.steps_min:
            return not_run(
                "its beginning was not seen"
                if self.unseen
                else f"{step} steps are too few to have learned"
            )
        began, ended = sum(self.first) / len(self.first), sum(self.last) / len(self.last)
        return decide(
            began - ended >= self.limits.fall_nats_min,
            f"after {step} steps the loss is {ended:.4g} nats and began at {began:.4g}: nothing "
            "was learned",
            fall_nats=began - ended,
            loss_nats=ended,
        )


@decides("runtime.clock")
class Clock(RuntimeCheck):
    """The reported time of a step agrees with the time between events, on a clock of the gate's
    own.

    The time from the batch to the end of the step is less than that of the step; the time from the
    event before the batch is more. Both are judged by the best of the last `WINDOW` steps: other
    work on the machine delays many announcements and not all, a wrong clock is wrong at each step.
    """

    events = (
        Started,
        BatchDrawn,
        StepTaken,
        Recomputed,
        Evaluated,
        MemorizationMeasured,
        Sampled,
        Saved,
        Finished,
    )
    WINDOW = 16

    def __init__(self, limits: SimpleNamespace, now: Callable[[], float] = time.perf_counter):
        super().__init__(limits)
        self.now, self.before, self.drawn = now, None, None
        self.least: deque[float] = deque(maxlen=self.WINDOW)
        self.most: deque[float] = deque(maxlen=self.WINDOW)

    def observe(self, event: Event) -> Verdict | None:
        at = self.now()
        match event:
            case BatchDrawn():
                self.drawn = at
                return None
            case StepTaken() if self.drawn is not None and self.before is not None:
                self._learn(event.wall_s, at)
                self.before, self.drawn = at, None
                return self._judge(event.step)
        self.before = at
        return None

    def _learn(self, said_s: float, at: float) -> None:
        slack_s = self.limits.slack_s
        self.least.append((said_s + slack_s) / max(at - self.drawn, 1e-9))
        self.most.append((said_s - slack_s) / max(at - self.before, 1e-9))

    def _judge(self, step: int) -> Verdict:
        least, most = max(self.least), min(self.most)
        if len(self.least) < self.WINDOW // 2:
            return passed("", said_to_batch_frac=least, said_to_all_frac=most)
        return decide(
            least >= self.limits.said_to_batch_frac_min
            and most <= self.limits.said_to_all_frac_max,
            f"step {step}: steps are reported to take {least:.2g} of the time from their batch to "
            f"their end, {most:.2g} of all that passed",
            said_to_batch_frac=least,
            said_to_all_frac=most,
        )


@decides("runtime.flops")
def flops(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The operations that a run declares for its step, less those of attention,
    are those of its matrix products, counted.

    Attention is left out since kernels visit keys that are masked: a count of what a kernel does is
    not the number of operations that attention needs.
    """
    declared = subject.declared
    matrix_flops = declared.flops_per_step - declared.attention_flops_per_step
    counted, n_tokens = _counted_flops(subject)
    counted_per_step = counted / n_tokens * declared.tokens_per_step
    ratio = matrix_flops / counted_per_step
    return decide(
        limits.declared_over_counted_min <= ratio <= limits.declared_over_counted_max,
        f"a step is declared to have {matrix_flops:.4g} operations in matrix products, and "
        f"{counted_per_step:.4g} were counted",
        declared_over_counted=ratio,
    )


MAX_COUNTED_TOKENS = 128
MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


def _counted_flops(subject: Subject) -> tuple[int, int]:
    """(operations of the matrix products that torch runs in one forward and backward of a fresh
    model in evaluation mode, tokens): two rows, by torch's own kernels.
    """
    seq_len = min(subject.model.max_length, MAX_COUNTED_TOKENS // 2)
    draw = torch.Generator().manual_seed(71)
    ids = torch.randint(0, subject.model.vocab_size, (2, seq_len + 1), generator=draw)
    model = subject.model.fresh()
    trainee = subject.training.trainee_of(model, torch.optim.SGD(model.parameters(), lr=0.0))
    model.eval()
    with (
        subject.kernels.by_torch(),
        FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter,
    ):
        trainee.loss_sum(MicroBatch(ids[:, :-1], ids[:, 1:])).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in MATRIX_PRODUCTS), 2 * seq_len


def _added_product(
    total: Tensor, left: tuple[int, int], right: tuple[int, int], *rest: Any, **options: Any
) -> int:
    """Operations of `total += left @ right`, by shapes: two per multiply-add."""
    return 2 * left[0] * left[1] * right[1]


_IN_PLACE = {torch.ops.aten.addmm_: _added_product}

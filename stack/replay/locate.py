"""Replays a repro bundle and checks every operation: which one created the first NaN or infinity,
and at which step.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from stackproof.evidence import repro
from stackproof.replay.replay import replaying, take_replayed_step
from stackproof.spec.errors import GateFailed
from stackproof.trace.nonfinite import Report, watching
from stackproof.train.step import nonfinite_parts
from stackproof.train.trainer import Trainer


@dataclass(frozen=True)
class Located:
    """`step` is the first step with a non-finite loss, gradient or weight, and `report` its report;
    None if all are finite.

    `steps` are the replayed steps.
    """

    step: int | None
    report: Report | None
    steps: tuple[int, ...]
    operations: int
    seconds: float


def locate(
    folder: Path, *, device: str = "cpu", base: Path | None = None
) -> tuple[repro.Bundle, Located]:
    """Replay the steps of the bundle once, up to the first with a non-finite value.

    The model runs uncompiled, and on a CPU with torch's kernels, so faults of a compiler or of
    another kernel are not detected. An overflow that fp16 loss scaling handles does not count.
    Arguments and errors as in `stackproof.replay.replay.replaying`.
    """
    done: list[int] = []
    operations, seconds = 0, 0.0
    with replaying(folder, device=device, base=base) as (bundle, trainer):
        trainer.state = replace(trainer.state, features=trainer.state.model.hidden_states)
        for step in (s.step for s in bundle.steps):
            with watching(trainer.state.model) as seen, suppress(GateFailed):
                take_replayed_step(trainer, bundle)
            done.append(step)
            report = seen.report()
            operations, seconds = operations + report.operations, seconds + report.seconds
            if _bad(trainer):
                return bundle, Located(step, report, tuple(done), operations, seconds)
    return bundle, Located(None, None, tuple(done), operations, seconds)


def _bad(trainer: Trainer) -> bool:
    """Whether the weights, the gradients or the log line of the step have a NaN or an infinity."""
    line = trainer.report.log_line() if trainer.report else {}
    numbers = [v for v in line.values() if isinstance(v, float)]
    return any(nonfinite_parts(trainer.state.model).values()) or not all(
        map(math.isfinite, numbers)
    )

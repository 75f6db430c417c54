"""Replays a repro bundle with every operation watched: which operation made the first NaN or
infinity, and at which step.
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
    """`step` is the first after which a loss, gradient or weight is not finite,
    with the `report` of it; None without any.

    `steps` are those that were replayed, in one pass.
    """

    step: int | None
    report: Report | None
    steps: tuple[int, ...]
    operations: int
    seconds: float


def locate(
    folder: Path, *, device: str = "cpu", base: Path | None = None
) -> tuple[repro.Bundle, Located]:
    """Replay the bundle's steps, once, until one of them leaves a value that is not finite.

    The model runs uncompiled, and on a CPU with torch's kernels: faults of a compiler or of another
    kernel are not seen. An overflow that fp16 loss scaling handles does not count. Arguments and
    errors otherwise as in `stack.replay.replay.replaying`.
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
    """Whether the step left a NaN or an infinity in the weights,
    the gradients or the numbers of its log line.
    """
    line = trainer.report.log_line() if trainer.report else {}
    numbers = [v for v in line.values() if isinstance(v, float)]
    return any(nonfinite_parts(trainer.state.model).values()) or not all(
        map(math.isfinite, numbers)
    )

"""Replays a repro bundle with every operation watched: which one made the NaN or the infinity,
at which step.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from stackproof.evidence import repro
from stackproof.spec.errors import GateFailed
from stackproof.trace.nonfinite import Report, watching
from stackproof.train.replay import replaying, take_replayed_step
from stackproof.train.run import Run
from stackproof.train.step import nonfinite_parts


@dataclass(frozen=True)
class Located:
    """`step` is the first after which a loss, gradient or weight is not finite, and `report` what
    was seen in it; None if none is.

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
    """Go from the bundle's state through its steps, once, until one of them leaves
    something that is not finite.

    The model runs uncompiled, and on a CPU with torch's kernels: what a compiler or another kernel
    alone does is not seen. An overflow that the loss scale of float16 answers is none. Arguments
    and errors otherwise as in `stackproof.train.replay.replaying`.
    """
    done: list[int] = []
    operations, seconds = 0, 0.0
    with replaying(folder, device=device, base=base) as (bundle, run):
        run.state = replace(run.state, features=run.state.model.hidden_states)
        for step in (s.step for s in bundle.steps):
            with watching(run.state.model) as seen, suppress(GateFailed):
                take_replayed_step(run, bundle)
            done.append(step)
            report = seen.report()
            operations, seconds = operations + report.operations, seconds + report.seconds
            if _bad(run):
                return bundle, Located(step, report, tuple(done), operations, seconds)
    return bundle, Located(None, None, tuple(done), operations, seconds)


def _bad(run: Run) -> bool:
    """Whether the step has left a NaN or an infinity in the weights,
    the gradients or the numbers of its line.
    """
    numbers = [v for v in run.line.values() if isinstance(v, float)]
    return any(nonfinite_parts(run.state.model).values()) or not all(map(math.isfinite, numbers))

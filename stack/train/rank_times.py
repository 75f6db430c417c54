"""The ranks of a run, what their steps take, and what share of a step is communication."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from stackproof.distributed.communication import Communication, profiled
from stackproof.spec.rank_log import FILE, PEAK, over_ranks
from stackproof.train.device import peak_memory_bytes
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, RestartPoint, Trainer

PROFILED_SHARE_MAX = 0.01  # of the time of steps, that profiling takes
# Of the environment, what belongs to a rank. The rest is stated where it is not that of rank 0.
OF_A_RANK = ("cpu", "cpu_count", "threads", "device_name", "device_memory_bytes", "device_uuid")


class RankTimes(Callback):
    """Writes the mesh with its ranks, and profiles one step in about `parallel.compare_every`: in
    the middle between two comparisons, so that none is part of it, and so seldom that it takes
    little. A process that continues a run of several alone writes its mesh; in a run of one process
    it does nothing.
    """

    def __init__(self) -> None:
        self.walls_s: list[float] = []  # of the steps since the last line
        self.next_step = 0
        self.found: Communication | None = None
        self.reading_s = 0.0  # of starting and reading the profiler

    def on_train_start(self, trainer: Trainer, start: RestartPoint) -> None:
        ranks, several = trainer.state.ranks, trainer.state.ranks.sizes.world_size > 1
        if several:
            self.next_step = start.step + max(1, trainer.cfg.parallel.compare_every // 2)
            trainer.around_update = lambda: self._around(trainer)
        environments = ranks.gathered(own_facts(trainer))
        if ranks.is_main and (several or (trainer.output.dir.path / FILE).is_file()):
            facts = [facts_of(own, environments[0]) for own in environments]
            line = {"mesh": ranks.sizes.as_dict(), "ranks": facts}
            trainer.output.dir.log(FILE, event="mesh", step=start.step, **line)

    @contextmanager
    def _around(self, trainer: Trainer) -> Iterator[None]:
        """Profile the update if it is due. Starting and reading is not part of the step's time."""
        if trainer.state.step + 1 != self.next_step:
            yield
            return
        started = time.perf_counter()
        with profiled(trainer.state.device) as self.found:
            yield
        self.reading_s = time.perf_counter() - started - self.found.step_s
        trainer.timer.leave_out(self.reading_s)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        if not self.next_step:
            return
        report.communication, self.found = self.found, None
        if report.communication is None:
            self.walls_s.append(report.wall_s)
        else:
            self._log(trainer, report.step, report.communication)

    def on_train_end(self, trainer: Trainer, status: str) -> None:
        if self.walls_s:
            self._log(trainer, trainer.state.step, None)

    def _log(self, trainer: Trainer, step: int, own: Communication | None) -> None:
        """Write what all ranks have measured since the last line, and choose the next step."""
        wall_s = median(self.walls_s) if self.walls_s else own.step_s
        peak = peak_memory_bytes(trainer.state.device)
        found = trainer.state.ranks.gathered((wall_s, own, self.reading_s, peak))
        walls, profiles, reading, peaks = zip(*found)
        figures = {"step_s": over_ranks(walls)}
        if None not in peaks:
            figures[PEAK] = over_ranks(peaks)
        if own is not None:
            figures |= {
                name: over_ranks([getattr(profile, name) for profile in profiles])
                for name in ("own_s", "communication_frac", "exposed_frac")
            }
            every = trainer.cfg.parallel.compare_every
            # All ranks have the same numbers here, and so profile the same step.
            step_s = median(walls)
            slower_s = median(profile.step_s for profile in profiles) - step_s
            self.next_step = step + seldom_enough(every, max(reading) + max(0, slower_s), step_s)
        n_steps, self.walls_s = len(self.walls_s) + (own is not None), []
        if trainer.state.ranks.is_main:
            trainer.output.dir.log(FILE, event="times", step=step, n_steps=n_steps, **figures)


def seldom_enough(every: int, extra_s: float, step_s: float) -> int:
    """`every`, or the smallest multiple of it at which profiling takes at most PROFILED_SHARE_MAX
    of the time of steps.
    """
    return every * max(1, math.ceil(extra_s / (PROFILED_SHARE_MAX * step_s * every)))


def own_facts(trainer: Trainer) -> dict[str, Any]:
    """The environment of this rank, with its places in mesh and machines."""
    ranks = trainer.state.ranks
    return {
        **trainer.output.record.environment,
        "rank": ranks.rank,
        **ranks.sizes.place(ranks.rank),
        "node": int(os.environ.get("GROUP_RANK", "0")),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
    }


def facts_of(own: dict[str, Any], main: dict[str, Any]) -> dict[str, Any]:
    """What a line states of a rank: what belongs to it, and what differs from rank 0."""
    places = ("rank", "replicate", "shard", "tensor", "node", "local_rank", "device")
    kept = {name: own[name] for name in (*places, *OF_A_RANK) if name in own}
    return kept | {name: value for name, value in own.items() if value != main.get(name)}

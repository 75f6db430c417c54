"""Gates of a run on several ranks: that it is the run of one process, only divided."""

import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from stackproof.contracts.events import (
    EvaluationRepeated,
    Event,
    MasksCompared,
    RanksJoined,
    RankSpeeds,
    ReplicasCompared,
    RowsDealt,
    StateDivided,
    StepRepeated,
)
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    first_of,
    not_run,
    worst,
)


def compare_parts(found: Sequence[Mapping[str, Any]]) -> tuple[int, tuple[str, ...]]:
    """How many of the named parts of the ranks several of them hold, and the names of those that
    differ among them.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for own in found:
        for name, value in own.items():
            holders[name].append(repr(value))
    shared = {name: values for name, values in holders.items() if len(values) > 1}
    return len(shared), tuple(sorted(n for n, values in shared.items() if len(set(values)) > 1))


@decides("distributed.ranks")
class RanksAreAlike(RuntimeCheck):
    """All processes that were started are in one group, and compute the same run."""

    events = (RanksJoined,)

    def observe(self, event: Event) -> Verdict:
        lost = event.n_started - event.n_ranks
        n, names = len(event.differing), first_of(event.differing)
        return decide_all(
            (
                lost != 0
                and f"{event.n_started} processes were started, the group of this one "
                f"has {event.n_ranks}",
                n > self.limits.differing_max and f"not the same on all ranks: {names}",
                event.n_compared == 0 and "nothing was compared",
            ),
            n_ranks=event.n_ranks,
            lost_ranks=lost,
            differing=n,
            n_compared=event.n_compared,
        )


@decides("distributed.initial-state")
class InitialState(RuntimeCheck):
    """The parts of all ranks, assembled, are the model that the preflight gates have judged."""

    events = (StateDivided,)

    def observe(self, event: Event) -> Verdict:
        n = len(event.differing)
        return decide(
            event.n_compared > 0 and n <= self.limits.differing_max,
            f"of {event.n_compared} tensors {n} are not those of the whole model: "
            f"{first_of(event.differing)}",
            differing=n,
            n_compared=event.n_compared,
        )


@decides("distributed.rows")
class RowsOnce(RuntimeCheck):
    """Each row of a step is on exactly one data rank, with the tokens of its window."""

    events = (RowsDealt,)
    KINDS: ClassVar[dict[str, str]] = {
        "lost": "on no rank",
        "repeated": "on more than one rank, or not of this step",
        "foreign": "with other tokens than their window",
        "unequal": "ranks of a tensor group with other rows than its first",
    }

    def observe(self, event: Event) -> Verdict:
        counts = {name: getattr(event, f"n_{name}") for name in self.KINDS}
        return decide_all(
            [
                n > self.limits.wrong_rows_max and f"{n} {self.KINDS[name]}"
                for name, n in counts.items()
            ],
            f"step {event.step}, {event.n_rows} rows: ",
            wrong_rows=max(counts.values()),
            n_rows=event.n_rows,
            **counts,
        )


@decides("distributed.one-process-step")
class OneProcessStep(RuntimeCheck):
    """A step of all ranks has the loss, counts, gradients and update of one process. Green only if
    every step that was to be judged could be.
    """

    events = (StepRepeated,)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.unknown = ""

    def observe(self, event: Event) -> Verdict:
        if event.unknown:
            self.unknown = event.unknown
            return not_run(event.unknown)
        limits, errors = vars(self.limits), event.errors
        wrong = {name: pair for name, pair in event.counts.items() if len(set(pair)) > 1}
        allowed = {name: limits[f"{name}_rel_error_max"] for name in errors}
        verdict = decide_all(
            (
                *(
                    not errors[name] <= allowed[name]
                    and f"the {name} of {event.n_compared} tensors is off by {errors[name]:.2g}"
                    + (f", the most in {event.worst}" if name == "gradient" else "")
                    for name in errors
                ),
                *(
                    f"{name}: {all_ranks} on all ranks, {alone} in one process"
                    for name, (all_ranks, alone) in wrong.items()
                ),
                event.n_compared == 0 and "nothing was compared",
            ),
            f"step {event.step}: ",
            **{f"{name}_rel_error": worst([error]) for name, error in errors.items()},
            wrong_counts=len(wrong),
            n_compared=event.n_compared,
        )
        return not_run(self.unknown) if verdict.passed and self.unknown else verdict


@decides("distributed.replicas")
class ReplicasEqual(RuntimeCheck):
    """What more than one rank holds is equal on all of them."""

    events = (ReplicasCompared,)

    def observe(self, event: Event) -> Verdict:
        n = len(event.differing)
        return decide(
            event.n_compared > 0 and n <= self.limits.differing_max,
            f"step {event.step}: of {event.n_compared} parts that several ranks hold {n} differ "
            f"({first_of(event.differing)})",
            differing=n,
            n_compared=event.n_compared,
        )


@decides("distributed.evaluation")
class EvaluationOfOneProcess(RuntimeCheck):
    """An evaluation and a sample of all ranks are those of one process."""

    events = (EvaluationRepeated,)

    def observe(self, event: Event) -> Verdict:
        if event.unknown:
            return not_run(event.unknown)
        return decide_all(
            (
                not event.rel_error <= self.limits.rel_error_max
                and f"its loss is off by {event.rel_error:.2g} of that of one process",
                event.n_texts != 1 and f"the ranks have {event.n_texts} different texts",
            ),
            f"step {event.step}, {event.what}: ",
            rel_error=worst([event.rel_error]),
            n_texts=event.n_texts,
        )


@decides("distributed.dropout")
class MasksOfOneProcess(RuntimeCheck):
    """The dropout masks of all ranks are those of one process, and no two of them are equal."""

    events = (MasksCompared,)

    def observe(self, event: MasksCompared) -> Verdict:
        foreign, repeated = event.n_foreign, event.n_repeated
        allowed = self.limits.wrong_masks_max
        if event.n_telling == 0 and foreign <= allowed:
            return not_run("no mask has enough kept and dropped elements to be compared")
        return decide_all(
            (
                foreign > allowed and f"{foreign} are not those of one process",
                repeated > allowed
                and f"{repeated} equal that of another row, branch, position or step",
            ),
            f"step {event.step}, {event.n_masks} masks: ",
            wrong_masks=max(foreign, repeated),
            foreign=foreign,
            repeated=repeated,
            n_masks=event.n_masks,
        )


@decides("distributed.stragglers")
class Stragglers(RuntimeCheck):
    """No rank computes much slower than the others, which wait for it in every step. The best of a
    rank's last `LOOKS` measurements counts, since other work may disturb one of them.
    """

    events = (RankSpeeds,)
    LOOKS = 3
    kept = ("recent",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.recent: deque[tuple[float, ...]] = deque(maxlen=self.LOOKS)

    def observe(self, event: Event) -> Verdict:
        speeds = event.flops_per_s
        others = [speeds[:rank] + speeds[rank + 1 :] or speeds for rank in range(len(speeds))]
        self.recent.append(tuple(s / statistics.median(o) for s, o in zip(speeds, others)))
        # On another number of ranks the measurements of before do not compare.
        looks = [look for look in self.recent if len(look) == len(speeds)]
        best = [max(ratios) for ratios in zip(*looks)]
        slowest = min(range(len(best)), key=best.__getitem__)
        return decide(
            len(looks) < self.LOOKS or best[slowest] >= self.limits.speed_frac_min,
            f"step {event.step}: in {len(looks)} measurements rank {slowest} computed at most at "
            f"{best[slowest]:.0%} of the median speed of the others",
            speed_frac=best[slowest],
            slowest_rank=slowest,
        )

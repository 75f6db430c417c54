"""Draws mutants of the stack, tries each as a user would run it, and judges what its gates saw."""

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from stackproof.mutation.fruits import Reference, is_statement
from stackproof.mutation.sites import Mutant, Ran, Trace, draw, traced
from stackproof.mutation.trial import Ending, Scenario, Trial, in_child, perform, trials
from stackproof.spec.errors import IntegrityError

N_CLEAN = 3
TIMES_CLEAN = 6  # processor time of a trial, relative to that of a traced one without a mutant
NO_GATES: tuple[str, ...] = ()
OUTCOMES = (
    "caught",  # a gate halted the commands
    "warned",  # a gate was red and did not halt
    "survivor",  # nothing was red, and weights, losses, samples, scores, data or files differ
    "statement",  # the same, but only a record or a log of gates differs
    "refused",  # an error that names the user, the data or the machine
    "crashed",
    "hung",
    "equivalent",  # nothing differs
    "alarm",  # a gate was red, and without gates nothing differs
)


class Judged(NamedTuple):
    """A mutant and what became of it, in the scenario that shows most."""

    mutant: Mutant
    scenario: str
    outcome: str
    ending: Ending
    differing: tuple[str, ...]
    seconds: float

    def row(self) -> dict:
        """A line of mutants.jsonl."""
        own = {k: v for k, v in asdict(self.mutant).items() if k != "source"}
        ending = {k: v for k, v in asdict(self.ending).items() if v}
        return own | {
            "scenario": self.scenario,
            "outcome": self.outcome,
            "ending": ending,
            "differing": list(self.differing[:8]),
            "n_differing": len(self.differing),
            "seconds": round(self.seconds, 2),
        }


@dataclass
class Clean:
    """A scenario without a mutant: what ran, and what it brings forth with gates and without."""

    scenario: Scenario
    trace: Trace
    gated: Reference
    bare: Reference
    cpu_s: float


def survey(
    scenarios: Sequence[Scenario], root: Path, at_once: int, on_clean: Callable[[str], None]
) -> list[Clean]:
    """Run every scenario without a mutant: once traced, and some times with gates and without."""
    found = []
    for scenario in scenarios:
        trace, cpu_s = _traced(scenario, root / "traced" / scenario.name)
        jobs = [(scenario, None, only) for only in [None, NO_GATES] for _ in range(N_CLEAN)]
        done: dict[int, Trial] = dict(trials(jobs, root, cpu_s=10 * cpu_s, at_once=at_once))
        for trial in done.values():
            if trial.ending.kind != "completed" or trial.ending.warned:
                raise IntegrityError(
                    f"scenario {scenario.name} is not green without a mutant",
                    value=trial.ending,
                    next_step="stack gates prove shows gates that are not green",
                )
        gated, bare = ([done[i].fruits for i in range(n, n + N_CLEAN)] for n in (0, N_CLEAN))
        found.append(Clean(scenario, trace, Reference(gated), Reference(bare), cpu_s))
        on_clean(scenario.name)
    return found


def _traced(scenario: Scenario, folder: Path) -> tuple[Trace, float]:
    """The lines that a scenario runs, and the processor time that it took, s."""
    file = folder.with_suffix(".json")

    def work() -> None:
        with traced() as trace:
            perform(scenario, folder, None, None)
        ran = {t: {"lines": sorted(r.lines), "types": r.types} for t, r in trace.items()}
        file.write_text(json.dumps(ran))

    child = in_child(work, folder, cpu_s=3600)
    _, _, usage = os.wait4(child, 0)
    ran = json.loads(file.read_text())
    trace = {t: Ran(set(r["lines"]), r["types"]) for t, r in ran.items()}
    return trace, usage.ru_utime + usage.ru_stime


def mutate(clean: Sequence[Clean], root: Path, n: int, seed: int, at_once: int) -> Iterator[Judged]:
    """Draw `n` mutants among the lines that any scenario runs, and judge each in one of those that
    run its line; if it is equivalent there, in the others.
    """
    together: Trace = {}
    for one in clean:
        for target, ran in one.trace.items():
            together.setdefault(target, Ran()).merge(ran)
    draws = random.Random(seed + 1)
    places: list[tuple[Mutant, list[Clean]]] = []
    for mutant in draw(together, n, seed):
        running = [c for c in clean if _runs(c, mutant)]
        places.append((mutant, draws.sample(running, len(running))))
    # Rounds: in each every mutant that is still equivalent is tried in its next scenario.
    while places:
        jobs = [(own[0].scenario, mutant, None) for mutant, own in places]
        cpu_s = TIMES_CLEAN * max(own[0].cpu_s for _, own in places)
        further, alarms = [], []
        for number, trial in trials(jobs, root, cpu_s=cpu_s, at_once=at_once):
            mutant, (here, *others) = places[number]
            outcome, differing = _outcome(trial, here)
            if outcome == "equivalent" and others:
                further.append((mutant, others))
            elif outcome == "caught" and trial.ending.command in ("train", "resume"):
                alarms.append((mutant, here, trial))
            else:
                yield _judged(mutant, here, outcome, trial, differing)
        yield from _without_gates(alarms, root, cpu_s, at_once)
        places = further


def _without_gates(
    caught: list[tuple[Mutant, Clean, Trial]], root: Path, cpu_s: float, at_once: int
) -> Iterator[Judged]:
    """Mutants that a gate has halted, once more without gates: whether they change anything."""
    jobs = [(here.scenario, mutant, NO_GATES) for mutant, here, _ in caught]
    for number, bare in trials(jobs, root, cpu_s=cpu_s, at_once=at_once):
        mutant, here, trial = caught[number]
        differing = tuple(here.bare.differing(bare.fruits))
        outcome = "caught" if differing else "alarm"
        if bare.ending.kind in ("refused", "crashed", "hung"):  # it is loud without a gate
            outcome = bare.ending.kind
        yield _judged(mutant, here, outcome, trial, differing)


def _judged(
    mutant: Mutant, here: Clean, outcome: str, trial: Trial, differing: Sequence[str]
) -> Judged:
    name = here.scenario.name
    return Judged(mutant, name, outcome, trial.ending, tuple(differing), trial.seconds)


def _runs(clean: Clean, mutant: Mutant) -> bool:
    ran = clean.trace.get(mutant.target)
    return ran is not None and mutant.line in ran.lines


def _outcome(trial: Trial, clean: Clean) -> tuple[str, list[str]]:
    match trial.ending.kind:
        case "red":
            return "caught", []
        case "completed":
            differing = clean.gated.differing(trial.fruits)
            if trial.ending.warned:
                return "warned", differing
            if not differing:
                return "equivalent", []
            return "statement" if all(map(is_statement, differing)) else "survivor", differing
    return trial.ending.kind, []

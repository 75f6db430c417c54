"""Draws mutants of the stack, tries each as a user would run it, and judges what its gates saw."""

import importlib
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from stackproof.mutation.fruits import Reference, is_statement
from stackproof.mutation.sites import Mutant, Ran, Trace, draw
from stackproof.mutation.trial import Ending, Job, Limits, Scenario, Trial, concurrently
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import load_spec
from stackproof.spec.mutants import LOUD
from stackproof.spec.provenance import code_state
from stackproof.spec.records import Code

N_CLEAN = 3
UNLIMITED = Limits(3600.0, 7200.0)
# Of a trial, relative to the slowest clean one: a mutant may do more, and other processes may take
# the machine. What takes longer is hung.
TIMES_CPU, TIMES_WALL, LEAST_S = 6, 12, 30.0


class Judged(NamedTuple):
    """A mutant and what became of it.

    A mutant is tried in the scenarios that run its line, in random order. The first in which it is
    loud, or changes a result, decides: an error there is final, although the mutant may be silent
    in another. One that changes nothing, or only a statement, is tried in the next; `equivalent`
    holds for all of them, and where no result differs the first statement decides. `differing` are
    the places that differ with gates, or without them where a gate halted.
    """

    mutant: Mutant
    scenario: str
    outcome: str
    ending: Ending
    differing: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def effect(self) -> str:
        """What the mutant changes silently: `result`, `statement` (only records, logs and what is
        printed), or nothing.
        """
        if not self.differing:
            return ""
        return "statement" if all(map(is_statement, self.differing)) else "result"

    def row(self) -> dict:
        """A line of mutants.jsonl."""
        own = {k: v for k, v in asdict(self.mutant).items() if k != "source"}
        ending = {k: v for k, v in asdict(self.ending).items() if v and k != "cpu_s"}
        shown = sorted(self.differing, key=is_statement)[:8]
        return own | {
            "package": self.mutant.package,
            "scenario": self.scenario,
            "outcome": self.outcome,
            "effect": self.effect,
            "ending": ending,
            "differing": shown,
            "n_differing": len(self.differing),
            "seconds": round(self.seconds, 2),
        }


@dataclass
class Clean:
    """A scenario without a mutant: what ran, what it brings forth with gates and without, and what
    a trial of it may take.
    """

    scenario: Scenario
    trace: Trace
    gated: Reference
    bare: Reference
    limits: Limits

    def job(self, mutant: Mutant, *, gated: bool) -> Job:
        """The scenario on a mutant."""
        return Job(self.scenario, self.limits, mutant, gated)

    def runs(self, mutant: Mutant) -> bool:
        """Whether the scenario runs the line of a mutant."""
        ran = self.trace.get(mutant.target)
        return ran is not None and mutant.line in ran.lines


def survey(
    scenarios: Sequence[Scenario], root: Path, at_once: int, on_clean: Callable[[str], None]
) -> list[Clean]:
    """Run every scenario without a mutant: some times with gates, of these once traced, and some
    times without. Raises IntegrityError if one is not green or does not repeat its results.
    """
    _ = load_spec().sha256  # which every record states: computed once, and not in each process
    found = {}
    for clean in concurrently(map(_surveyed, scenarios), root, at_once):
        found[clean.scenario.name] = clean
        on_clean(clean.scenario.name)
    return [found[scenario.name] for scenario in scenarios]


def _surveyed(scenario: Scenario) -> Generator[Job, Trial, Clean]:
    done = []
    for gated in [True] * N_CLEAN + [False] * N_CLEAN:
        # Tracing slows a run, so that the places which depend on time are seen to differ.
        trial = yield Job(scenario, UNLIMITED, gated=gated, traces=not done)
        if trial.ending.kind != "completed" or trial.ending.warned:
            raise IntegrityError(
                f"scenario {scenario.name} is not green without a mutant",
                value=trial.ending,
                next_step="stack gates prove shows gates that are not green",
            )
        done.append(trial)
        _import(trial.modules)
    gated, bare = ([t.fruits for t in done[n : n + N_CLEAN]] for n in (0, N_CLEAN))
    limits = Limits(
        max(LEAST_S, TIMES_CPU * max(t.ending.cpu_s for t in done[1:])),
        max(LEAST_S, TIMES_WALL * max(t.seconds for t in done[1:])),
    )
    return Clean(scenario, done[0].trace, Reference(gated), Reference(bare), limits)


def _import(modules: Sequence[str]) -> None:
    """Import what a trial imports, so that those which are forked later need not."""
    for name in modules:
        with suppress(ImportError):  # some are made at run time
            importlib.import_module(name)


def mutate(clean: Sequence[Clean], root: Path, n: int, seed: int, at_once: int) -> Iterator[Judged]:
    """Draw `n` mutants among the lines that any scenario runs, and judge each. Raises
    IntegrityError as soon as the code of the checkout changes: mutants and records are of it.
    """
    before = code_state()
    together: Trace = {}
    for one in clean:
        for target, ran in one.trace.items():
            together.setdefault(target, Ran()).merge(ran)
    volatile = frozenset().union(*(r.volatile for c in clean for r in (c.gated, c.bare)))
    draws = random.Random(seed + 1)

    def tasks() -> Iterator[Generator[Job, Trial, Judged]]:
        for mutant in draw(together, n, seed):
            running = [c for c in clean if c.runs(mutant)]
            yield _judged(mutant, draws.sample(running, len(running)), volatile)

    for judged in concurrently(tasks(), root, at_once):
        _require_same(before)
        yield judged


def _require_same(before: Code) -> None:
    if (now := code_state()) != before:
        raise IntegrityError(
            "the code changed while mutants were tried, so that what differs is not theirs alone",
            value=f"commit {now.commit[:12]}, changes {now.diff_sha256}",
            allowed=f"commit {before.commit[:12]}, changes {before.diff_sha256}",
            next_step="repeat the draw in a checkout that is not edited, such as a git worktree",
        )


def _judged(
    mutant: Mutant, places: Sequence[Clean], volatile: frozenset[str]
) -> Generator[Job, Trial, Judged]:
    """Try a mutant without gates; where it is silent and changes something, with them."""
    stated: Judged | None = None
    for here in places:
        bare = yield here.job(mutant, gated=False)
        if bare.ending.kind in LOUD:
            if stated:
                continue
            return (yield from _loud(mutant, here, bare))
        differing = here.bare.differing(bare.fruits, volatile)
        if not differing or (stated and all(map(is_statement, differing))):
            continue
        found = yield from _gated(mutant, here, differing, volatile)
        if found and found.effect != "statement":
            return found
        stated = stated or found
    return stated or (yield from _unchanged(mutant, places[0], volatile))


def _loud(mutant: Mutant, here: Clean, bare: Trial) -> Generator[Job, Trial, Judged]:
    """A mutant that is loud where no gate is. With gates a user may see a red one instead of a
    refusal.
    """
    seen = bare
    if bare.ending.kind == "refused":
        gated = yield here.job(mutant, gated=True)
        seen = gated if gated.ending.kind == "red" else bare
    return Judged(mutant, here.scenario.name, bare.ending.kind, seen.ending, (), seen.seconds)


def _gated(
    mutant: Mutant, here: Clean, bare: Sequence[str], volatile: frozenset[str]
) -> Generator[Job, Trial, Judged | None]:
    """A mutant that changes the places `bare` where no gate is; None if it changes nothing with
    them. A difference in statements alone must be there a second time: they hold what is measured
    of the machine.
    """
    trial, name = (yield here.job(mutant, gated=True)), here.scenario.name
    match trial.ending:
        case Ending(kind="red"):
            return Judged(mutant, name, "caught", trial.ending, tuple(bare), trial.seconds)
        case Ending(kind="completed", warned=warned):
            seen = here.gated.differing(trial.fruits, volatile)
            if all(map(is_statement, seen)) and seen:
                again = yield here.job(mutant, gated=True)
                seen = sorted({*seen} & {*here.gated.differing(again.fruits, volatile)})
            silent = "statement" if all(map(is_statement, seen)) else "survivor"
            outcome = "warned" if warned else silent
            found = Judged(mutant, name, outcome, trial.ending, tuple(seen), trial.seconds)
            return found if seen else None
    return Judged(mutant, name, trial.ending.kind, trial.ending, (), trial.seconds)


def _unchanged(
    mutant: Mutant, here: Clean, volatile: frozenset[str]
) -> Generator[Job, Trial, Judged]:
    """A mutant that changes nothing without gates, once with them. A red one is an alarm: the
    mutant broke only what measures, or it would show in a configuration that is not here. What
    differs otherwise was written by code that gates call.
    """
    found = yield from _gated(mutant, here, (), volatile)
    if found is None:
        return Judged(mutant, here.scenario.name, "equivalent", Ending("completed"))
    return found._replace(outcome="alarm") if found.outcome in ("caught", "warned") else found

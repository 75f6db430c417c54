"""One trial: the commands of a user on the stack, with or without a mutant in it, in a process of
its own.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from stackproof.config import RunConfig
from stackproof.mutation.fruits import Fruits, fruits_of
from stackproof.mutation.sites import Mutant, in_place
from stackproof.spec.errors import GateFailed, StackproofError

MEMORY_BYTES = 8 * 2**30
ENDING, OUTPUT = "ending.json", "output.txt"
REFUSALS = (2, 3, 5, 6, 7)  # exit codes that name the user, the data or the machine


@dataclass(frozen=True)
class Ending:
    """How the commands of a trial ended. `red` is the gate that failed and `moment` when: before
    step 1, a step, at the end, or the command after training. `warned` are red gates that do not
    halt.
    """

    kind: str  # completed, red, refused, crashed, hung
    command: str = ""
    red: str = ""
    moment: str = ""
    warned: Sequence[str] = ()
    error: str = ""


# Performs a command in a folder, on a configuration, with these gates or all; returns the red gates
# that did not halt.
Command = Callable[[Path, RunConfig, Sequence[str] | None], list[str]]


@dataclass(frozen=True)
class Scenario:
    """Commands of a user on one configuration, by name, in order."""

    name: str
    cfg: RunConfig
    commands: Mapping[str, Command]


def in_child(work: Callable[[], None], folder: Path, cpu_s: float) -> int:
    """Run `work` in a forked process that has `folder` for its output, and at most `cpu_s` seconds
    of processor time. Returns its process id at once.
    """
    folder.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    try:
        output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        limit = int(cpu_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(0)  # whatever failed: what follows belongs to the parent


def perform(
    scenario: Scenario, folder: Path, mutant: Mutant | None, only: Sequence[str] | None
) -> None:
    """The commands of a scenario, one after the other, until one fails; leaves `ending.json`.
    `only` are the gates to install, None for all.
    """
    os.environ |= {"STACKPROOF_CACHE": str(folder / "cache"), "HOME": str(folder / "home")}
    command, warned = "", []
    try:
        with in_place(mutant) if mutant else nullcontext():
            for command in scenario.commands:
                warned += scenario.commands[command](folder, scenario.cfg, only)
        ending = Ending("completed", command, warned=warned)
    except BaseException as error:
        traceback.print_exc()
        ending = _ending_of(error, command, warned)
    (folder / ENDING).write_text(json.dumps(ending.__dict__))


def _ending_of(error: BaseException, command: str, warned: list[str]) -> Ending:
    match error:
        case GateFailed():
            return Ending(
                "red", command, error.gate_id, _moment(error, command), warned, str(error)
            )
        case StackproofError():
            kind = "refused" if error.exit_code in REFUSALS else "crashed"
            return Ending(kind, command, warned=warned, error=f"{type(error).__name__}: {error}")
    return Ending("crashed", command, warned=warned, error=f"{type(error).__name__}: {error}")


def _moment(error: GateFailed, command: str) -> str:
    """When a gate of a run turned red."""
    if command not in ("train", "resume"):
        return command
    record = error.record
    if record is None:
        return "before step 1"
    result = next((g for g in record.gates if g.id == error.gate_id), None)
    if result is None or result.verdict != "fail":
        return "at the end"
    step = result.first_failure_step
    return f"step {step}" if step else "before step 1"


@dataclass
class Trial:
    """The result of a trial: how it ended, and all that it wrote."""

    ending: Ending
    fruits: Fruits
    seconds: float


Job = tuple[Scenario, Mutant | None, Sequence[str] | None]


def trials(
    jobs: Iterator[Job] | Sequence[Job], root: Path, *, cpu_s: float, at_once: int
) -> Iterator[tuple[int, Trial]]:
    """Perform jobs, some at once, each in a fresh folder below `root` that is removed afterwards.
    Yields each with its number as it ends.
    """
    waiting, running = enumerate(jobs), {}
    more = True
    while more or running:
        while more and len(running) < at_once:
            try:
                number, (scenario, mutant, only) = next(waiting)
            except StopIteration:
                more = False
                break
            folder = root / "trials" / str(number)
            shutil.rmtree(folder, ignore_errors=True)

            def work(scenario=scenario, folder=folder, mutant=mutant, only=only) -> None:
                perform(scenario, folder, mutant, only)

            running[in_child(work, folder, cpu_s)] = number, folder, time.perf_counter()
        if running:
            child, _ = os.wait()
            if child in running:
                number, folder, began = running.pop(child)
                yield number, _trial(folder, time.perf_counter() - began)
                shutil.rmtree(folder, ignore_errors=True)


def _trial(folder: Path, seconds: float) -> Trial:
    try:
        ending = Ending(**json.loads((folder / ENDING).read_text()))
    except (OSError, ValueError):
        ending = Ending("hung", error=(folder / OUTPUT).read_text(errors="replace")[-300:])
    return Trial(ending, fruits_of(folder), seconds)

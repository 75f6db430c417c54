"""One trial: the commands of a user on the stack, with or without a mutant in it, in a process of
its own.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stackproof.contracts.keeper import Gatekeeper
from stackproof.distributed.parent import end_with_launcher
from stackproof.mutation.fruits import OUTPUT, Fruits, fruits_of
from stackproof.mutation.sites import Mutant, Ran, Trace, in_place, traced
from stackproof.spec.errors import GateFailed, StackproofError
from stackproof.spec.mutants import AT_END, BEFORE

MEMORY_BYTES, FILE_BYTES = 8 * 2**30, 2**30
ENDING, TRACE = "ending.json", "trace.json"
REFUSALS = (2, 3, 5, 6, 7)  # exit codes that name the user, the data or the machine
OUT_OF_TIME = (signal.SIGALRM, signal.SIGXCPU)

T = TypeVar("T")


@dataclass(frozen=True)
class Ending:
    """How the commands of a trial ended. `red` is the gate that failed and `moment` when: before
    step 1, a step, at the end, or the command after training. `warned` are red gates that do not
    halt. `cpu_s` is the processor time of all commands.
    """

    kind: str  # completed, red, refused, crashed, hung
    command: str = ""
    red: str = ""
    moment: str = ""
    warned: tuple[str, ...] = ()
    error: str = ""
    exit_code: int = 0
    cpu_s: float = 0.0


Command = Callable[[Path], object]  # performs a command in a folder


@dataclass(frozen=True)
class Scenario:
    """Commands of a user by name, in order; the first one trains."""

    name: str
    commands: Mapping[str, Command]


class Limits(NamedTuple):
    """What a trial may take, seconds."""

    cpu_s: float
    wall_s: float


class Job(NamedTuple):
    """A scenario to perform: on which mutant, with or without gates, and whether to trace lines."""

    scenario: Scenario
    limits: Limits
    mutant: Mutant | None = None
    gated: bool = True
    traces: bool = False


@dataclass
class Trial:
    """The result of a trial: how it ended, and, if it completed, all that it wrote. If it was
    traced, also the lines that ran and the modules that were imported.
    """

    ending: Ending
    seconds: float
    fruits: Fruits = field(default_factory=dict)
    trace: Trace = field(default_factory=dict)
    modules: Sequence[str] = ()


# --- in the child ---------------------------------------------------------------------------------


def _child(job: Job, folder: Path, parent: int) -> None:
    """Perform a job in a session of its own, with limits that no mutant lifts, and leave
    `ending.json`.
    """
    os.setsid()
    end_with_launcher(parent)
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(folder / OUTPUT, os.O_WRONLY)
    for target, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, target)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False, buffering=1) for n in (1, 2))  # noqa: SIM115
    cpu_s = int(job.limits.cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    for number in OUT_OF_TIME:
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, job.limits.wall_s)
    try:
        _perform(job, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what follows belongs to the parent


def _perform(job: Job, folder: Path) -> None:
    """The commands of a scenario, one after the other, until one fails."""
    os.environ |= {"STACKPROOF_CACHE": str(folder / "cache"), "HOME": str(folder / "home")}
    command = ""
    try:
        with ExitStack() as stack:
            if job.mutant:
                stack.enter_context(in_place(job.mutant))
            if not job.gated:
                stack.enter_context(without_gates())
            trace = stack.enter_context(traced()) if job.traces else {}
            for command, perform in job.scenario.commands.items():  # noqa: B007 of the error
                perform(folder)
        if job.traces:
            ran = {t: {"lines": sorted(r.lines), "types": r.types} for t, r in trace.items()}
            document = {"ran": ran, "modules": sorted(sys.modules)}
            (folder / TRACE).write_text(json.dumps(document))
        ending = {"kind": "completed", "command": command, "warned": _warned(folder)}
    except BaseException as error:
        traceback.print_exc()
        first = command == next(iter(job.scenario.commands))
        ending = {"command": command, **_ending_of(error, folder, command if not first else "")}
    ending["cpu_s"] = time.process_time()
    (folder / ENDING).write_text(json.dumps(ending))


@contextmanager
def without_gates() -> Iterator[None]:
    """No command installs a gate or requires a verdict, until the context ends."""
    init, unjudged = Gatekeeper.__init__, Gatekeeper.unjudged

    def bare(self: Gatekeeper, *args: Any, **options: Any) -> None:
        init(self, *args, **(options | {"only": ()}))

    Gatekeeper.__init__, Gatekeeper.unjudged = bare, lambda *_: None
    try:
        yield
    finally:
        Gatekeeper.__init__, Gatekeeper.unjudged = init, unjudged


def _warned(folder: Path) -> list[str]:
    """Gates that failed in the records of commands which they did not halt."""
    found = set()
    for path in folder.glob("*/metadata.json"):
        with suppress(ValueError, LookupError, TypeError):
            gates = json.loads(path.read_bytes())["gates"]
            found |= {g["id"] for g in gates if g["verdict"] == "fail"}
    return sorted(found)


def _ending_of(error: BaseException, folder: Path, after: str) -> dict[str, Any]:
    """How an error ends a trial. A red gate is one also where another error follows from it, such
    as that of a command which refuses to write what is red. `after` is the command if it is not the
    first.
    """
    text = f"{type(error).__name__}: {error}"
    for cause in _causes(error):
        if isinstance(cause, GateFailed):
            moment = after or _moment(folder, cause.gate_id)
            return {"kind": "red", "red": cause.gate_id, "moment": moment, "error": text}
    if isinstance(error, StackproofError):
        kind = "refused" if error.exit_code in REFUSALS else "crashed"
        return {"kind": kind, "error": text, "exit_code": error.exit_code}
    return {"kind": "crashed", "error": text, "exit_code": 1}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _moment(folder: Path, gate: str) -> str:
    """When a gate of a run was red first, as the logs hold it: the record may be missing."""
    for line in _lines(folder / "run/gates.jsonl"):
        if line["gate"] == gate and line["verdict"] == "fail":
            return f"step {line['step']}" if line["step"] else BEFORE
    return AT_END if _lines(folder / "run/metrics.jsonl") else BEFORE


def _lines(path: Path) -> list[dict]:
    """The lines of a log up to the first that is none: a mutant may have written it."""
    lines = []
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            lines.append(json.loads(line))
    return lines


# --- in the parent --------------------------------------------------------------------------------


class _Running(NamedTuple):
    """A process that performs a job of a task."""

    task: Generator[Job, Trial, Any]
    process: ForkProcess
    folder: Path
    began: float


def concurrently(
    tasks: Iterable[Generator[Job, Trial, T]], root: Path, at_once: int
) -> Iterator[T]:
    """Do tasks, some at once. A task yields one job after the other and gets the trial of each; its
    return value is yielded here as it ends. Every job is performed in a forked process, in a fresh
    folder below `root` that is removed afterwards. No process outlives this iterator.
    """
    waiting, running, number = iter(tasks), {}, 0
    ready: list[tuple[Generator[Job, Trial, T], Trial | None]] = []
    try:
        while True:
            while len(running) < at_once:
                if not ready and (task := next(waiting, None)) is not None:
                    ready.append((task, None))
                if not ready:
                    break
                task, trial = ready.pop()
                try:
                    job = task.send(trial)
                except StopIteration as done:
                    yield done.value
                    continue
                number += 1
                started = _start(task, job, root / "trials" / f"{number:06}")
                running[started.process.sentinel] = started
            if not running:
                return
            for sentinel in wait(list(running)):
                ended = running.pop(sentinel)
                ready.append((ended.task, _trial(ended)))
    finally:
        for left in running.values():
            _end(left)
            shutil.rmtree(left.folder, ignore_errors=True)


def _start(task: Generator[Job, Trial, Any], job: Job, folder: Path) -> _Running:
    folder.mkdir(parents=True)
    (folder / OUTPUT).touch()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_child, args=(job, folder, os.getpid()))
    process.start()
    return _Running(task, process, folder, time.perf_counter())


def _end(running: _Running) -> int:
    """End a process with all that it has started. Returns its exit code, -n for a signal n."""
    with suppress(ProcessLookupError):  # it may not have a group yet
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.kill()
    running.process.join()
    return running.process.exitcode


def _trial(ended: _Running) -> Trial:
    seconds, code = time.perf_counter() - ended.began, _end(ended)
    folder, trace, modules = ended.folder, {}, ()
    try:
        ending = Ending(**json.loads((folder / ENDING).read_text()))
    except (OSError, ValueError):
        kind = "hung" if -code in OUT_OF_TIME else "crashed"
        printed = (folder / OUTPUT).read_text(errors="replace")[-300:]
        ending = Ending(kind, error=f"the process ended with {code} (-n: by signal n); {printed}")
    if (folder / TRACE).is_file():
        document = json.loads((folder / TRACE).read_text())
        trace = {t: Ran(set(r["lines"]), r["types"]) for t, r in document["ran"].items()}
        modules = document["modules"]
    for own in (ENDING, TRACE):
        (folder / own).unlink(missing_ok=True)
    fruits = fruits_of(folder) if ending.kind == "completed" else {}
    shutil.rmtree(folder, ignore_errors=True)
    return Trial(ending, seconds, fruits, trace, modules)

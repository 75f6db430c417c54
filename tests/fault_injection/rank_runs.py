"""Runs on several ranks under the agent that `stack train --nproc` starts, with faults at chosen
calls of a rank.

The agent runs in this process, and forks the ranks from a process that has imported the libraries.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from stackproof.distributed import launch
from tests.fault_injection import file_calls
from tests.processes import NO_PREFLIGHT, STACK, Command, Done

HANDLER = "torch.distributed.elastic.multiprocessing.api.get_subprocess_handler"
ARM = "from tests.fault_injection import rank_runs\nrank_runs.arm()\n"
UNDER_FAULT, WITH_PREFLIGHT = ARM + NO_PREFLIGHT, ARM + STACK
# Operations between ranks, as the trainer and FSDP call them.
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_object", "broadcast_object_list",
    "all_gather_into_tensor", "reduce_scatter_tensor",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th call of rank `of` in one attempt of the agent: signals to ranks,
    or an error of the call, a key of file_calls.FAULTS.
    """

    of: int
    at: int
    kind: str  # an error, or the names of signals
    to: tuple[int, ...] = ()
    attempt: int = 0


@dataclass(frozen=True)
class Launched:
    """Exit code of the command, and what each rank of each attempt left."""

    code: int
    attempts: list[list[Done]]

    def calls(self, rank: int, attempt: int = 0) -> list[str]:
        """The calls that a rank made below its folder, and between ranks."""
        return file_calls.calls(self.attempts[attempt][rank])

    def told(self) -> str:
        """The ends of all ranks, for the message of an assert."""
        ends = [(a, r, d.code, "\n".join(x for x in d.err.splitlines() if not x.startswith(file_calls.COUNT))[-2500:]) for a, ds in enumerate(self.attempts)
                for r, d in enumerate(ds)]  # fmt: skip
        return "\n".join(map(str, (self.code, *ends)))


def launched(
    *arguments: str,
    folder: Path,
    faults: Sequence[Fault] = (),
    restarts: int = 0,
    n_ranks: int = 2,
    code: str = UNDER_FAULT,
) -> Launched:
    """`stack ARGUMENTS --nproc N --restarts K` in a folder, to its end."""
    attempts: list[list[Command]] = []

    class Rank:
        """What the agent uses of a process."""

        def __init__(self, command: Command):
            self.command, self.pid = command, command.process.pid

        def poll(self) -> int | None:
            return self.command.poll()

        def wait(self, timeout: float) -> int:
            self.command.process.join(timeout)
            if (ended := self.poll()) is None:
                raise subprocess.TimeoutExpired("rank", timeout)
            return ended

    class Forked(SubprocessHandler):
        def _popen(self, args: tuple, env: dict[str, str]) -> Rank:
            attempt, rank = int(env[launch.RESTARTS]), int(env["RANK"])
            if attempt == len(attempts):
                attempts.append([])
            mine = [f for f in faults if (f.of, f.attempt) == (rank, attempt)] or [None]
            env |= _environment(folder, attempt, mine[0])
            command = Command(*args[3:], folder=folder, environment=env, code=code)
            (folder / f"pid-{attempt}-{rank}.tmp").write_text(str(command.process.pid))
            (folder / f"pid-{attempt}-{rank}.tmp").rename(folder / f"pid-{attempt}-{rank}")
            attempts[attempt].append(command)
            return Rank(command)

        def close(self, death_sig: signal.Signals | None = None) -> None:
            os.kill(self.proc.pid, death_sig or signal.SIGTERM)

    with _own_settings(), mock.patch(HANDLER, lambda **given: Forked(**given)):
        ended = launch.launch(arguments, n_ranks, max_restarts=restarts)
    return Launched(ended, [[command.wait() for command in ranks] for ranks in attempts])


def _environment(folder: Path, attempt: int, fault: Fault | None) -> dict[str, str]:
    below = str(folder.resolve() / "run")
    kind, at, to = (fault.kind, fault.at, fault.to) if fault else ("", 0, ())
    pids = [str(folder / f"pid-{attempt}-{rank}") for rank in to]
    return {"FAULT": json.dumps([kind, at, below]), "FAULT_TO": json.dumps(pids)}


@contextmanager
def _own_settings():
    """Signals and variables as they were, after the agent has set its own."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    former = {number: signal.getsignal(number) for number in numbers}
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class RankFaults(file_calls.Faults):
    """Faults that may come to other ranks than the one whose calls are counted."""

    def strike(self, path: object) -> None:
        if self.fault in file_calls.FAULTS:
            return super().strike(path)
        for place in map(Path, json.loads(os.environ["FAULT_TO"])):
            while not place.exists():  # the agent starts one rank after the other
                time.sleep(0.01)
            for name in self.fault.split():
                os.kill(int(place.read_text()), signal.Signals[name])
        return None


def arm() -> None:
    """Begin to count in this rank, with the fault of its environment."""
    faults = file_calls.arm(RankFaults)
    for name in COLLECTIVES:
        setattr(dist, name, _counted(faults, name, getattr(dist, name)))


def _counted(faults: RankFaults, name: str, operation):
    def counted(*given, **options):
        faults.call(name, faults.below)
        return operation(*given, **options)

    return counted


def phases(calls: Sequence[str]) -> Mapping[str, range]:
    """Numbers of the calls of rank 0 in parts of a run."""
    raise NotImplementedError

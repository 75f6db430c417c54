"""Runs on several ranks under the agent that `stack train --nproc` starts, with faults at chosen
calls of a rank.

The agent runs in this process, and forks the ranks from a process that has imported the libraries.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from stackproof.distributed import launch, started
from stackproof.distributed.output import output_of
from stackproof.distributed.ranks import ProcessGroup
from stackproof.spec.errors import RankLost
from stackproof.train import loop
from tests.distributed.rows import logged, rows_of
from tests.fault_injection import file_calls
from tests.fault_injection.runs import assert_same_end, training
from tests.fault_injection.scale import SEED, STRESS
from tests.processes import NAN_AT_STEP_5, STACK, Command, Done, server

LEFT_OUT = "distributed.stragglers"  # other work on the machine can make a rank slow
# Further settings of the runs that are disturbed: each layout of checkpoints is one line.
LAYOUTS = {"sharded": ()}
if STRESS:
    LAYOUTS |= {
        "sharded, behind": ("checkpoint.async_save=true",),
        "single": ("checkpoint.layout=single",),
    }
# Preflight takes most of a run of seconds: these few gates suffice to end a run in it.
PREFLIGHT = ("corpus.filters", "data.order", "data.exhaustion", "loss.golden")
ARMED = f"""
from stackproof.spec.gates import load_spec
from stackproof.train import start
from tests.fault_injection import rank_runs
gates = [g for g in load_spec().gates.values() if g.id != rank_runs.LEFT_OUT]
kept = [g.id for g in gates if g.moment != "preflight" or g.id in rank_runs.PREFLIGHT]
keeper = start.Gatekeeper
start.Gatekeeper = lambda *given, only=None, **options: keeper(
    *given, only=kept if only is None else only, **options
)
rank_runs.arm()
{STACK}
"""
HALTED = NAN_AT_STEP_5 + ARMED
# Operations between ranks, and parts of a run.
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list")
EVALUATION = "dealt"
ROWS = "rows.jsonl"  # beside the run: the rows that its ranks draw
HANDLER = "get_subprocess_handler"  # of torch's agent
CLOSING_S = 30  # that torch's agent gives a rank to end, before it kills it


LAUNCHER = "launcher"  # stands for a rank where a signal goes to the launcher


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th call of rank `of` in the first attempt of the launcher: an error
    of the call, a key of file_calls.FAULTS, or signals to ranks.
    """

    of: int
    at: int
    kind: str  # an error, or the names of signals
    to: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Launched:
    """Exit code of the command in a folder, and what each rank of each attempt left."""

    code: int
    attempts: list[list[Done]]
    folder: Path

    def calls(self, rank: int) -> list[str]:
        """The calls that a rank of the last attempt made below its folder, and between ranks."""
        return json.loads((self.folder / f"calls-{len(self.attempts) - 1}-{rank}").read_text())

    @property
    def codes(self) -> list[list[int]]:
        """The exit codes of the ranks of each attempt."""
        return [[done.code for done in ranks] for ranks in self.attempts]

    def output(self, rank: int) -> str:
        """What a rank has printed in all attempts, on the terminal or into its file."""
        texts = [ranks[rank].err for ranks in self.attempts]
        kept = output_of(self.folder / "run", rank)
        return "".join([*texts, kept.read_text() if kept.is_file() else ""])

    def said(self) -> str:
        """The ends of all ranks, for the message of an assert."""
        ends = ["\n".join(self.output(rank).splitlines()[-30:]) for rank in (0, 1)]
        return "\n".join([f"{self.code} {self.codes}", *ends])


@dataclass(frozen=True)
class Undisturbed:
    """A run of two ranks that others compare with: its layout, its command, its folder, and what
    its ranks left.
    """

    layout: str
    command: list[str]
    folder: Path
    done: Launched

    def call(self, fault: Fault) -> str:
        """The fault and its call, for the message of an assert."""
        call = self.done.calls(fault.of)[fault.at - 1]
        return f"{fault} ({call}), {self.layout}, SEED={SEED}"

    def require_same(self, folder: Path, told: str, compare=assert_same_end) -> None:
        """The run of another folder has drawn the same rows and left the same files."""
        compare(self.folder / "run", folder / "run", told)
        assert rows_of(folder / ROWS) == rows_of(self.folder / ROWS), told

    def require_continued(self, folder: Path, told: str, compare=assert_same_end) -> None:
        """The run of another folder goes on to the same end."""
        begun = (folder / "run" / "run.json").is_file()
        command = ["train", "--resume", "run"] if begun else self.command
        done = launched(*command, folder=folder)
        assert done.code == 0, (told, done.said())
        self.require_same(folder, told, compare)


def arguments(text_file: Path, sets: Sequence[str] = ()) -> list[str]:
    """A run of nine steps on two ranks, with further settings."""
    changes = {"trace__every": "0", "parallel__compare_every": "3"}
    more = [part for value in sets for part in ("--set", value)]
    return [*training(text_file, **changes), *more]


def launched(
    *command: str,
    folder: Path,
    fault: Fault | None = None,
    restarts: int = 0,
    torchrun: bool = False,
    code: str = ARMED,
    closing_s: int = CLOSING_S,
) -> Launched:
    """`stack COMMAND --nproc 2 --restarts K` in a folder, or the same by torchrun, to its end."""
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
            attempt = int(env.get(started.RESTARTS, 0)) + int(env["TORCHELASTIC_RESTART_COUNT"])
            rank = int(env["RANK"])
            if attempt == len(attempts):
                attempts.append([])
            chosen = fault if fault and (fault.of, 0) == (rank, attempt) else None
            env |= _environment(folder, attempt, chosen)
            command = args[args.index("stackproof") + 1 :]
            begun = Command(*command, folder=folder, environment=env, code=code)
            _state_pid(folder, f"{attempt}-{rank}", begun.process.pid)
            attempts[attempt].append(begun)
            return Rank(begun)

        def close(self, death_sig: signal.Signals | None = None) -> None:
            os.kill(self.proc.pid, death_sig or signal.SIGTERM)

    _state_pid(folder, f"0-{LAUNCHER}", os.getpid())
    server()  # it would inherit the variables of the launcher
    with _own_settings(lambda **given: Forked(**given), closing_s):
        if torchrun:
            ended = _torchrun(command, restarts)
        else:
            ended = _launch(command, folder, restarts)
    return Launched(ended, [[begun.wait() for begun in ranks] for ranks in attempts], folder)


def _launch(command: Sequence[str], folder: Path, restarts: int) -> int:
    try:
        return launch.launch(command, 2, folder / "run", max_restarts=restarts, note=print)
    except RankLost as e:
        return e.exit_code


def _torchrun(command: Sequence[str], restarts: int) -> int:
    """Exit code of torchrun, which is that of a Python that an exception ends."""
    options = ("--nproc-per-node=2", f"--max-restarts={restarts}", "--rdzv-backend=c10d")
    try:
        run.main([*options, "--rdzv-endpoint=localhost:0", "-m", "stackproof", *command])
    except ChildFailedError:
        return 1
    return 0


def _state_pid(folder: Path, of: str, pid: int) -> None:
    (folder / ".pid").write_text(str(pid))
    (folder / ".pid").rename(folder / f"pid-{of}")


def _environment(folder: Path, attempt: int, fault: Fault | None) -> dict[str, str]:
    kind, at, to = (fault.kind, fault.at, fault.to) if fault else ("", 0, ())
    pids = [str(folder.resolve() / f"pid-{attempt}-{of}") for of in to]
    below = str(folder.resolve() / "run")
    return {"FAULT": json.dumps([kind, at, below]), "FAULT_TO": json.dumps(pids)}


@contextmanager
def _own_settings(handler, closing_s: int):
    """The agent with another way to start and end processes. Signals and variables are afterwards
    as they were.
    """
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    former = {number: signal.getsignal(number) for number in numbers}
    closing = mock.patch.object(api.PContext.close, "__defaults__", (None, closing_s))
    try:
        with mock.patch.dict(os.environ), mock.patch.object(api, HANDLER, handler), closing:
            yield
    finally:
        for number, handled in former.items():
            signal.signal(number, handled)


# --- in a rank ------------------------------------------------------------------------------------


class RankFaults(file_calls.Faults):
    """Faults that may come to other ranks than the one whose calls are counted."""

    def is_next(self, descriptor: int) -> bool:
        """Only an error, and the own end, cut a write in half."""
        own = f"-{os.environ['RANK']}"
        cuts = self.fault in file_calls.FAULTS or any(p.endswith(own) for p in _targets())
        return cuts and super().is_next(descriptor)

    def strike(self, path: object) -> None:
        if self.fault in file_calls.FAULTS:
            return super().strike(path)
        for place in map(Path, _targets()):
            while not place.exists():  # the agent starts one rank after the other
                time.sleep(0.01)
            for name in self.fault.split():
                os.kill(int(place.read_text()), signal.Signals[name])
        return None


def _targets() -> list[str]:
    return json.loads(os.environ["FAULT_TO"])


def arm() -> None:
    """Begin to count in this rank, with the fault of its environment, and log the rows it draws."""
    faults = file_calls.arm(RankFaults)
    log = Path(faults.below).parent / f"calls-{started.restarts()}-{started.rank()}"
    util.Finalize(None, lambda: log.write_text(json.dumps(faults.seen)), exitpriority=1)
    for name in COLLECTIVES:
        setattr(dist, name, _counted(faults, name, getattr(dist, name)))
    ProcessGroup.dealt = _counted(faults, EVALUATION, ProcessGroup.dealt)
    loop.draw = logged(loop.draw, Path(faults.below).parent / ROWS)


def _counted(faults: RankFaults, name: str, operation):
    def counted(*given, **options):
        faults.call(name, faults.below)
        return operation(*given, **options)

    return counted


# --- what a run did -------------------------------------------------------------------------------


def places(calls: Sequence[str]) -> dict[str, Sequence[int]]:
    """Numbers of the calls of rank 0 in each part of a run, before the steps that follow the second
    of three saves: a signal in the last step has no effect.
    """
    numbered = list(enumerate(calls, start=1))
    begun = next(n for n, call in numbered if call.startswith("rename .run.json"))
    saves = [n for n, c in numbered if "writing-step-00000003" in c or "writing-step-00000006" in c]
    between = numbered[saves[0] : saves[-1]]
    return {
        "preflight": [n for n, call in numbered[:begun] if call == "write gates.jsonl"],
        "before run.json": range(1, begun + 1),
        "before a checkpoint": range(begun + 1, saves[0]),
        "a save": saves,
        "an evaluation": [n for n, call in between if call.startswith(EVALUATION)],
        "a step": [n for n, call in between if call.startswith("all_reduce")],
    }

"""A pool of processes, started once, that take part in short runs on several ranks: for proofs and
tests. Each run has a process group of its own.
"""

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stackproof.config import RunConfig
from stackproof.contracts.gate import Verdict
from stackproof.spec.errors import StackproofError

TIMEOUT_S = 180.0
# Of the museum's run, where it is divided: fewer steps suffice. The gate of dropout sets a rate.
SETTINGS = {
    "model.dropout": 0.0,
    "train.max_steps": 12,
    "sample.every": 12,
    "eval.every": 6,
    "checkpoint.every": 12,
    "parallel.compare_every": 4,
}
PRELOADED = [
    "torch._dynamo",  # which an optimizer imports in its first step
    "stackproof.model.parallelize",
    "stackproof.train.start",
    "stackproof.museum.prove",
]


@dataclass(frozen=True)
class Answer:
    """What a job has returned on one rank, or the traceback of what it raised."""

    value: Any = None
    raised: str = ""


class RankPool:
    """Processes that wait for jobs. A job is a function, named "module:function", that every rank
    calls with the same arguments, with the variables set that torchrun sets. Each is forked from
    a server that has imported PRELOADED, and imports `modules` before its first job.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._modules = (*PRELOADED, *modules)
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._modules), daemon=True)
        process.start()
        theirs.close()
        self._connections.append(ours)
        self._processes.append(process)

    def run(self, job: str, *arguments: Any, n_ranks: int = 2) -> list[Answer]:
        """The answers of the ranks, in order. The first job of so many ranks starts them. Raises
        TimeoutError, and ends the pool, if one does not answer.
        """
        while len(self._processes) < n_ranks:
            self._start()
        # As the agent of torchrun has it: the store outlives the ranks.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, connection in enumerate(self._connections[:n_ranks]):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": n_ranks,
                "LOCAL_WORLD_SIZE": n_ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
            }
            named = {name: str(value) for name, value in variables.items()}
            connection.send((named, job, arguments))
        answers = []
        for rank, connection in enumerate(self._connections[:n_ranks]):
            if not connection.poll(TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} did not end {job}{arguments} in {TIMEOUT_S:g} s")
            try:
                answers.append(connection.recv())
            except EOFError:
                answers.append(Answer(raised="the process ended"))
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()


@contextmanager
def pool(modules: Sequence[str] = ()) -> Iterator[RankPool]:
    """A pool until the block ends."""
    ranks = RankPool(modules)
    try:
        yield ranks
    finally:
        ranks.close()


def _work(connection: Connection, modules: Sequence[str]) -> None:
    """Import what jobs need, then fork a process for each: its sockets close with it, and nothing
    of a plant is left.
    """
    os.setsid()  # so that what is forked can be ended with it
    for module in modules:
        import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # no collection of garbage in a job goes over it, which would copy its memory
    while True:
        try:
            variables, job, arguments = connection.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            os.environ |= variables
            connection.send(_answer(job, arguments))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            connection.send(Answer(raised=f"the process ended with {code}"))


def _answer(job: str, arguments: tuple) -> Answer:
    module, name = job.split(":")
    try:
        return Answer(getattr(import_module(module), name)(*arguments))
    except BaseException:
        return Answer(raised=traceback.format_exc())


# --- a run of some gates --------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What one rank has seen: the verdicts of its gates, with the step of the first red one, the
    error that ended the run, how often planted code ran, and the step in which it first did.
    """

    verdicts: Mapping[str, tuple[Verdict, int | None]]
    error: str
    touches: int
    began: int | None


def judge_script(gate_ids: Sequence[str], plant_id: str | None) -> Judged:
    """Some gates in the script of another trainer, on one of its ranks, with a plant in the code of
    this process.
    """
    from stackproof.museum import script
    from stackproof.museum.plant import load_museum, touches

    before = touches()
    with load_museum()[plant_id].apply() if plant_id else nullcontext():
        gate, _ = script.run(tuple(gate_ids))
    red = gate.first_failures()
    verdicts = {name: (verdict, red.get(name)) for name, verdict in gate.verdicts().items()}
    return Judged(verdicts, "", touches() - before, None)


def judge(
    cfg: RunConfig, gate_ids: Sequence[str], plant_id: str | None, cache: Path, run_dir: Path
) -> Judged:
    """Some gates in a short run, on one of its ranks, with a plant in the code of this process."""
    from stackproof.distributed.process_group import joined
    from stackproof.museum.observe import Clock
    from stackproof.museum.plant import load_museum
    from stackproof.train.loop import train
    from stackproof.train.start import fresh

    os.environ["STACKPROOF_CACHE"] = str(cache)
    clock, record, error = Clock(), None, ""
    with load_museum()[plant_id].apply() if plant_id else nullcontext():
        try:
            with joined(cfg, torch.device("cpu")) as ranks:
                run = fresh(cfg, (), run_dir, (clock,), ranks=ranks, only=tuple(gate_ids))
                record = train(run)
        except StackproofError as e:
            error, record = f"{type(e).__name__}: {e.what}", getattr(e, "record", None)
    verdicts = {
        g.id: (Verdict(g.verdict, g.message, g.measured), g.first_failure_step)
        for g in (record.gates if record else ())
    }
    return Judged(verdicts, error, clock.ran(), clock.began)

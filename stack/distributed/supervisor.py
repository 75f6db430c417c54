"""The ranks that `stack train --nproc` starts on this machine: processes that end together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Thread

import torch.distributed as dist

from stackproof.distributed import failure
from stackproof.distributed.parent import LAUNCHER
from stackproof.distributed.started import Ended

SETTLING_S = 10  # for the other ranks to notice a lost one and to state their errors
CLOSING_S = 30  # between SIGTERM and SIGKILL for ranks that did not end by themselves
STOPPING_S = 600  # for the step and the save of ranks that a signal to the launcher stops


class RankProcess(subprocess.Popen):
    """The process of a rank, in a session of its own: Ctrl-C of the terminal reaches it and its
    children through the launcher alone.
    """

    def __init__(self, arguments: Sequence[str], variables: dict[str, str]):
        super().__init__(
            [sys.executable, "-m", "stackproof", *arguments],
            env={**os.environ, **variables, LAUNCHER: str(os.getpid())},
            start_new_session=True,
        )

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self.poll() is None:
                os.killpg(self.pid, number)


class Supervisor:
    """Starts ranks, waits for their ends in the order in which they come, and ends those that are
    left. A signal to this process is sent on to all that are started by then, and no further one
    is started. `stop` is the first one.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self._events: SimpleQueue[Ended | int] = SimpleQueue()  # ends of ranks, and signals
        self._running: dict[int, RankProcess] = {}
        self._plan: list[tuple[float, int]] = []  # signals to come, with their time

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals until the block ends."""
        former = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        self.stop = self.stop or number
        self._events.put(number)

    def run(self, arguments: Sequence[str], n_ranks: int) -> list[Ended]:
        """Start all ranks of a run and wait until all have ended. Returns the ends of those that
        failed, in their order.
        """
        # The store outlives the ranks, and is another one in each start.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        variables = {
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_WORLD_SIZE": str(n_ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self._plan = []
        for rank in range(n_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._running[rank] = process = RankProcess(arguments, variables | own)
            Thread(target=self._await, args=(rank, process), daemon=True).start()
            if self.stop is not None:
                break
        return self._until_all_ended(store)

    def _await(self, rank: int, process: RankProcess) -> None:
        code = process.wait()
        self._events.put(Ended(rank, process.pid, code))

    def _until_all_ended(self, store: dist.Store) -> list[Ended]:
        failed: list[Ended] = []
        while self._running:
            match self._next():
                case Ended() as end:
                    del self._running[end.rank]
                    if end.code == 0:
                        continue
                    failed.append(end)
                    if len(failed) == 1 and self.stop is None:
                        failure.state_killed(store, end)
                        self._schedule((SETTLING_S, signal.SIGTERM), (CLOSING_S, signal.SIGKILL))
                case number:
                    for process in self._running.values():
                        process.send_signal(number)
                    if number == self.stop:
                        self._schedule((STOPPING_S, signal.SIGKILL))
        return failed

    def _next(self) -> Ended | int:
        """The next end of a rank, or the next signal to all that are left."""
        due = self._plan[0][0] - time.monotonic() if self._plan else None
        try:
            return self._events.get(timeout=None if due is None else max(0.0, due))
        except Empty:
            return self._plan.pop(0)[1]

    def _schedule(self, *signals: tuple[float, int]) -> None:
        """Send signals to the ranks that are left, each so many seconds after the last."""
        at, self._plan = time.monotonic(), []
        for seconds, number in signals:
            at += seconds
            self._plan.append((at, number))

"""When a checkpoint is written: while training waits, or behind the steps that follow."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stackproof.config import CheckpointConfig


class InLine:
    """Does a job at once. Live tensors can be written as they are:
    nothing changes them meanwhile.
    """

    copied = False

    def start(self, job: Callable[[], Path], then: Callable[[Path], None]) -> None:
        then(job())

    def settle(self) -> None:
        """Nothing is ever left to wait for."""


class Behind:
    """Does one job at a time in a thread of its own, on a copy of the state.
    What follows a job is done by the thread that asks for it.
    """

    copied = True

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[Future[Path], Callable[[Path], None]] | None = None

    def start(self, job: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Begin a job, after the one before it. Raises what that one raised."""
        self.settle()
        self._running = self._pool.submit(job), then

    def settle(self) -> None:
        """Wait for the job, if any, and take up what it returned. Raises what it raised, once."""
        if self._running is None:
            return
        job, then = self._running
        error = job.exception()
        self._running = None
        if error is not None:
            raise error
        then(job.result())


def make_writer(cfg: CheckpointConfig) -> InLine | Behind:
    """The writer a configuration asks for."""
    match cfg.writing:
        case "in-line":
            return InLine()
        case "behind":
            return Behind()
    raise AssertionError(cfg.writing)

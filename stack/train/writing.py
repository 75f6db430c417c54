"""When a checkpoint is written: while training waits, or behind the steps that follow."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from stack.config import CheckpointConfig

Job = Callable[[], None]


class InLine:
    """Does a job at once. Live tensors can be written as they are: nothing changes them meanwhile."""

    copied = False

    def start(self, job: Job) -> None:
        job()

    def settle(self) -> None:
        """Nothing is ever left to wait for."""


class Behind:
    """Does one job at a time in a thread of its own, on a copy of the state."""

    copied = True

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def start(self, job: Job) -> None:
        """Begin a job, after the one before it. Raises what that one raised."""
        self.settle()
        self._job = self._pool.submit(job)

    def settle(self) -> None:
        """Wait for the job that is being done, if any, and raise what it raised. It raises once."""
        if self._job is not None:
            job = self._job
            error = job.exception()
            self._job = None
            if error is not None:
                raise error


def make_writer(cfg: CheckpointConfig) -> InLine | Behind:
    """The writer a configuration asks for."""
    match cfg.writing:
        case "in-line":
            return InLine()
        case "behind":
            return Behind()
    raise AssertionError(cfg.writing)

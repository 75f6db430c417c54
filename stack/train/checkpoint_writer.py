"""When checkpoints are written: while training waits, or behind it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stackproof.config import CheckpointConfig


class SyncWriter:
    """Writes a checkpoint while training waits; it may write the live tensors themselves."""

    copied = False

    def start(self, job: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Run `job`, then `then` with its result."""
        then(job())

    def wait(self) -> None:
        """Nothing is ever left to wait for."""


class AsyncWriter:
    """Writes one checkpoint at a time in a background thread, from a copy of the state.

    `then` runs in the calling thread, at the next `start` or `wait`.
    """

    copied = True

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[Future[Path], Callable[[Path], None]] | None = None

    def start(self, job: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Begin a job after the previous one. Raises what the previous one raised."""
        self.wait()
        self._running = self._pool.submit(job), then

    def wait(self) -> None:
        """Wait for the job, if any, and run its `then`. Raises what it raised, once."""
        if self._running is None:
            return
        job, then = self._running
        error = job.exception()
        self._running = None
        if error is not None:
            raise error
        then(job.result())


Writer = SyncWriter | AsyncWriter


def make_writer(cfg: CheckpointConfig) -> Writer:
    """The writer that the configuration names."""
    return AsyncWriter() if cfg.async_save else SyncWriter()

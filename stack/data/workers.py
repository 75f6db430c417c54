"""Worker processes that end with their parent process."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any


def _die_with_parent() -> None:
    """End this worker when its parent process has ended for any reason, so that it cannot write
    during a restart.
    """

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


class Pool:
    """Run jobs in this process or in several, and yield (job, result) as they finish.
    One worker is this process.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        if self.workers > 1:
            self.executor = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_die_with_parent
            )
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def __call__(
        self, function: Callable[[Any], Any], jobs: Iterable[Any]
    ) -> Iterator[tuple[Any, Any]]:
        if self.executor is None:
            yield from ((job, function(job)) for job in jobs)
            return
        waiting, todo = {}, iter(jobs)
        for job in islice(todo, 2 * self.workers):
            waiting[self.executor.submit(function, job)] = job
        while waiting:
            done: set[Future] = wait(waiting, return_when=FIRST_COMPLETED).done
            for future in done:
                finished = waiting.pop(future)
                for job in islice(todo, 1):
                    waiting[self.executor.submit(function, job)] = job
                yield finished, future.result()

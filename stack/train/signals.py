"""Signals as requests the loop reads at its next boundary. The second Ctrl-C stops at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Requests:
    """The signals received since the last boundary."""

    stop: int | None = None
    checkpoint: bool = False
    # Not shown: signal.signal makes a text of its handler, and this one holds a whole run.
    on_checkpoint: Callable[[], None] = field(default=lambda: None, repr=False)

    def _on_stop(self, number: int, frame) -> None:
        if self.stop is not None:
            raise KeyboardInterrupt
        self.stop = number

    def _on_checkpoint(self, number: int, frame) -> None:
        self.checkpoint = True
        self.on_checkpoint()


STATUS_OF_SIGNAL = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("preempted", 75)}


@contextmanager
def listening(on_checkpoint: Callable[[], None]) -> Iterator[Requests]:
    """Route SIGINT, SIGTERM and SIGUSR1 into a Requests object for the length of the context; a
    SIGUSR1 is acknowledged at once.
    """
    requests = Requests(on_checkpoint=on_checkpoint)
    handlers = {
        signal.SIGINT: requests._on_stop,
        signal.SIGTERM: requests._on_stop,
        signal.SIGUSR1: requests._on_checkpoint,
    }
    try:
        former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not the main thread, which keeps its handlers
        yield requests
        return
    try:
        yield requests
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

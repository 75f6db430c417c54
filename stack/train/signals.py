"""Signals: before step 1 they end the run at once, later they are requests that the loop reads at
its next boundary. A second Ctrl-C ends it at once.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from stackproof.distributed.ranks import Ranks
from stackproof.distributed.started import is_worker

STATUS_OF_SIGNAL = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("preempted", 75)}


class StoppedAtOnce(KeyboardInterrupt):
    """A signal that ends the run where it is: no step of the run is complete that a checkpoint
    could hold, or Ctrl-C came twice.
    """

    def __init__(self, number: int):
        self.status, self.exit_code = STATUS_OF_SIGNAL[signal.Signals(number)]
        super().__init__(number)


@dataclass
class Requests:
    """The signals received since the last boundary. `deferred` is whether they wait for it. The
    agreed ones are those of all ranks, on which all act alike: a signal may come at any moment.
    """

    stop: int | None = None
    checkpoint: bool = False
    agreed_stop: int | None = None
    agreed_checkpoint: bool = False
    deferred: bool = False
    # Not shown: signal.signal makes a text of its handler, and this one holds a whole run.
    on_checkpoint: Callable[[], None] = field(default=lambda: None, repr=False)

    def defer(self, on_checkpoint: Callable[[], None]) -> None:
        """Let signals wait for the end of a step from now on; SIGUSR1 is acknowledged at once."""
        self.deferred, self.on_checkpoint = True, on_checkpoint

    def agree(self, ranks: Ranks) -> None:
        """Take over the requests that any rank has received so far."""
        stop, checkpoint = ranks.highest(self.stop or 0, self.checkpoint)
        self.agreed_stop, self.agreed_checkpoint = stop or None, bool(checkpoint)

    def _on_stop(self, number: int, frame) -> None:
        # A scheduler repeats SIGTERM until the process ends; only a person means a second Ctrl-C.
        again = number == signal.SIGINT == self.stop
        self.stop = self.stop or number
        if again or not self.deferred:
            raise StoppedAtOnce(number)

    def _on_checkpoint(self, number: int, frame) -> None:
        self.checkpoint = True
        self.on_checkpoint()


@contextmanager
def listening() -> Iterator[Requests]:
    """Route SIGINT, SIGTERM and SIGUSR1 into a Requests object for the length of the context. A
    rank ignores them afterwards: the launcher sends SIGTERM to all when the first one has ended,
    and each keeps its own exit code.
    """
    requests = Requests()
    handlers = {
        signal.SIGINT: requests._on_stop,
        signal.SIGTERM: requests._on_stop,
        signal.SIGUSR1: requests._on_checkpoint,
    }
    with _handled_by(handlers, afterwards=signal.SIG_IGN if is_worker() else None):
        yield requests


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM while the end of a run is written down."""
    with _handled_by(dict.fromkeys(STATUS_OF_SIGNAL, signal.SIG_IGN)):
        yield


@contextmanager
def _handled_by(handlers: dict, afterwards: signal.Handlers | None = None) -> Iterator[None]:
    former = {}
    try:
        try:
            for number, handler in handlers.items():
                former[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread, which keeps its handlers
            pass
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler if afterwards is None else afterwards)

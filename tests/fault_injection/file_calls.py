"""A fault at the n-th call that changes files: an error, a write cut in half, or a kill.

The calls are counted in a process of their own, by an audit hook for opening, renaming, making and
deleting, and by wrappers for writing and syncing.
"""

import errno
import io
import json
import os
import signal
import sys
from multiprocessing import util
from pathlib import Path

from tests.processes import STACK, Command, Done

# Events of calls that change files, with the place of the folder's descriptor in their arguments.
CHANGING = {"os.rename": 2, "os.link": 2, "os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}
CHANGING |= {"os.truncate": None}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FAULTS = {"full": errno.ENOSPC, "broken": errno.EIO, "denied": errno.EACCES}
COUNT = "file-calls"
ARMED = f"""
from tests.fault_injection import file_calls
file_calls.arm()
{STACK}
"""


def run(
    *arguments: str,
    folder: Path,
    fault: str = "",
    at: int = 0,
    code: str = ARMED,
    light: bool = False,
) -> Done:
    """`stack …` in a folder, with a fault (a key of FAULTS, or `kill`) at its `at`-th call there.
    `code` may be other Python that calls `arm` first; `light` is that of Command.
    """
    environment = {**os.environ, "FAULT": json.dumps([fault, at, str(folder.resolve())])}
    command = Command(*arguments, folder=folder, environment=environment, code=code, light=light)
    return command.wait()


def calls(done: Done) -> list[str]:
    """The calls of a run without a fault, in order, each as its name and the name of the file."""
    found = [line for line in done.err.splitlines() if line.startswith(COUNT)]
    assert len(found) == 1, (
        f"the command was not armed, or did not end by itself: {done.err[-800:]}"
    )
    return json.loads(found[0].removeprefix(COUNT))


def came(done: Done, fault: str, at: int) -> bool:
    """Whether the command came to the call with the fault: a kill shows in the exit code, an error
    in the number of calls.
    """
    if fault == "kill":
        assert done.code in (0, -signal.SIGKILL), (done.code, done.err[-800:])
        return done.code == -signal.SIGKILL
    return len(calls(done)) >= at


class Faults:
    """Counts the calls below a folder, and breaks one of them."""

    def __init__(self, fault: str, at: int, below: str):
        self.fault, self.at, self.below = fault, at, below
        self.seen: list[str] = []

    def path_of(self, place: object) -> str | None:
        """The path of a file or descriptor, relative to the folder; None if it is elsewhere."""
        named = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place
        path = os.path.abspath(os.fsdecode(named))
        return os.path.relpath(path, self.below) if path.startswith(self.below) else None

    def is_next(self, descriptor: int) -> bool:
        """Whether a call on this file would be the chosen one."""
        return len(self.seen) + 1 == self.at and self.path_of(descriptor) is not None

    def call(self, name: str, path: object) -> None:
        """Count a call; at the chosen one die or raise OSError."""
        if (named := self.path_of(path)) is None:
            return
        # Without the process id in the names of temporaries, so that runs compare.
        self.seen.append(f"{name} {named.replace(str(os.getpid()), 'PID')}")
        if len(self.seen) != self.at:
            return
        self.strike(path)

    def strike(self, path: object) -> None:
        """The fault, at a call on this path."""
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = FAULTS[self.fault]
        raise OSError(number, os.strerror(number), str(path))

    def hook(self, event: str, arguments: tuple) -> None:
        opens = event == "open" and not isinstance(arguments[0], int)
        if event in CHANGING or (opens and (arguments[2] or 0) & WRITING):
            at, path = CHANGING.get(event), arguments[0]
            if at is not None and arguments[at] >= 0:  # relative to an open folder
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[at]}"), path)
            self.call(event.removeprefix("os."), path)


def arm(kind: type[Faults] = Faults) -> Faults:
    """Begin to count in this process, with the fault of its environment. Returns the counter."""
    faults = kind(*json.loads(os.environ["FAULT"]))
    fsync, fdopen, reserve = os.fsync, os.fdopen, os.posix_fallocate

    class Writer(io.BufferedWriter):
        def write(self, data):
            if faults.is_next(self.raw.fileno()):
                data = memoryview(data).cast("B")
                super().write(data[: len(data) // 2])
                super().flush()
            faults.call("write", self.raw.fileno())
            return super().write(data)

    def opened(descriptor, mode="r", *more, **options):
        if mode in ("wb", "ab"):
            return Writer(io.FileIO(descriptor, mode[0]))
        return fdopen(descriptor, mode, *more, **options)

    def synced(descriptor):
        faults.call("sync", descriptor)
        return fsync(descriptor)

    def reserved(descriptor, *place):
        faults.call("reserve", descriptor)
        return reserve(descriptor, *place)

    os.fsync, os.fdopen, os.posix_fallocate = synced, opened, reserved
    sys.addaudithook(faults.hook)
    # A child of a fork server does not run atexit.
    util.Finalize(
        None, lambda: sys.stderr.write(f"{COUNT}{json.dumps(faults.seen)}\n"), exitpriority=0
    )
    return faults

"""A lock on a folder: one process at a time."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stackproof.spec.errors import UsageError
from stackproof.spec.files import host_name, open_to_append, process_name, require_own

LOCK = ".lock"


@contextmanager
def file_lock(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder for `what`; with `wait` when the process that holds it has ended.

    The lock ends with its process; its file stays, since a file that is deleted and made again can
    be locked twice. Raises UsageError if another process holds the lock, OSError if the file cannot
    be opened or locked.
    """
    require_own(folder)
    with open_to_append(folder / LOCK) as f:
        try:
            import fcntl
        except ImportError:  # no file locks on this platform
            yield
            return
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise UsageError(
                f"another {what} is writing to {folder}",
                next_step="wait for it, or name another folder",
            ) from e
        yield


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `target`, to be renamed to it; what is left of it is removed.
    Folders of processes of this host that have ended are removed first.

    Raises OSError if the folder cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    start = f".writing-{target.name}-"
    remove_abandoned(target.parent, start)
    folder = target.parent / f"{start}{process_name()}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path, start: str) -> None:
    """Delete the folders named `start`, host and process, if the process was one of this host and
    has ended. Whether one of another host has ended is unknown here: its folder stays.
    """
    for left in parent.glob(f"{glob.escape(start)}*"):
        host, _, pid = left.name.removeprefix(start).partition("-")
        is_ours = host == host_name() and pid.isdecimal()
        if is_ours and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or no number of a process
        return True
    return True


def refuse_occupied(path: Path, option: str) -> None:
    """Raises UsageError unless `path` is empty or does not exist; `option` is its flag."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(
            f"{path} is not an empty folder",
            allowed="a new or empty folder",
            next_step=f"choose another {option}; existing files are never replaced",
        )

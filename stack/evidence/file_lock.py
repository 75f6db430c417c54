"""A lock on a folder: one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stackproof.spec.errors import UsageError


@contextmanager
def file_lock(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder for `what`. Raises UsageError if another process holds the lock. The lock ends
    with its process.
    """
    with open(folder / ".lock", "w") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no file locks on this platform
            pass
        except OSError as e:
            raise UsageError(
                f"another {what} is writing to {folder}",
                next_step="wait for it, or name another folder",
            ) from e
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def refuse_occupied(path: Path, option: str) -> None:
    """Raises UsageError unless `path` is empty or does not exist; `option` is its flag."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(
            f"{path} is not empty",
            allowed="a new or empty folder",
            next_step=f"choose another {option}; existing files are never replaced",
        )

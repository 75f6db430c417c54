"""One process at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stackproof.spec.errors import UsageError


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder against others that do `what` in it.
    Raises UsageError if one is at work there; a killed one lets go.
    """
    with open(folder / ".lock", "w") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # nothing holds a folder here
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
    """Raises UsageError unless `path` is a place for a new folder;
    `option` is the flag that names it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(
            f"{path} is not empty",
            allowed="a new folder",
            next_step=f"choose another {option}; nothing is replaced",
        )

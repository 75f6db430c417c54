"""The folder of a run's checkpoints: step folders, and the pointers that name one of them."""

import errno
import os
import re
import shutil
from pathlib import Path

from stackproof.distributed.started import next_command
from stackproof.spec.checksums import require_unchanged
from stackproof.spec.errors import CheckpointError, EnvironmentUnfit, IntegrityError
from stackproof.spec.files import read_bytes, remedy, remove_folder, write_atomically
from stackproof.tensorfolder import OLDER

STEP = re.compile(r"step-(\d{8})")
SPARE_BYTES = 16 * 2**20  # left free beside checkpoints, for logs and the record


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def free_bytes(root: Path) -> int:
    """Bytes that this process may still write below a folder that may not exist yet."""
    return shutil.disk_usage(next(p for p in (root, *root.absolute().parents) if p.exists())).free


def require_free(root: Path, n_bytes: int, n_checkpoints: int = 1) -> None:
    """Raises EnvironmentUnfit unless that many checkpoints of `n_bytes` fit on the disk, with room
    for logs and record.
    """
    needed, free = n_checkpoints * n_bytes + SPARE_BYTES, free_bytes(root)
    if needed > free:
        raise EnvironmentUnfit(
            f"the disk below {root} has no room for {n_checkpoints} checkpoint(s)",
            value=f"{free} bytes free",
            allowed=f"at least {needed} bytes",
            next_step=(
                f"free space, then {next_command(root.parent)}; or another --run-dir; "
                "checkpoint.keep sets how many are kept"
            ),
        )


def not_written(root: Path, step: int, error: Exception) -> CheckpointError:
    """The error of a save that the disk, or a limit of the process, has refused."""
    cause = error if isinstance(error, OSError) else error.__cause__
    value, solved = f"{free_bytes(root)} bytes free below {root}", remedy(error)
    allowed = "a disk with room for two checkpoints"
    if isinstance(cause, OSError) and cause.errno == errno.EFBIG:
        value = f"the limit of the size of files, {_file_limit()} (ulimit -f)"
        allowed, solved = "one above the size of a checkpoint", "raise the limit"
    return CheckpointError(
        f"the checkpoint of step {step} could not be written: {error}",
        value=value,
        allowed=allowed,
        next_step=f"{solved}, then {next_command(root.parent)}",
    )


def _file_limit() -> str:
    import resource  # of Unix alone

    n_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return "that of the file system" if n_bytes == resource.RLIM_INFINITY else f"{n_bytes} bytes"


def point(root: Path, name: str, folder: Path) -> None:
    """Point `name` (`latest` or `best`) at a step folder, atomically."""
    write_atomically(root / name, folder.name.encode())


def point_best(root: Path, step: int | None) -> None:
    """Point `best` at the folder of a step. If there is no such folder, as in a child run whose
    best step is its parent's, or after an older step was taken, nothing is called best.
    """
    if step is None or not (folder := root / step_name(step)).is_dir():
        (root / "best").unlink(missing_ok=True)
    elif pointed(root, "best") != folder:
        point(root, "best", folder)


def pointed(root: Path, name: str) -> Path | None:
    """The step folder that the pointer `name` names, whether or not it exists;
    None without such a pointer. Raises CheckpointError if the file holds anything else.
    """
    if not os.path.lexists(root / name):
        return None
    try:
        data = read_bytes(root / name, 64)
        text = data.decode("ascii").strip()
        if root.name == "checkpoints":
            require_unchanged(root.parent, f"checkpoints/{name}", data)
    except IntegrityError as e:
        raise CheckpointError(e.what, value=e.value, allowed=e.allowed, next_step=OLDER) from e
    except (OSError, UnicodeDecodeError) as e:
        text = str(e)
    if not STEP.fullmatch(text):
        raise CheckpointError(
            f"{root / name} does not name a step folder",
            value=repr(text),
            allowed="the name of a folder, such as step-00000200",
            next_step="give the folder of a step, or --resume DIR --at STEP",
        )
    return root / text


def step_of(folder: Path) -> int | None:
    """The step of a step folder, by its name; None for other names."""
    found = STEP.fullmatch(folder.name)
    return int(found[1]) if found else None


def pointed_step(root: Path, name: str) -> int | None:
    """Step of the folder that the pointer `name` names; None unless that folder is complete."""
    folder = pointed(root, name)
    complete = folder is not None and (folder / "manifest.json").is_file()
    return step_of(folder) if complete else None


def step_folders(root: Path) -> list[Path]:
    """The step folders below `root`, oldest first. Links are left out."""
    found = (p for p in root.glob("step-*") if step_of(p) is not None)
    return sorted(p for p in found if p.is_dir() and not p.is_symlink())


def retain(root: Path, keep: int, *, with_later: bool = True) -> None:
    """Delete all step folders but the newest `keep` and those a pointer names, and leftovers of
    interrupted writes. Folders of steps after `latest` belong to a part of the run that was taken
    back; they go too, `with_later`.
    """
    kept = {pointed(root, n) for n in ("latest", "best")}
    newest = pointed(root, "latest")
    folders = step_folders(root)
    current = [p for p in folders if newest is None or p.name <= newest.name]
    for folder in folders if with_later else current:
        if folder not in kept and folder not in current[-keep:]:
            remove_folder(folder)
    for leftover in (*root.glob(".writing-*"), *root.glob(".replaced-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def has_any(root: Path) -> bool:
    """Whether a save of the run has reached its place."""
    return bool(step_folders(root)) or any(root.glob(".replaced-*"))

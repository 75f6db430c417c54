"""Runs git in folders that other people may have made: without their programs, and within bounds of
memory, output and time.
"""

import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO

from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import FileRefused, read_bytes, remedy

# The folder may be foreign, and its configuration may name programs. Filters and drivers have names
# that cannot be known and switched off: they run only if git reads the work tree or writes a patch.
SETTINGS = ("core.fsmonitor=false", "protocol.allow=never", "log.showSignature=false")
SETTINGS += ("safe.bareRepository=explicit",)
# git reads neither a mailmap nor an order of files, nor attributes, which renames are found with.
SETTINGS += ("log.mailmap=false", "diff.orderFile=/dev/null", "diff.renames=false")
SETTINGS += ("log.follow=false", "log.showRoot=true")
NO_PROGRAMS = tuple(word for setting in SETTINGS for word in ("-c", setting))
MAX_BYTES = 128 * 2**20  # of the output of a command, and of a file in history
MAX_MEMORY_BYTES = 2**30  # of a git process, on Linux
TIMEOUT_S = 600
CONFIGURATIONS = ("config", "config.worktree")
MAX_POINTER_BYTES = 2**14  # of a file that names a folder
MAX_CONFIGURATIONS = 100  # of a git folder, with included ones: each costs a process
TAKEN_HEAD = re.compile(rb"ref: refs/|[0-9a-f]{40}")


def _environment() -> dict[str, str]:
    """The environment of a git that fetches nothing, also from a promisor of a partial clone, does
    not refresh the index, which could run a hook, and reads the history as it was committed.
    """
    nothing = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_OPTIONAL_LOCKS": "0"}
    as_committed = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_GRAFT_FILE": os.devnull}
    return os.environ | nothing | as_committed


@contextmanager
def started(folder: Path, *arguments: str, stdin: bytes = b"") -> Iterator[tuple[Popen, IO[bytes]]]:
    """A git command that runs in a folder, and its output as a stream. The command ends with the
    context; if it fails, the stream ends early.

    Raises OSError if git is absent, IntegrityError if the command takes longer than TIMEOUT_S.
    """
    command = ["git", *NO_PROGRAMS, "-C", str(folder), *arguments]
    with tempfile.TemporaryFile() if stdin else open(os.devnull, "rb") as given:
        if stdin:
            given.write(stdin)
            given.seek(0)
        process = Popen(command, stdin=given, stdout=PIPE, stderr=DEVNULL, env=_environment())
    expired = threading.Event()
    timer = threading.Timer(TIMEOUT_S, lambda: (expired.set(), process.kill()))
    timer.daemon = True
    with process:
        try:
            timer.start()
            _bound_memory(process.pid)
            assert process.stdout is not None
            yield process, process.stdout
        finally:
            timer.cancel()
            process.kill()
    if expired.is_set():
        raise IntegrityError(
            f"git {arguments[0]} did not end in {folder}",
            allowed=f"at most {TIMEOUT_S} s",
            next_step="look for pipes and devices that .git leads to, and for a slow disk",
        )


def run_git(folder: Path, *arguments: str, stdin: bytes = b"") -> bytes | None:
    """Output of a git command run in a folder; None if it failed or git is absent.

    Commands that read the work tree or write patches, such as `status` and `diff`, may run filters
    of the repository: only for the checkout whose code runs. `History.git` is for any folder.
    Raises IntegrityError if the output is larger than MAX_BYTES, or as `started`.
    """
    try:
        with started(folder, *arguments, stdin=stdin) as (process, stream):
            out = stream.read(MAX_BYTES + 1)
            if len(out) > MAX_BYTES:
                raise too_large(f"the output of git {arguments[0]} in {folder}")
            failed = process.wait()
    except OSError:
        return None
    return None if failed else out


def _bound_memory(pid: int) -> None:
    if sys.platform == "linux":
        import resource

        with suppress(OSError, ValueError):  # it has ended, or has a lower limit already
            resource.prlimit(pid, resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def too_large(what: str, n_bytes: int | None = None) -> IntegrityError:
    return IntegrityError(
        f"{what} is too large",
        value=None if n_bytes is None else f"{n_bytes} bytes",
        allowed=f"at most {MAX_BYTES} bytes",
        next_step="keep files of that size, and trees of that many files, out of the repository",
    )


def require_readable(folder: Path) -> None:
    """Raises IntegrityError if the repository of a folder holds a pipe or a device that git would
    open, or includes one in its configuration: git would wait for it, or read without end. Files
    that only alternates or links to folders lead to are not found; TIMEOUT_S bounds those. Places
    above the repository are not looked at.
    """
    try:
        for place in (folder.resolve(), *folder.resolve().parents):
            for name in ("HEAD", "commondir", ".git"):  # git takes any folder for a bare repository
                _require_no_pipe(place / name)
            folders = [*_git_folders(place)]
            for git in folders:
                _require_no_pipes_below(git)
                _require_plain_configuration([git / name for name in CONFIGURATIONS])
            if _stops_at(folders):
                break
    except OSError as e:
        raise IntegrityError(
            f"the git repository of {folder} is not read: {e}",
            allowed="regular files and folders below .git",
            next_step=f"{remedy(e)}, if you trust the folder",
        ) from e


def _git_folders(place: Path) -> Iterator[Path]:
    """The git folder of a work tree, and the one that holds its objects, if that is another."""
    git = place / ".git"
    if git.is_file():
        git = _pointed(git)
    if git.is_dir():
        yield git
        if (git / "commondir").is_file():
            yield _pointed(git / "commondir")


def _pointed(file: Path) -> Path:
    """The folder that a `.git` or `commondir` file names, with the bytes that git takes of it."""
    name = read_bytes(file, MAX_POINTER_BYTES).removeprefix(b"gitdir: ").rstrip(b"\r\n")
    if b"\0" in name:
        raise FileRefused(file, "names a folder with a NUL byte")
    return file.parent / os.fsdecode(name)


def _stops_at(folders: list[Path]) -> bool:
    """Whether git surely takes the git folder of a place, so that it looks at no place above: git
    requires a HEAD, and objects and refs where it keeps them.
    """
    if not folders or (head := folders[0] / "HEAD").is_symlink() or not head.is_file():
        return False
    kept = (folders[-1] / "objects", folders[-1] / "refs")
    named = TAKEN_HEAD.match(read_bytes(head, MAX_POINTER_BYTES))
    return named is not None and all(os.access(path, os.X_OK) for path in kept)


def _require_no_pipes_below(folder: Path) -> None:
    waiting = [folder]
    while waiting:
        try:
            entries = [*os.scandir(waiting.pop())]
        except OSError:  # git cannot open files below it either
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "hooks":
                    waiting.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                _require_no_pipe(Path(entry.path))


def _require_no_pipe(path: Path) -> None:
    """Raises FileRefused for a pipe or a device, or a link to one. git does not wait for a socket,
    and its file monitor has one.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # git cannot open it either
        return
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise FileRefused(path, "is a pipe or a device; a regular file is required")


def _require_plain_configuration(waiting: list[Path]) -> None:
    """Raises FileRefused for a pipe or a device among files of configuration and what they
    include, and for more than MAX_CONFIGURATIONS of them.
    """
    seen = set()
    while waiting:
        path = waiting.pop()
        _require_no_pipe(path)
        if path.is_file() and (real := path.resolve()) not in seen:
            if len(seen) == MAX_CONFIGURATIONS:
                why = f"is beyond the {MAX_CONFIGURATIONS} files of configuration that are allowed"
                raise FileRefused(path, why)
            seen.add(real)
            waiting += _included(path)


def _included(path: Path) -> list[Path]:
    """The files that a file of git's configuration includes, also under a condition. Raises
    FileRefused for one that is named by where git is installed.
    """
    if b"[include" not in read_bytes(path).lower():
        return []
    # Run in the root folder, outside the repository: git would read its configuration first.
    words = ("config", "--file", str(path), "--no-includes", "-z", "--get-regexp", "^include")
    listed = os.fsdecode(run_git(Path(path.anchor), *words) or b"")
    values = [value for _, _, value in (row.partition("\n") for row in listed.split("\0"))]
    values = [value for value in values if value]
    if any(value.startswith("%(prefix)") for value in values):
        raise FileRefused(path, "includes a file of the installation of git")
    return [path.parent / os.path.expanduser(value) for value in values]

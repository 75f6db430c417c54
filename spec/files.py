"""Opens, writes and deletes files of folders that other people may have made.

Only regular files are opened, up to a size. Nothing is written or deleted through a link.
"""

import errno
import io
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MAX_TEXT_BYTES = 32 * 2**20
TEMPORARY = ".tmp"
REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EACCES: "correct the permissions of {path} and of its folder",
    errno.EPERM: "correct the permissions of {path} and of its folder",
    errno.EROFS: "make the file system of {path} writable",
    errno.EIO: "check the disk of {path}",
    errno.EMFILE: "raise the limit of open files",
    errno.ENFILE: "raise the limit of open files",
    errno.ENOENT: "restore {path}",
    errno.ENOTDIR: "move the file in the place of a folder away",
    errno.EISDIR: "move {path} away",
    errno.EEXIST: "move {path} away",
    errno.ELOOP: "move {path} away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EINVAL: "move {path} away",
    errno.EFBIG: "make {path} smaller",
    errno.EILSEQ: "restore {path}",
}
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


class FileRefused(OSError):
    """A file that is not opened, written or deleted: it is of the wrong kind, too large, or not
    UTF-8. An OSError, so that what handles unreadable files handles it as well.
    """

    def __init__(self, path: Path, why: str, number: int = errno.EINVAL):
        super().__init__(number, why, str(path))

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def remedy(error: BaseException) -> str:
    """What to do about a file that could not be read or written, as the beginning of a next
    step. `error` is an OSError, or another error that one caused.
    """
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError):
        return "remove the cause"
    path = "the file" if cause.filename is None else os.fsdecode(cause.filename)
    return REMEDIES.get(cause.errno or 0, "remove the cause").format(path=path)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, also through a link. Never waits for a pipe.

    Raises FileRefused for a folder, pipe, device or socket, OSError if it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`.

    Raises FileRefused for a larger file or one of another kind, OSError if it cannot be read.
    """
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        # room for what the file holds, not for all that is allowed; more if it grows meanwhile
        data = f.read(size + 1) if size <= max_bytes else b""
        if size < len(data) <= max_bytes:
            data += f.read(max_bytes + 1 - len(data))
    if max(size, len(data)) > max_bytes:
        raise FileRefused(
            path, f"holds more than the {max_bytes} bytes that are allowed", errno.EFBIG
        )
    return data


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a regular UTF-8 file. Raises FileRefused for other bytes, and as
    `read_bytes`.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as e:
        raise FileRefused(path, f"is not UTF-8 at byte {e.start}", errno.EILSEQ) from e


def holds(path: Path, data: bytes) -> bool:
    """Whether a regular file has exactly these bytes. Raises OSError if it cannot be read."""
    try:
        return read_bytes(path, len(data)) == data
    except FileRefused:
        return False


def lines_of(
    path: Path, max_bytes: int, max_line_bytes: int = MAX_TEXT_BYTES
) -> Iterator[tuple[int, bytes]]:
    """The number and the bytes of each line of a regular file, newline included, one at a time. The
    last one may have none.

    Raises FileRefused at a longer line, for a larger file or one of another kind, OSError if it
    cannot be read.
    """
    left, number = max_bytes, 0
    with open_regular(path) as f:
        while line := f.readline(min(max_line_bytes, left) + 1):
            left, number = left - len(line), number + 1
            if left < 0:
                why = f"holds more than the {max_bytes} bytes that are allowed"
                raise FileRefused(path, why, errno.EFBIG)
            if len(line) > max_line_bytes:
                why = f"line {number} holds more than the {max_line_bytes} bytes that are allowed"
                raise FileRefused(path, why, errno.EFBIG)
            yield number, line


def text_lines(text: str) -> list[str]:
    """The lines of a text without their ends, as Python, git and a shell count them. str.splitlines
    ends lines at more characters.
    """
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably: it has the old or the new content, also after a power
    failure. A link of that name is replaced, and its target stays as it is.

    Raises FileRefused if the folder is a link, OSError if the file cannot be written.
    """
    require_own(path.parent)
    temporary = path.with_name(f".{path.name}.{process_name()}{TEMPORARY}")
    try:
        create_durably(temporary, data, replace=True)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as e:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError):  # name the file itself, not its temporary
            e.filename, e.filename2 = str(path), None
        raise


def process_name() -> str:
    """Host and number of this process, for names of temporary files: hosts that share a disk may
    have processes of the same number.
    """
    return f"{host_name()}-{os.getpid()}"


def host_name() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", platform.node())


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed `write_atomically` left, whatever its process and host. The caller holds
    the lock of the folder, under which no other process writes to it.
    """
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def create(path: Path, *, replace: bool = False) -> BinaryIO:
    """A new file, open for writing; with `replace` in place of a regular file or a link.

    Raises FileExistsError if anything has that name already, with `replace` FileRefused if it is a
    pipe, device, socket or folder.
    """
    if replace:
        with suppress(FileNotFoundError):
            _require_regular(path, os.lstat(path).st_mode, or_link=True)
            path.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def create_durably(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a new file and wait until it is on the disk. Raises as `create`, and OSError if it
    cannot be written.
    """
    with create(path, replace=replace) as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def open_to_append(path: Path) -> BinaryIO:
    """A regular file opened at its end, made if it is missing.

    Raises FileRefused for a link or a file of another kind, OSError if it cannot be opened.
    """
    with suppress(FileNotFoundError):
        _require_regular(path, os.lstat(path).st_mode)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def append_durably(path: Path, data: bytes) -> None:
    """Append with one write, and wait until it is on the disk. After an error the file is as
    before. Other processes must not write to it meanwhile.

    Raises OSError as `open_to_append`, or if the data cannot be written.
    """
    is_new, size = not os.path.lexists(path), None
    try:
        if is_new:
            write_atomically(path, data)
            return
        with open_to_append(path) as f:
            size = os.fstat(f.fileno()).st_size
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        # not before it is closed: closing writes what is left in its buffer
        with suppress(OSError):
            if is_new:
                path.unlink(missing_ok=True)
            elif size is not None:
                os.truncate(path, size)
        raise


def end_last_line(path: Path, is_whole: Callable[[bytes], bool]) -> bytes:
    """Make a regular file end with a newline, durably. Bytes behind the last one get theirs if they
    are a whole line, and are removed if not. Returns what was removed; nothing if the file does not
    exist.

    Raises OSError as `open_to_append`, or if the file cannot be read or cut.
    """
    if not os.path.lexists(path):
        return b""
    with open_to_append(path) as f:
        data = read_bytes(path)
        tail = data[data.rfind(b"\n") + 1 :]
        removed = b"" if not tail or is_whole(tail) else tail
        if removed:
            f.truncate(len(data) - len(tail))
        elif tail:
            f.write(b"\n")
        f.flush()
        os.fsync(f.fileno())
    return removed


def remove_folder(path: Path) -> None:
    """Delete a folder with its content; nothing if it does not exist. Links in it are deleted, not
    followed.

    Raises FileRefused if the folder is a link, OSError if it cannot be deleted.
    """
    require_own(path)
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def require_own(path: Path) -> None:
    """Raises FileRefused if a folder or file that is written to is a link."""
    if path.is_symlink():
        raise FileRefused(path, "is a link; files are not written or deleted through links")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Some file systems, such as
    network shares, cannot sync a folder: there it returns at once.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in NO_FOLDER_SYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def _require_regular(path: Path, mode: int, *, or_link: bool = False) -> None:
    if not (stat.S_ISREG(mode) or (or_link and stat.S_ISLNK(mode))):
        kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise FileRefused(path, f"is {kind}; a regular file is required")

"""SHA256SUMS: the hashes of a folder's files, in the form that `sha256sum --check` reads. It is
written when a folder is finished, and finds every later change.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from stackproof.spec.canonical import sha256_bytes, sha256_file
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import read_text, write_atomically

FILE = "SHA256SUMS"
LINE = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<path>[^\n]+)\n")


def write_checksums(folder: Path, paths: Iterable[str]) -> None:
    """Write the hashes of files, by path relative to the folder. Raises OSError."""
    lines = [f"{sha256_file(folder / path)}  {path}\n" for path in sorted(paths)]
    write_atomically(folder / FILE, "".join(lines).encode())


def read_checksums(folder: Path) -> dict[str, str] | None:
    """sha256 by relative path; None for a folder without the file. Raises IntegrityError naming a
    damaged line.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        text = read_text(path)
    except OSError as e:
        raise IntegrityError(f"cannot read {path}: {e}") from e
    found: dict[str, str] = {}
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        match = LINE.fullmatch(line)
        if match is None or match["path"] in found:
            raise IntegrityError(
                f"{path}:{number} is damaged",
                value=repr(line[:100]),
                allowed="a sha256, two blanks and a path that no other line has",
                next_step="stack inspect RUN --verify compares all other files",
            )
        found[match["path"]] = match["sha256"]
    return found


def require_unchanged(folder: Path, name: str, data: bytes) -> None:
    """Raises IntegrityError if the folder is finished and its file had other bytes then."""
    listed = read_checksums(folder)
    if listed is not None and listed.get(name) != sha256_bytes(data):
        raise IntegrityError(
            f"{folder / name} was changed after the run ended",
            value=f"sha256 {sha256_bytes(data)[:12]}…",
            allowed=f"sha256 {listed.get(name, 'none')[:12]}…, in {FILE}",
            next_step="restore it; stack inspect RUN --verify compares all files",
        )


def changed(folder: Path, paths: Iterable[str]) -> Iterator[str]:
    """What differs from SHA256SUMS, as messages: changed, missing and unlisted files. `paths` are
    those that are there and must be listed.
    """
    listed = read_checksums(folder) or {}
    present = set(paths)
    for name in sorted(listed.keys() | present):
        if name not in listed:
            yield f"{folder / name} is not listed in {FILE}"
        elif name not in present:
            yield f"{folder / name} is missing"
        else:
            try:
                found = sha256_file(folder / name)
            except OSError as e:
                yield f"{folder / name} cannot be read: {e}"
                continue
            if found != listed[name]:
                yield f"{folder / name} was changed after the run ended"

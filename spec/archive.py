"""The archive: an append-only list of records and large series that were removed from the tree, and
their files in git history.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, BinaryIO, TypeVar

from pydantic import Field, model_validator

from stackproof.spec.canonical import canonical_json, parse_strict, sha256_bytes
from stackproof.spec.errors import IntegrityError, NoHistory
from stackproof.spec.files import read_bytes
from stackproof.spec.gates import Frozen
from stackproof.spec.git import MAX_BYTES, require_readable, run_git, started, too_large
from stackproof.spec.records import HEX64
from stackproof.spec.tables import validated

FILE = "archive.jsonl"
METADATA = "metadata.json"
READS_NO_FILE = frozenset("cat-file log ls-files ls-tree rev-list rev-parse tag".split())
READS_FILES = frozenset(
    "-p -u --patch -m --modified -o -d --filters --textconv --ext-diff -M -C --find-renames "
    "--find-copies --follow --use-mailmap".split()
)
SIZED = re.compile(rb"[0-9a-f]{40,64} [a-z]+ ([0-9]+)\n")
BLOCK, BLOCK_OF_SERIES = 256, 8  # files that one git process reads: few processes, little memory
BLOCK_BYTES = 32 * 2**20  # no further file is read once that many are
Taken = TypeVar("Taken")


class Kept(Frozen):
    """A line of an append-only file."""

    def to_line(self) -> bytes:
        """Canonical JSON, with its newline."""
        return canonical_json(self.model_dump()) + b"\n"


Line = TypeVar("Line", bound=Kept)


class Archived(Kept):
    """One line: a record, a commit that holds its folder, and the sha256 of each archived file.

    The commit is the last one that changed the folder before the files left the tree. A line with
    metadata.json archives the whole record; a line without it archives series of a record that
    stays.
    """

    record: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    files: dict[str, Annotated[str, Field(pattern=HEX64)]]

    @model_validator(mode="after")
    def _plain_names(self) -> "Archived":
        if not self.files:
            raise ValueError(f"{self.record} lists no file")
        names = (self.record, *self.files)
        if bad := [n for n in names if not n.isprintable() or "/" in n or n[:1] in ("", ".")]:
            raise ValueError(f"{bad[0]!r} is not a plain name")
        return self

    @property
    def whole(self) -> bool:
        """Whether the record itself is archived, not only series of it."""
        return METADATA in self.files

    def place(self, name: str) -> str:
        """The argument of `History.read` for a file of the record."""
        return f"{self.commit}:./{self.record}/{name}"


def complete_lines(path: Path) -> list[bytes]:
    """Lines of an append-only file without their newline; none if it does not exist.
    Raises IntegrityError if the file cannot be read or its last line is incomplete.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise IntegrityError(f"{path} cannot be read: {e}") from e
    if data and not data.endswith(b"\n"):
        raise IntegrityError(
            f"{path} ends in the middle of a line, as a power failure leaves it",
            value=data[data.rfind(b"\n") + 1 :][:80],
            next_step="stack evidence repair removes that line; then repeat what wrote it",
        )
    return data.split(b"\n")[:-1]


def canonical_models(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of an append-only file as models; none if it does not exist. Raises IntegrityError
    naming the first line that is not valid or not canonical.
    """
    found = []
    for number, text in enumerate(complete_lines(path), start=1):
        where = f"{path}:{number}"
        line = validated(kind, parse_strict(text, origin=where), origin=where)
        if line.to_line() != text + b"\n":
            raise IntegrityError(f"{where} is not canonical JSON")
        found.append(line)
    return found


def blob_id(content: BinaryIO, n_bytes: int, length: int = 40) -> str:
    """The id in git of a file with this content; 64 digits long in a sha256 repository."""
    digest = (hashlib.sha256 if length == 64 else hashlib.sha1)(b"blob %d\0" % n_bytes)
    while block := content.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class History:
    """The commits of the git repository that tracks a folder, which may be foreign."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._is_readable = False
        self._refused: IntegrityError | None = None

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes | None:
        """Output of a git command that reads only objects and the index; None if it failed or git
        is absent. Raises ValueError for a command that could start a program of the repository,
        IntegrityError as `run_git` and `require_readable`.
        """
        if arguments[0] not in READS_NO_FILE or READS_FILES.intersection(arguments):
            raise ValueError(f"git {' '.join(arguments)} may start a program of the repository")
        if arguments[0] == "log":  # without .gitmodules of the work tree
            arguments = ("log", "--ignore-submodules", *arguments[1:])
        with self._within_bounds():
            return run_git(self.folder, *arguments, stdin=stdin)

    @contextmanager
    def _within_bounds(self) -> Iterator[None]:
        """Repeats the first refusal of the repository, without another wait."""
        if self._refused is not None:
            raise self._refused
        try:
            if not self._is_readable:
                require_readable(self.folder)
                self._is_readable = True
            yield
        except IntegrityError as e:
            self._refused = e
            raise

    def files(self, commit: str, *paths: str) -> dict[str, str]:
        """The regular files below the folder, or below paths in it, at a commit: path in the folder
        to blob id. Empty if the commit cannot be read.
        """
        found = {}
        listed = self.git("ls-tree", "-r", "-z", commit, "--", *(paths or (".",))) or b""
        for line in listed.split(b"\0")[:-1]:
            facts, _, path = line.partition(b"\t")
            mode, _, blob = facts.decode().split()
            if mode.startswith("100"):
                found[os.fsdecode(path)] = blob
        return found

    @cached_property
    def complete(self) -> bool:
        """Whether git tracks files of the folder and holds their whole history."""
        shallow = self.git("rev-parse", "--is-shallow-repository")
        return bool(self.git("ls-files", ".")) and shallow == b"false\n"

    @cached_property
    def commits(self) -> frozenset[str]:
        """HEAD and those of its ancestors that this clone holds."""
        return frozenset((self.git("rev-list", "HEAD") or b"").decode().split())

    def read(self, places: Sequence[str]) -> Iterator[bytes | None]:
        """Contents of each `commit:./path`, one after the other from one git process; None for a
        file that is missing.

        Raises IntegrityError before it reads a file larger than MAX_BYTES, and as `git`.
        """

        def whole(place: str, out: IO[bytes], size: int) -> bytes:
            if size > MAX_BYTES:
                raise too_large(f"{place} in the git history of {self.folder}", size)
            return out.read(size)

        return self._each(places, whole)

    def search(
        self, places: Sequence[str], pattern: re.Pattern[bytes], longest: int
    ) -> Iterator[set[bytes] | None]:
        """The texts in each file that match a pattern, of at most `longest` bytes; None for a file
        that is missing. Files of any size are read in blocks. A text in two blocks is found whole,
        and a part of it may be found as well. Raises IntegrityError as `git`.
        """

        def matches(place: str, out: IO[bytes], size: int) -> set[bytes]:
            texts, window = set(), b""
            while size > 0 and (block := out.read(min(size, BLOCK_BYTES))):
                size -= len(block)
                window = window[-longest:] + block
                texts.update(match[0] for match in pattern.finditer(window))
            return texts

        return self._each(places, matches)

    def _each(
        self, places: Sequence[str], take: Callable[[str, IO[bytes], int], Taken]
    ) -> Iterator[Taken | None]:
        """What `take` makes of each place, the stream and the size of the content in bytes, all of
        which it reads.
        """
        n_read, given = 0, "\n".join((*places, "")).encode()
        batch = started(self.folder, "cat-file", "--batch", stdin=given)
        with self._within_bounds(), suppress(OSError), batch as (_, out):
            for place in places:
                head, data = out.readline(), None
                if found := SIZED.fullmatch(head):
                    data = take(place, out, int(found[1]))
                    head = out.read(1)
                if not head:  # git has ended
                    break
                yield data
                n_read += 1
        yield from [None] * (len(places) - n_read)


class Archive:
    """The list `<directory>/archive.jsonl`, and the files listed in it."""

    def __init__(self, directory: Path):
        self.path = Path(directory) / FILE
        self.history = History(Path(directory))
        # the block of records and the block of series that were read last
        self._read: dict[bool, dict[tuple[str, str], bytes | None]] = {True: {}, False: {}}

    @cached_property
    def lines(self) -> list[Archived]:
        """All lines; empty if the list does not exist. Raises IntegrityError naming line and
        field.
        """
        return canonical_models(self.path, Archived)

    @cached_property
    def by_record(self) -> dict[str, Archived]:
        """The lines of records that are archived as a whole."""
        return {line.record: line for line in self.lines if line.whole}

    @cached_property
    def by_file(self) -> dict[tuple[str, str], Archived]:
        """The line of each archived file, by record and file name."""
        return {(line.record, name): line for line in self.lines for name in line.files}

    def __contains__(self, record_id: str) -> bool:
        return record_id in self.by_record

    def read(self, record_id: str, name: str = METADATA) -> bytes:
        """An archived file, from the commit that its line names.

        Raises NoHistory if the history is incomplete and lacks the commit. Raises IntegrityError if
        the file is not in the list, or if a complete history lacks it or holds other bytes.
        """
        line = self.by_file.get((record_id, name))
        if line is None:
            raise IntegrityError(f"{self.path} does not list {record_id}/{name}")
        if line.commit not in self.history.commits:
            if not self.history.complete:
                raise NoHistory(
                    f"{record_id}/{name} is archived, and this checkout lacks the history that "
                    "holds it",
                    value=f"commit {line.commit}",
                    next_step="git fetch --unshallow, or clone the repository with its history",
                )
            raise IntegrityError(
                f"{self.path}: {record_id}/{name} is archived at commit {line.commit[:12]}, which "
                "is not an ancestor of HEAD"
            )
        data = self._content(record_id, name)
        if data is None or sha256_bytes(data) != line.files[name]:
            raise IntegrityError(
                f"{self.path}: {record_id}/{name} at commit {line.commit[:12]} is missing or not "
                "what was archived"
            )
        return data

    def _content(self, record_id: str, name: str) -> bytes | None:
        """A file from history, read together with some that follow it in the list."""
        wanted, kind = (record_id, name), name == METADATA
        if wanted not in self._read[kind]:
            files, first = self._files[kind], self._place[wanted]
            block = files[first : first + (BLOCK if kind else BLOCK_OF_SERIES)]
            places = [self.by_file[file].place(file[1]) for file in block]
            found, n_bytes = {}, 0
            for file, data in zip(block, self.history.read(places)):
                found[file] = data
                n_bytes += len(data or b"")
                if n_bytes > BLOCK_BYTES:
                    break
            self._read[kind] = found
        return self._read[kind][wanted]

    @cached_property
    def _files(self) -> dict[bool, list[tuple[str, str]]]:
        """The listed files: records under True, series under False."""
        kinds = (True, False)
        return {k: [f for f in self.by_file if (f[1] == METADATA) is k] for k in kinds}

    @cached_property
    def _place(self) -> dict[tuple[str, str], int]:
        """The number of each listed file among its kind."""
        return {file: n for files in self._files.values() for n, file in enumerate(files)}

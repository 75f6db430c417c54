"""The evidence ledger: an append-only hash chain, one canonical JSON line per accepted record."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from pydantic import Field

from stackproof.spec.archive import METADATA, Archive, Archived, complete_lines
from stackproof.spec.canonical import canonical_json, parse_strict, sha256_bytes
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import append_durably, read_bytes
from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64, RECORD_ID, Record, Series, parse_record
from stackproof.spec.tables import validated

GENESIS = "0" * 64


class Entry(Frozen):
    """One line: sequence number from 0, record id, sha256 of its metadata.json, and sha256 of the
    bytes of the previous line.
    """

    seq: int = Field(ge=0)
    record: str = Field(pattern=RECORD_ID)
    sha256: str = Field(pattern=HEX64)
    prev: str = Field(pattern=HEX64)
    supersedes: str | None = None

    def to_line(self) -> bytes:
        return canonical_json(self.model_dump(exclude_none=True))


class Records(Mapping[str, Record]):
    """Accepted records by id, in ledger order. Each access reads, hashes and parses the record, and
    only the last one is kept: a ledger of many records does not fit into memory.

    An access raises IntegrityError as `Ledger.read`.
    """

    def __init__(self, ledger: "Ledger", entries: Iterable[Entry]):
        self._ledger, self._entries = ledger, {e.record: e for e in entries}
        self._last: Record | None = None

    def __getitem__(self, record_id: str) -> Record:
        if self._last is None or self._last.id != record_id:
            self._last = self._ledger.read(self._entries[record_id])
        return self._last

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, record_id: object) -> bool:
        return record_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)


def _is_own_file(path: Path) -> bool:
    """Whether a path is a regular file, and neither it nor its folder is a link."""
    try:
        folder = os.lstat(os.path.dirname(path)).st_mode
        return stat.S_ISREG(os.lstat(path).st_mode) and not stat.S_ISLNK(folder)
    except OSError:
        return False


class Ledger:
    """The chain in `<directory>/ledger.jsonl`. Its records are in folders beside it or archived."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.path = self.directory / "ledger.jsonl"
        self._parsed: tuple[list[bytes], list[Entry]] = [], []

    @cached_property
    def archive(self) -> Archive:
        return Archive(self.directory)

    def lines(self) -> list[bytes]:
        """Raw lines without their newline; empty if the ledger does not exist."""
        return complete_lines(self.path)

    def entries(self) -> list[Entry]:
        """All entries, parsed but not yet verified."""
        lines = self.lines()
        if lines != self._parsed[0]:
            parsed = [self._parse(line, number) for number, line in enumerate(lines, start=1)]
            self._parsed = lines, parsed
        return list(self._parsed[1])

    def _parse(self, line: bytes, number: int) -> Entry:
        where = f"{self.path}:{number}"
        value = parse_strict(line, origin=where)
        return validated(Entry, value, origin=where, next_step="git checkout the ledger")

    @property
    def head(self) -> str:
        """sha256 of the last line, or the genesis hash."""
        lines = self.lines()
        return sha256_bytes(lines[-1]) if lines else GENESIS

    def record_path(self, record_id: str) -> Path:
        """The folder of a record. Raises IntegrityError for an id that is a path."""
        if "/" in record_id or "\\" in record_id or record_id.startswith("."):
            raise IntegrityError(f"record id {record_id!r} is not a plain name")
        return self.directory / record_id / METADATA

    def content(self, record_id: str, name: str = METADATA) -> bytes:
        """A file of a record, from its folder or, if the file is archived, from git history.

        Raises IntegrityError if the file is in neither, NoHistory if this checkout lacks the
        history.
        """
        path = self.record_path(record_id)
        if name != METADATA:
            path = path.with_name(name)
        archived = (record_id, name) in self.archive.by_file
        if archived and not path.exists():
            return self.archive.read(record_id, name)
        if not _is_own_file(path):
            unlisted = "" if archived else f", and {self.archive.path.name} does not list it"
            raise IntegrityError(f"{path} is missing or not a regular file{unlisted}")
        try:
            return read_bytes(path)
        except OSError as e:
            raise IntegrityError(f"{path} cannot be read: {e}") from e

    def read(self, entry: Entry) -> Record:
        """The record of an entry, hashed and parsed from the same bytes.
        Raises IntegrityError on any mismatch.
        """
        data = self.content(entry.record)
        if sha256_bytes(data) != entry.sha256:
            raise IntegrityError(
                f"record {entry.record} was changed after it was accepted",
                value=(
                    f"{self.record_path(entry.record)}: sha256 {sha256_bytes(data)[:12]}…, "
                    f"ledger line {entry.seq + 1} holds {entry.sha256[:12]}…"
                ),
                next_step=(
                    "restore it from git; a wrong record is superseded by a new one, never edited"
                ),
            )
        record = parse_record(data, origin=str(self.record_path(entry.record)))
        if record.id != entry.record:
            raise IntegrityError(
                f"the folder {entry.record} holds the record {record.id}",
                allowed="the record that the ledger names",
            )
        return record

    def series(self, record: Record, series: Series) -> bytes:
        """The bytes of a file beside a record. Raises IntegrityError if it is missing, changed or
        not a plain file.
        """
        if "/" in series.path or series.path.startswith("."):
            raise IntegrityError(f"series {series.path} of record {record.id} is not a plain file")
        data = self.content(record.id, series.path)
        if sha256_bytes(data) != series.sha256:
            raise IntegrityError(
                f"{record.id}/{series.path} does not match the hash in its record",
                next_step="restore it from git",
            )
        return data

    def accepted(self) -> Records:
        """All accepted records in ledger order, each verified by hash when it is read.

        Omits archived records that this checkout cannot read: see `unread`.
        """
        return self._readable(self.entries())

    def records(self) -> Records:
        """Accepted records that are not superseded by a later entry."""
        entries = self.entries()
        gone = {e.supersedes for e in entries}
        return self._readable([e for e in entries if e.record not in gone])

    def _readable(self, entries: list[Entry]) -> Records:
        unread = {r for r in self.unread() if not self.record_path(r).exists()}
        return Records(self, (e for e in entries if e.record not in unread))

    def unread(self) -> list[str]:
        """Archived records that cannot be verified, because the checkout lacks the history."""
        return [line.record for line in self._out_of_reach() if line.whole]

    def unread_series(self) -> list[tuple[str, str]]:
        """Archived series, as (record, file), that this checkout cannot verify, of records that
        are in the tree.
        """
        return [(x.record, name) for x in self._out_of_reach() if not x.whole for name in x.files]

    def _out_of_reach(self) -> list[Archived]:
        """Lines whose commit this checkout lacks; none where the history is complete."""
        archive = self.archive
        if archive.history.complete:
            return []
        return [line for line in archive.lines if line.commit not in archive.history.commits]

    def problems(self) -> list[tuple[int, str]]:
        """Defects of the chain as (line number, message): sequence, previous hash, canonical form,
        unknown or duplicate ids.
        """
        found, previous, seen = [], GENESIS, set()
        entries = self.entries()
        for number, (line, entry) in enumerate(zip(self.lines(), entries, strict=True), start=1):
            if entry.to_line() != line:
                found.append((number, "line is not canonical JSON"))
            if entry.seq != number - 1:
                found.append(
                    (
                        number,
                        (
                            f"sequence number {entry.seq}, expected {number - 1}: a line was "
                            "removed or inserted"
                        ),
                    )
                )
            if entry.prev != previous:
                found.append((number, "previous-line hash does not match: the ledger was edited"))
            if entry.record in seen:
                found.append((number, f"record {entry.record} was accepted twice"))
            if entry.supersedes and entry.supersedes not in seen:
                found.append(
                    (number, f"supersedes {entry.supersedes}, which is not earlier in the ledger")
                )
            seen.add(entry.record)
            previous = sha256_bytes(line)
        return found

    def append(self, record: Record, *, supersedes: str | None = None) -> Entry:
        """Append a record that is already at `<directory>/<id>/metadata.json`, durably. Other
        processes must not write to the ledger meanwhile.

        Raises IntegrityError as `next_entry`, OSError if the line cannot be written; the ledger is
        then as before.
        """
        entry = self.next_entry(record, supersedes=supersedes)
        append_durably(self.path, entry.to_line() + b"\n")
        return entry

    def next_entry(self, record: Record, *, supersedes: str | None = None) -> Entry:
        """The line of a record that is to be appended. Raises IntegrityError if the chain is
        broken, or if the record cannot follow.
        """
        if problems := self.problems():
            raise IntegrityError(
                f"{self.path}:{problems[0][0]}: {problems[0][1]}",
                next_step="repair the ledger from git before adding to it",
            )
        entries = self.entries()
        if known := next((e for e in entries if e.record == record.id), None):
            same = known.sha256 == record.sha256
            raise IntegrityError(
                f"record {record.id} is already in the ledger{'' if same else ', as another one'}",
                allowed="each record once; a resumed run keeps the id of its record",
                next_step=f"stack evidence show {record.id} shows it"
                + ("" if same else "; stack evidence rerun gives the run a record of its own"),
            )
        if supersedes and not any(e.record == supersedes for e in entries):
            raise IntegrityError(f"cannot supersede {supersedes}: it is not in the ledger")
        return Entry(
            seq=len(entries),
            record=record.id,
            sha256=record.sha256,
            prev=self.head,
            supersedes=supersedes,
        )

"""Accepts records into the ledger, verifies and compares them."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from stackproof.evidence.file_lock import file_lock
from stackproof.spec import IN_CHECKOUT, ROOT, pins
from stackproof.spec.archive import FILE, METADATA
from stackproof.spec.canonical import is_canonical_line, leaves, sha256_bytes
from stackproof.spec.errors import IntegrityError, NoHistory, UsageError
from stackproof.spec.files import (
    create_durably,
    end_last_line,
    read_bytes,
    remedy,
    remove_folder,
    remove_leftovers,
    require_own,
    sync,
)
from stackproof.spec.gates import load_spec
from stackproof.spec.ledger import Entry, Ledger
from stackproof.spec.records import Record, Series, left_out, read_record
from stackproof.spec.series import parse_series

ASIDE = ".adding-"  # a record that is being written; hidden, so that nothing takes it for a record
MAX_ARTEFACT_BYTES = 4 * 2**20
MAGIC_OF_WEIGHTS = (
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x80\x03",
    b"\x80\x04",
    b"\x80\x05",
    b"GGUF",
    b"\x89HDF",
)


def default_directory() -> Path:
    """`evidence/` of the working directory; if it does not exist, that of the checkout."""
    here = Path.cwd() / "evidence"
    return ROOT / "evidence" if IN_CHECKOUT and not here.is_dir() else here


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """The evidence folder, for this process alone; waits for others. What a killed `accept` left is
    removed.

    Raises IntegrityError if the folder is a link, or if it, or a file in it, cannot be written.
    """
    try:
        require_own(directory)
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
        with file_lock(directory, "command", wait=True):
            for left in directory.glob(f"{ASIDE}*"):
                remove_folder(left)
            remove_leftovers(directory)
            yield
    except OSError as e:
        raise IntegrityError(
            f"{directory} could not be written: {e}",
            allowed="a folder of regular files, with room on its disk",
            next_step=f"{remedy(e)}, then give the same command again",
        ) from e


def accept(
    run_dir: Path, directory: Path, *, supersedes: str | None = None
) -> tuple[Record, Entry]:
    """Copy a run's record and its series into the evidence folder and append the ledger line.

    The folder of the record is written aside, synced and renamed before the line. A process that is
    killed in between leaves a folder without a line, which the next call for this run takes up.
    Raises IntegrityError if the record is invalid, has series that do not match their hashes or
    their form, has no commit, is of a run that was stopped, or lacks a gate that its kind and
    configuration require.
    """
    record = read_record(run_dir / METADATA)
    _require_complete(record)
    files = {METADATA: record.to_bytes()}
    files |= {series.path: _series(run_dir, series) for series in record.series}
    with writing(directory):
        ledger = Ledger(directory)
        ledger.next_entry(record, supersedes=supersedes)
        target = directory / record.id
        if taken_up := os.path.lexists(target):
            _require_same(target, files, run_dir)
        try:
            if not taken_up:
                _write_folder(target, files)
            sync(directory)
            return record, ledger.append(record, supersedes=supersedes)
        except BaseException:
            with suppress(OSError):
                if not taken_up and not _is_named(record.id, ledger.path):
                    remove_folder(target)
            raise


def _is_named(record_id: str, path: Path) -> bool:
    """Whether the ledger names a record, be it in an incomplete line. Raises OSError."""
    return path.exists() and record_id.encode() in read_bytes(path)


def _require_complete(record: Record) -> None:
    """Raises IntegrityError for a record without a commit, of a run that was stopped, or without a
    gate of its kind.
    """
    if record.code.commit == "unknown":
        raise IntegrityError(
            f"record {record.id} has no commit, so it cannot be re-run",
            next_step="run from a git checkout",
        )
    if record.status in ("preempted", "interrupted"):
        raise IntegrityError(
            f"record {record.id} is of a run that was stopped",
            value=record.status,
            allowed="the record of a run that ended; that of a resumed run keeps its id",
            next_step="stack train --resume RUN, then add it",
        )
    spec = load_spec()
    if record.spec.sha256 == spec.sha256 and (absent := left_out(spec, record)):
        raise IntegrityError(
            f"record {record.id} lacks gate {absent[0]}",
            value=f"{len(absent)} gate(s) absent",
            allowed="a run with every gate of its kind installed",
            next_step=("run its verb again; a gate cannot be omitted, only waived with a reason"),
        )


def _series(run_dir: Path, series: Series) -> bytes:
    """The bytes of a small text beside the record, read once: those that are hashed are those that
    are copied. Raises IntegrityError.
    """
    name, path = series.path, run_dir / series.path
    if "/" in name or name.startswith(".") or path.is_symlink() or not path.is_file():
        raise IntegrityError(f"series {name} is not a plain file beside the record")
    try:
        data = read_bytes(path, MAX_ARTEFACT_BYTES)
    except OSError as e:
        too_large = e.errno == errno.EFBIG
        raise IntegrityError(
            f"series {name} cannot be taken into git: {e}",
            allowed=f"a text of at most {MAX_ARTEFACT_BYTES} bytes",
            next_step=(
                "repeat the run with a larger train.log_every, which logs fewer lines"
                if too_large
                else f"{remedy(e)}, then give the same command again"
            ),
        ) from e
    if data.startswith(MAGIC_OF_WEIGHTS):
        raise IntegrityError(f"series {name} looks like a weight file; weights never enter git")
    if sha256_bytes(data) != series.sha256:
        raise IntegrityError(
            f"series {name} was changed after the run",
            next_step="run again; a record is never edited",
        )
    parse_series(data, name, origin=str(path))
    return data


def _require_same(target: Path, files: Mapping[str, bytes], run_dir: Path) -> None:
    """Raises IntegrityError unless a folder without a ledger line holds exactly these files."""
    if not target.is_symlink() and target.is_dir():
        names = {path.name for path in target.iterdir()}
        if names == files.keys() and all(_content(target / n) == files[n] for n in names):
            return
    raise IntegrityError(
        f"{target} already exists, has no ledger line, and is not the record of {run_dir}",
        allowed="a folder that a killed stack evidence add left, with the same files",
        next_step=f"compare the two; remove {target}, then give the same command again",
    )


def _content(path: Path) -> bytes:
    """The bytes of a regular file; empty for anything else."""
    try:
        return b"" if path.is_symlink() else read_bytes(path)
    except OSError:
        return b""


def _write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder aside, durably, and rename it. Raises OSError, and leaves nothing then."""
    aside = target.with_name(f"{ASIDE}{target.name}")
    try:
        aside.mkdir()
        for name, data in files.items():
            create_durably(aside / name, data)
        sync(aside)
        os.rename(aside, target)
    except BaseException:
        with suppress(OSError):
            remove_folder(aside)
        raise


def repair(directory: Path) -> dict[str, bytes]:
    """Remove the incomplete last line of the ledger and of the archive list, as a power failure
    leaves it. A whole line that lacks its newline, as an editor may leave it, gets one. Returns
    what was removed, by file.

    Raises IntegrityError as `writing`.
    """
    with writing(directory):
        paths = (Ledger(directory).path, directory / FILE)
        removed = {path.name: end_last_line(path, is_canonical_line) for path in paths}
    return {name: line for name, line in removed.items() if line}


def verify(directory: Path) -> list[str]:
    """Problems of a ledger, its records and pins, as messages; empty if all hashes, the chain and
    the signatures hold.

    Archived files that this checkout cannot read are not included: `Ledger.unread` and
    `Ledger.unread_series` list them.
    """
    ledger = Ledger(directory)
    try:
        found = [f"{ledger.path}:{line}: {message}" for line, message in ledger.problems()]
        entries, archived = ledger.entries(), ledger.archive.lines
    except IntegrityError as e:
        return [str(e)]
    for entry in entries:
        where = f"{ledger.path}:{entry.seq + 1}"
        found += (f"{where}: {problem}" for problem in _problems_of(ledger, entry))
    try:
        pinned = pins.pin_problems(directory, ledger.lines())
        found += [f"{directory / pins.FILE}:{line}: {problem}" for line, problem in pinned]
    except IntegrityError as e:
        found.append(str(e))
    known = {e.record for e in entries}
    found += [
        f"{ledger.archive.path}: {a.record} is archived without a ledger line"
        for a in archived
        if a.record not in known
    ]
    found += [
        f"{p.parent}: not in the ledger; stack evidence add RUN_DIR takes it up, or remove it"
        for p in directory.glob(f"[!.]*/{METADATA}")
        if p.parent.name not in known
    ]
    return found


def _problems_of(ledger: Ledger, entry: Entry) -> Iterator[str]:
    """Problems of a record and its series; none of what this checkout cannot read."""
    try:
        record = ledger.read(entry)
    except NoHistory:
        return
    except IntegrityError as e:
        yield str(e)
        return
    for series in record.series:
        try:
            ledger.series(record, series)
        except NoHistory:
            continue
        except IntegrityError as e:
            yield str(e)


def is_run(path: Path) -> bool:
    """Whether a path is a folder with a record."""
    return (path / METADATA).is_file()


def find(directory: Path, record_id: str) -> Record:
    """A record by id, unique prefix, or run directory.
    Raises UsageError for no or several matches.
    """
    if is_run(Path(record_id)):
        return read_record(Path(record_id) / METADATA)
    entries = [e for e in Ledger(directory).entries() if e.record.startswith(record_id)]
    if len(entries) != 1:
        known = ", ".join(e.record for e in Ledger(directory).entries()[-6:])
        raise UsageError(
            f"{record_id!r} matches {len(entries) or 'no'} record(s) of {directory}",
            allowed=known or "the ledger is empty",
            next_step="stack evidence show ID with a full id, or the path of a run directory",
        )
    return Ledger(directory).read(entries[0])


def differences(a: Record, b: Record) -> list[dict]:
    """Fields in which two records differ, flattened to dotted keys, without ids and times."""
    left, right = _flatten(a), _flatten(b)
    keys = [k for k in sorted(left.keys() | right.keys()) if left.get(k) != right.get(k)]
    return [{"key": k, "a": left.get(k), "b": right.get(k)} for k in keys]


def _flatten(record: Record) -> dict[str, object]:
    skip = {"id", "started_at", "finished_at", "wall_s", "device_s", "series", "outputs"}
    tree = {k: v for k, v in record.model_dump(by_alias=True, mode="json").items() if k not in skip}
    tree["gates"] = {g["id"]: g["verdict"] for g in tree["gates"]}
    return dict(leaves(tree))

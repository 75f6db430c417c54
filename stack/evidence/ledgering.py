"""Accepts records into the ledger and compares them."""

import shutil
from pathlib import Path

from stackproof.spec import IN_CHECKOUT, ROOT
from stackproof.spec.canonical import leaves, sha256_file
from stackproof.spec.errors import IntegrityError, NoHistory
from stackproof.spec.gates import load_spec
from stackproof.spec.ledger import Entry, Ledger
from stackproof.spec.records import Record, left_out, read_record

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


def accept(
    run_dir: Path, directory: Path, *, supersedes: str | None = None
) -> tuple[Record, Entry]:
    """Copy a run's record and its series into the evidence folder and append the ledger line.

    Raises IntegrityError if the record is invalid, has series that do not match their hashes, has
    no commit, or lacks a gate that its kind and configuration require.
    """
    record = read_record(run_dir / "metadata.json")
    if record.code.commit == "unknown":
        raise IntegrityError(
            f"record {record.id} has no commit, so it cannot be re-run",
            next_step="run from a git checkout",
        )
    spec = load_spec()
    if record.spec.sha256 == spec.sha256 and (absent := left_out(spec, record)):
        raise IntegrityError(
            f"record {record.id} lacks gate {absent[0]}",
            value=f"{len(absent)} gate(s) absent",
            allowed="a run with every gate of its kind installed",
            next_step=("run its verb again; a gate cannot be omitted, only waived with a reason"),
        )
    files = [(run_dir / s.path, s.path, s.sha256) for s in record.series]
    for path, name, sha256 in files:
        _require_small_text(path, name, sha256)
    target = directory / record.id
    if target.exists():
        raise IntegrityError(
            f"{target} already exists", next_step="a record can be added only once"
        )
    target.mkdir(parents=True)
    try:
        (target / "metadata.json").write_bytes(record.to_bytes())
        for path, name, _ in files:
            shutil.copyfile(path, target / name)
        return record, Ledger(directory).append(record, supersedes=supersedes)
    except BaseException:
        shutil.rmtree(target)
        raise


def _require_small_text(path: Path, name: str, sha256: str) -> None:
    if "/" in name or name.startswith(".") or path.is_symlink() or not path.is_file():
        raise IntegrityError(f"series {name} is not a plain file beside the record")
    if path.stat().st_size > MAX_ARTEFACT_BYTES:
        raise IntegrityError(
            f"series {name} is too large for git",
            value=f"{path.stat().st_size} bytes",
            allowed=f"{MAX_ARTEFACT_BYTES}",
        )
    if path.open("rb").read(4).startswith(MAGIC_OF_WEIGHTS):
        raise IntegrityError(f"series {name} looks like a weight file; weights never enter git")
    if sha256_file(path) != sha256:
        raise IntegrityError(
            f"series {name} was changed after the run",
            next_step="run again; a record is never edited",
        )


def verify(directory: Path) -> list[str]:
    """Problems of a ledger and its records, as messages; empty if all hashes and the chain hold.

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
        try:
            record = ledger.read(entry)
        except NoHistory:
            continue
        except IntegrityError as e:
            found.append(str(e))
            continue
        for series in record.series:
            try:
                ledger.series(record, series)
            except NoHistory:
                continue
            except IntegrityError as e:
                found.append(str(e))
    known = {e.record for e in entries}
    found += [
        f"{a.record}: archived without a ledger line" for a in archived if a.record not in known
    ]
    found += [
        f"{p.parent}: not in the ledger"
        for p in directory.glob("*/metadata.json")
        if p.parent.name not in known
    ]
    return found


def find(directory: Path, record_id: str) -> Record:
    """A record by id, unique prefix, or run directory.
    Raises IntegrityError for no or several matches.
    """
    if (Path(record_id) / "metadata.json").is_file():
        return read_record(Path(record_id) / "metadata.json")
    entries = [e for e in Ledger(directory).entries() if e.record.startswith(record_id)]
    if len(entries) != 1:
        known = ", ".join(e.record for e in Ledger(directory).entries()[-6:])
        raise IntegrityError(
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

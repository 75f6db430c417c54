"""Archives records and large series that are not needed in the tree; git history keeps them."""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stackproof.evidence.ledgering import verify, writing
from stackproof.spec.archive import BLOCK, FILE, METADATA, Archive, Archived, History, blob_id
from stackproof.spec.canonical import sha256_bytes, sha256_file
from stackproof.spec.coverage import gate_state
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import append_durably, holds, open_regular, require_own
from stackproof.spec.gates import Spec, load_spec
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import Record
from stackproof.spec.registry import read_registry

LARGE_SERIES_BYTES = 256 * 1024
RECORD_ID = r"[a-z]{1,32}-[0-9]{8}T[0-9]{6}Z(-[0-9a-f]{8})?"
CITED, MAX_CITED_BYTES = re.compile(RECORD_ID.encode()), 32 + 17 + 9


@dataclass(frozen=True)
class Plan:
    """Records that stay, each with the reason, and the lines and size of the files to archive."""

    kept: dict[str, str]
    lines: tuple[Archived, ...]
    n_bytes: int


def archive(directory: Path) -> Plan:
    """Append the lines of the files to archive, durably, then remove the files. Commits nothing.
    If an earlier call was killed before its last removal, only finish that one.

    Raises IntegrityError if `plan` does, or if a file cannot be written or removed.
    """
    with writing(directory):
        made, listed = plan(directory), Archive(directory).lines
        if new := [line.to_line() for line in made.lines if line not in listed]:
            append_durably(directory / FILE, b"".join(new))
        for line in made.lines:
            folder = directory / line.record
            require_own(folder)
            for name in line.files:
                (folder / name).unlink(missing_ok=True)
            if line.whole:
                with suppress(FileNotFoundError):
                    folder.rmdir()
    return made


def plan(directory: Path) -> Plan:
    """Plan an `archive`, or the end of one that was killed.

    Raises IntegrityError if the clone lacks history, if the folder differs from its commit, if the
    evidence does not verify, or if history lacks a file to archive.
    """
    history, ledger = History(directory), Ledger(directory)
    if not history.complete:
        raise IntegrityError(
            f"{directory} is not tracked by git, or the clone is shallow",
            next_step="archive in a clone with full history, where every record can be read back",
        )
    if begun := _unfinished(directory, ledger.archive):
        return begun
    if (changed := _changed_file(history)) is not None:
        raise IntegrityError(
            f"{directory} differs from its commit",
            value=changed,
            next_step="commit or restore it first; only committed records can be archived",
        )
    if problems := verify(directory):
        raise IntegrityError(f"the evidence does not verify: {problems[0]}")
    records = dict(ledger.accepted())
    kept = kept_records(
        load_spec(),
        records,
        superseded={e.supersedes for e in ledger.entries()},
        archived=ledger.archive.by_record,
        released={
            record: model.id
            for model in read_registry(directory / "registry.toml")
            for record in model.records.values()
        },
        cited=citations(directory, records),
    )
    commits = last_commits(history)
    lines, n_bytes = [], 0
    for name in records:
        files = _files_to_archive(directory / name, whole=name not in kept)
        if files:
            lines.append(_line(directory / name, files, commits))
            n_bytes += sum(file.stat().st_size for file in files)
    _require_readable(history, lines)
    return Plan({n: kept[n] for n in records if n in kept}, tuple(lines), n_bytes)


def _changed_file(history: History) -> str | None:
    """The first file of a folder that is not as its commit holds it, by hash; None if all are.

    git does not compare: it would run the filters that the repository names. Hidden files beside
    the records, such as the lock, count only if they are committed.
    """
    folder, committed = history.folder, history.files("HEAD")
    present = {
        path.relative_to(folder).as_posix()
        for place, folders, names in os.walk(folder)
        for path in (Path(place, name) for name in (*names, *folders))
        if path.is_symlink() or not path.is_dir()
    }
    for path in sorted(committed.keys() | {p for p in present if not p.startswith(".")}):
        blob = committed.get(path)
        if blob is None or path not in present or (folder / path).is_symlink():
            return path
        with open_regular(folder / path) as f:
            if blob_id(f, os.fstat(f.fileno()).st_size, len(blob)) != blob:
                return path
    return None


def _unfinished(directory: Path, archive: Archive) -> Plan | None:
    """What a killed `archive` listed and did not remove; None if nothing is left of one.

    Raises IntegrityError for a listed file that is not the one in history, or that is a link or
    below one: it is not removed.
    """
    left = []
    for line in archive.lines:
        folder = directory / line.record
        if folder.is_symlink():
            raise IntegrityError(
                f"{folder} is archived, and in the tree it is a link",
                allowed="a folder; nothing is removed through a link",
                next_step=f"remove the link {folder}",
            )
        files = [folder / name for name in line.files if os.path.lexists(folder / name)]
        for file in files:
            archived = archive.read(line.record, file.name)
            if file.is_symlink() or not holds(file, archived):
                raise IntegrityError(
                    f"{file} is archived, and the file in the tree is another",
                    next_step=f"restore it from git, or remove {file}",
                )
        if files or (line.whole and folder.exists()):
            left.append((line, sum(file.stat().st_size for file in files)))
    if not left:
        return None
    return Plan({}, tuple(line for line, _ in left), sum(n_bytes for _, n_bytes in left))


def kept_records(
    spec: Spec,
    records: Mapping[str, Record],
    *,
    superseded: Collection[str] = (),
    archived: Collection[str] = (),
    released: Mapping[str, str],
    cited: Mapping[str, str],
) -> dict[str, str]:
    """Which accepted records stay in the tree, each with the reason.

    Records of released models (`released`: record to model); records cited by a file (`cited`:
    record to file); runs that did not succeed; the newest records that are sufficient for the state
    of each gate; one record of each kind; and the parents, data sets and claimed records of those
    that stay. An archived record stays archived; for a gate or a kind, records in the tree are
    preferred.
    """
    live = {name: record for name, record in records.items() if name not in superseded}
    kept = {name: f"record of {model}" for name, model in released.items() if name in records}
    kept = {name: f"named in {file}" for name, file in cited.items()} | kept
    for name, record in records.items():
        if not record.succeeded:
            kept.setdefault(name, record.status)
    before = -1
    while before != len(kept):
        before = len(kept)
        for gate_id in spec.gates:
            _keep_state(spec, gate_id, live, archived, kept)
        _keep_named(live, records, kept)
        if before == len(kept):
            _keep_one_more_kind({n: r for n, r in live.items() if n not in archived}, kept)
    return kept


def _keep_state(
    spec: Spec,
    gate_id: str,
    live: Mapping[str, Record],
    archived: Collection[str],
    kept: dict[str, str],
) -> None:
    """Keep the newest records of a gate until the kept ones give it the same state as all records.

    Order: proofs of the state, then its runs; archived records last.
    """
    of_gate = {
        name: record
        for name, record in live.items()
        if any(g.id == gate_id for g in record.gates)
        or any(k.gate == gate_id for k in record.kills)
    }
    truth = gate_state(spec, gate_id, of_gate)
    waiting = sorted(
        (name for name in of_gate if name not in kept),
        key=lambda name: (
            name not in archived,
            name in truth.kill_records,
            name in truth.run_records,
        ),
    )
    while truth.state != _state_of_kept(spec, gate_id, of_gate, kept):
        kept[waiting.pop()] = f"gives {gate_id} the state {truth.state}"


def _state_of_kept(
    spec: Spec, gate_id: str, of_gate: Mapping[str, Record], kept: Collection[str]
) -> str:
    return gate_state(spec, gate_id, {n: r for n, r in of_gate.items() if n in kept}).state


def _keep_one_more_kind(live: Mapping[str, Record], kept: dict[str, str]) -> None:
    """For the newest record of a kind without a kept record, keep one of its kind.

    This is the newest of the kind, preferably with kept parents.
    """
    kinds = {live[name].kind for name in kept if name in live}
    missing = next((r.kind for r in reversed(live.values()) if r.kind not in kinds), None)
    if of_kind := [name for name, record in live.items() if record.kind == missing]:
        complete = [name for name in of_kind if kept.keys() >= set(live[name].parents)]
        kept[(complete or of_kind)[-1]] = f"newest of kind {missing}"


def _keep_named(
    live: Mapping[str, Record], records: Mapping[str, Record], kept: dict[str, str]
) -> None:
    """Keep the parents, the data sets and the claimed records of kept records."""
    data = {o.sha256: r.id for r in live.values() if r.kind == "data" for o in r.outputs}
    for record in [records[name] for name in kept]:
        claimed = [match[0] for match in re.finditer(RECORD_ID, record.claim)]
        built = [data[i.sha256] for i in record.inputs if i.sha256 in data]
        for name in (*record.parents, *claimed, *built):
            if name in records:
                kept.setdefault(name, f"named by {record.id}")


def citations(directory: Path, records: Collection[str]) -> dict[str, str]:
    """Records cited by files of the index, each with the first such file; a unique prefix counts.
    Raises IntegrityError for a file whose content this clone lacks.

    Records themselves, the ledger and the archive list are not searched.
    """
    history, found = History(directory), {}
    beside = [f":!{name}" for name in ("*/*", "ledger.jsonl", FILE)]
    listed = history.git("ls-files", "--stage", "--full-name", "-z", "--", ":/", *beside) or b""
    rows = [row.partition("\t") for row in os.fsdecode(listed).split("\0")[:-1]]
    files = [(path, facts.split()[1]) for facts, _, path in rows if facts.startswith("100")]
    for start in range(0, len(files), BLOCK):
        some = files[start : start + BLOCK]
        blobs = [blob for _, blob in some]
        for (path, blob), texts in zip(some, history.search(blobs, CITED, MAX_CITED_BYTES)):
            if texts is None:
                raise IntegrityError(
                    f"{path} cannot be searched for records: this clone lacks its content",
                    value=blob,
                    next_step="git fetch --refetch, in a clone without a filter",
                )
            for cited in texts:
                for name in (name for name in records if name.startswith(cited.decode())):
                    found.setdefault(name, path)
    return found


def last_commits(history: History) -> dict[str, str]:
    """The last commit that changed each record's folder."""
    out = history.git("log", "-z", "--format=/%H", "--name-only", "--relative", "--", ".") or b""
    found: dict[str, str] = {}
    commit = ""
    for row in os.fsdecode(out).split("\0"):
        folder, slash, rest = row.removeprefix("\n").partition("/")
        if slash and folder:
            found.setdefault(folder, commit)
        elif slash:
            commit = rest
    return found


def _files_to_archive(folder: Path, *, whole: bool) -> list[Path]:
    """All files of a record that leaves the tree; the large series of one that stays; none of an
    archived one.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    large = [f for f in files if f.name != METADATA and f.stat().st_size > LARGE_SERIES_BYTES]
    return files if whole else large


def _line(folder: Path, files: Sequence[Path], commits: Mapping[str, str]) -> Archived:
    if folder.name not in commits:
        raise IntegrityError(f"{folder} is not committed", next_step="commit the record first")
    hashes = {file.name: sha256_file(file) for file in files}
    return Archived(record=folder.name, commit=commits[folder.name], files=hashes)


def _require_readable(history: History, lines: Iterable[Archived]) -> None:
    """Raises IntegrityError unless history holds every file as it is in the tree."""
    files = [(line, name) for line in lines for name in line.files]
    contents = history.read([line.place(name) for line, name in files])
    for (line, name), data in zip(files, contents):
        if data is None or sha256_bytes(data) != line.files[name]:
            raise IntegrityError(f"commit {line.commit[:12]} does not hold {line.record}/{name}")

"""The run directory: run.json before step 1, one JSON line per step, sample and verdict, and the
lines that belong to a checkpoint.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stackproof.contracts.conditions import ensure
from stackproof.distributed.output import OUTPUT, RANKS, rank_folder
from stackproof.distributed.started import next_command
from stackproof.evidence.file_lock import LOCK
from stackproof.spec import checksums, rank_log
from stackproof.spec.building import RecordBuilder, iso
from stackproof.spec.canonical import (
    MAX_MANIFEST_VALUES,
    canonical_json,
    is_canonical_line,
    parse_strict,
    sha256_bytes,
    sha256_json,
)
from stackproof.spec.errors import (
    CheckpointError,
    EnvironmentUnfit,
    IntegrityError,
    StackproofError,
    UsageError,
)
from stackproof.spec.files import (
    end_last_line,
    lines_of,
    open_regular,
    open_to_append,
    read_bytes,
    remedy,
    remove_folder,
    remove_leftovers,
    require_own,
    sync,
    write_atomically,
)
from stackproof.spec.records import MOMENT, Artefact, RecordId, Scalar
from stackproof.spec.tables import validated

EVENTS = "events.jsonl"
SERIES = (
    "metrics.jsonl",
    "samples.jsonl",
    "gates.jsonl",
    "curriculum.jsonl",
    "points.jsonl",
    rank_log.FILE,
    EVENTS,
)
MANIFEST = "manifest.json"
STEPPED = SERIES[:6]  # cut back when a run continues from an earlier step
MAX_SERIES_BYTES = 2**32
FOLDERS = ("repro", "archive", "tensorboard", RANKS)
SEAL = "sha256"  # of run.json without this key


class RunDocument(BaseModel):
    """What run.json states, in strict types. A trained run also has the data it was started on; an
    imported one what it was made from.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    record: RecordId
    config: dict[str, Any]
    overrides: list[dict[str, Any]]
    device: str
    environment: dict[str, Scalar]
    code: dict[str, Scalar]
    command: list[str]
    started_at: str = Field(pattern=MOMENT)
    inherited_s: float = Field(ge=0)
    n_eval_batches: int = Field(default=1, ge=1)
    data: dict[str, Any] = {}
    parents: list[RecordId] = []
    carried: list[Artefact] = []
    imported_from: dict[str, Any] | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


@dataclass
class Log:
    """Length and running sha256 of the lines that a process has written to a series."""

    n_bytes: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def add(self, data: bytes) -> None:
        self.n_bytes += len(data)
        self.sha256.update(data)

    def mark(self) -> dict[str, Any]:
        """What a checkpoint states of the series, JSON-ready."""
        return {"bytes": self.n_bytes, "sha256": self.sha256.hexdigest()}


class RunDir:
    """Paths and append-only logs of one run. One process writes to it at a time."""

    def __init__(self, path: Path, *, rank: int = 0):
        """The directory of a run; the other ranks of a run log into one of their own below it."""
        self.path = path if rank == 0 else rank_folder(path, rank)
        self.document = path / "run.json"  # of all ranks
        self.checkpoints = path / "checkpoints"
        self.sha256, self.sealed = "", False  # of run.json, as it was written or read
        self._ended = True  # so far as is known
        self._logs: dict[str, Log] = {}
        self._writing = Lock()  # verdicts on a checkpoint come from the thread that writes it

    def refuse_occupied(self) -> None:
        """Raise UsageError if the folder holds a run."""
        if self.document.exists():
            raise UsageError(
                f"{self.path} already holds a run",
                allowed="a new folder",
                next_step=f"stack train --resume {self.path} continues it, and so does "
                "--auto-resume in the same command; or choose another --run-dir",
            )

    def create(self) -> None:
        """Make the folder. Raises UsageError if a run already lives there, EnvironmentUnfit if it
        cannot be written.
        """
        self.refuse_occupied()
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(
                f"{self.path} is a file, not a folder", next_step="choose another --run-dir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            require_own(self.path)
        except OSError as e:
            raise EnvironmentUnfit(
                f"the run directory cannot be made: {e}",
                next_step="choose another --run-dir, or make its parent folder writable",
            ) from e

    def open(self) -> None:
        """Begin to write, under the lock of the folder: delete what a killed process left half
        written. A run that never reached step 1 begins with empty logs.
        """
        for name in ("", "checkpoints", *FOLDERS, *SERIES):
            require_own(self.path / name)
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)
        for unfinished in self.path.glob("repro/.writing-*"):
            remove_folder(unfinished)
        if not self.document.exists():
            for name in SERIES:
                (self.path / name).unlink(missing_ok=True)
        end_last_line(self.path / EVENTS, is_canonical_line)

    def write_run(
        self, record: RecordBuilder, *, device: str, inherited_s: float = 0.0, **more: Any
    ) -> None:
        """Write run.json, sealed with its own hash: all that a resume reads before it loads a
        checkpoint.
        """
        document = {
            "record": record.id,
            "config": record.config,
            "overrides": [o.model_dump(by_alias=True, mode="json") for o in record.overrides],
            "device": device,
            "environment": record.environment,
            "code": record.code.model_dump(),
            "command": list(record.command),
            "started_at": iso(record.started),
            "inherited_s": inherited_s,
            **more,
        }
        data = canonical_json(document | {SEAL: sha256_json(document)})
        write_atomically(self.path / "run.json", data)
        self.sha256 = sha256_bytes(data)

    def read_run(self) -> dict:
        """The run.json. Raises CheckpointError if it is missing, unreadable or was changed."""
        path = self.path / "run.json"
        try:
            data = read_bytes(path)
            document = parse_strict(data, origin=str(path), max_values=MAX_MANIFEST_VALUES)
            validated(RunDocument, document, origin=str(path))
        except (OSError, IntegrityError) as e:
            if isinstance(e, FileNotFoundError):
                raise CheckpointError(
                    f"{self.path} is not a run directory: it has no run.json",
                    allowed="a folder with run.json",
                    next_step="stack train --run-dir DIR makes one; give a command that ended "
                    "before step 1 again",
                ) from e
            raise CheckpointError(
                f"{path} is damaged: {e.what if isinstance(e, StackproofError) else e}",
                allowed="the file that the run has written",
                next_step=self._restore_it,
            ) from e
        content = {k: v for k, v in document.items() if k != SEAL}
        if SEAL in document and document[SEAL] != sha256_json(content):
            raise CheckpointError(
                f"{path} was changed after it was written",
                value=f"sha256 {sha256_json(content)[:12]}…",
                allowed=f"sha256 {document[SEAL][:12]}…",
                next_step=self._restore_it,
            )
        self.sha256, self.sealed = sha256_bytes(data), SEAL in document
        return content

    @property
    def _restore_it(self) -> str:
        return f"restore it; stack train --fork {self.checkpoints}/STEP does not read it"

    def log(self, name: str, **line: Any) -> None:
        """Append one canonical JSON line to a series. Raises CheckpointError if it cannot be
        written.
        """
        data = canonical_json(line) + b"\n"
        with self._writing:
            self._unseal()
            log = self._log(name)
            try:
                with open_to_append(self.path / name) as f:
                    f.write(data)
            except OSError as e:
                raise CheckpointError(
                    f"{self.path / name} could not be written: {e}",
                    next_step=f"{remedy(e)}, then {next_command(self.document.parent)}",
                ) from e
            log.add(data)

    def _log(self, name: str) -> Log:
        """What is known of a series; one that was there before is read once."""
        if name not in self._logs:
            self._logs[name] = log = Log()
            with suppress(FileNotFoundError):
                _read_into(log, self.path / name)
        return self._logs[name]

    def marks(self) -> dict[str, dict[str, Any]]:
        """Length and sha256 of each series, by name."""
        with self._writing:
            return {name: self._log(name).mark() for name in SERIES if (self.path / name).is_file()}

    def mismarked(self) -> tuple[str, ...]:
        """Series whose file has another length or sha256 than its mark."""
        with self._writing:
            wrong = []
            for name, known in self._logs.items():
                found = Log()
                with suppress(FileNotFoundError):
                    _read_into(found, self.path / name)
                wrong += [name] if found.mark() != known.mark() else []
            return tuple(wrong)

    def sync_logs(self) -> None:
        """Wait until all lines are on the disk, so that a checkpoint never outlives its logs."""
        for name in SERIES:
            if (self.path / name).is_file():
                sync(self.path / name)
        sync(self.path)

    def require_logs(self, marks: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises CheckpointError unless the lines that belong to a checkpoint are all there,
        FileRefused if a log is a pipe or a device.
        """
        if unknown := sorted(marks.keys() - set(SERIES)):
            raise CheckpointError(
                f"a checkpoint of {self.path} states a log that no run has",
                value=unknown[0],
                allowed=", ".join(SERIES),
                next_step="take a checkpoint of another step or run",
            )
        for name, mark in marks.items():
            kept = Log()
            with suppress(FileNotFoundError):
                _read_into(kept, self.path / name, mark["bytes"])
            if kept.mark() != dict(mark):
                raise CheckpointError(
                    f"{self.path / name} is not the log that the checkpoint belongs to",
                    value=f"{kept.n_bytes} bytes, sha256 {kept.mark()['sha256'][:12]}…",
                    allowed=f"its first {mark['bytes']} bytes, sha256 {mark['sha256'][:12]}…",
                    next_step=(
                        f"restore the file; stack train --resume {self.path} --at STEP takes "
                        "another checkpoint, --at 0 begins again; --fork continues without the logs"
                    ),
                )

    @ensure(
        lambda self, marks: self._ends_at(marks), "each series ends where the checkpoint states"
    )
    def restore_logs(self, marks: Mapping[str, Mapping[str, Any]]) -> int:
        """Cut every series back to the lines that belong to a checkpoint, so that replayed steps
        are not logged twice. Returns the bytes cut.
        """
        self._unseal()
        cut = 0
        for path in [self.path / name for name in STEPPED if (self.path / name).exists()]:
            n_bytes = marks[path.name]["bytes"] if path.name in marks else 0
            cut += path.stat().st_size - n_bytes
            if n_bytes:
                os.truncate(path, n_bytes)
            else:
                path.unlink()
        self._logs.clear()
        self.sync_logs()
        return cut

    def _ends_at(self, marks: Mapping[str, Mapping[str, Any]]) -> bool:
        sizes = {p.name: p.stat().st_size for p in self.path.iterdir() if p.name in STEPPED}
        return sizes == {n: m["bytes"] for n, m in marks.items() if n in STEPPED and m["bytes"]}

    def rewind(self, step: int) -> int:
        """Cut every series back to lines of at most `step`, for a checkpoint of a former version,
        which does not state its lines. Returns the bytes cut.
        """
        cut = 0
        for name in STEPPED:
            data, kept = _lines_until(self.path / name, step)
            cut += len(data) - len(kept)
            if len(kept) != len(data):
                write_atomically(self.path / name, kept)
        self._logs.clear()
        return cut

    def copy_history(self, source: "RunDir", name: str, step: int) -> None:
        """Take over another run's lines of a series up to a step."""
        data, kept = _lines_until(source.path / name, step)
        if data:
            write_atomically(self.path / name, kept)

    def lines(self, name: str) -> Iterator[dict]:
        """The complete lines of a series, one at a time; none without its file. Raises
        IntegrityError naming a damaged line, FileRefused as `lines_of`.
        """
        path = self.path / name
        for number, line in lines_of(path, MAX_SERIES_BYTES) if path.is_file() else ():
            if line.endswith(b"\n") and line.strip():
                yield parse_strict(line[:-1], origin=f"{path}:{number}")

    def files(self) -> list[str]:
        """Paths of all regular files of a finished run that have no manifest of their own: not the
        lock, and of step folders the manifest alone. Names that no line of text can hold, and what
        may still be written, the files of a tracker and the output of ranks, are left out.
        """
        names = [p.relative_to(self.path) for p in self._entries() if self._is_plain(p)]
        return [
            name.as_posix()
            for name in names
            if name.as_posix() not in (LOCK, checksums.FILE)
            and (name.parts[0] != RANKS or name.name != OUTPUT)
            and (len(name.parts) != 3 or name.parts[0] != "checkpoints" or name.name == MANIFEST)
        ]

    def odd_entries(self) -> list[Path]:
        """Entries that no run makes, and no checksum covers: links, pipes, devices, names that no
        line of text can hold.
        """
        return [p for p in self._entries() if not self._is_plain(p)]

    def _is_plain(self, path: Path) -> bool:
        name = path.relative_to(self.path).as_posix()
        return path.is_file() and not path.is_symlink() and name.isprintable()

    def _entries(self) -> list[Path]:
        """All entries below the folder but folders and the files of a tracker, sorted."""
        found = (p for p in sorted(self.path.rglob("*")) if p.is_symlink() or not p.is_dir())
        return [p for p in found if p.relative_to(self.path).parts[0] != "tensorboard"]

    def seal(self) -> None:
        """Write SHA256SUMS: the run has ended. Raises OSError."""
        self._ended = True
        checksums.write_checksums(self.path, self.files())

    def _unseal(self) -> None:
        """Delete SHA256SUMS before the first change: the run continues."""
        if self._ended:
            (self.path / checksums.FILE).unlink(missing_ok=True)
            self._ended = False


def _read_into(log: Log, path: Path, n_bytes: int = MAX_SERIES_BYTES) -> None:
    """Add the first bytes of a file to a log."""
    left = n_bytes
    with open_regular(path) as f:
        while left and (block := f.read(min(left, 2**20))):
            log.add(block)
            left -= len(block)


def _lines_until(path: Path, step: int) -> tuple[bytes, bytes]:
    """A series, and its lines of at most `step`: lines of before step 1 have none, and a line that
    a kill cut off is left out.
    """
    if not path.is_file():
        return b"", b""
    data = read_bytes(path, MAX_SERIES_BYTES)
    lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
    steps = [_step_of(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    return data, b"".join(line for line, at in zip(lines, steps) if at <= step)


def _step_of(line: bytes, origin: str) -> int:
    """The step of a line of a series; 0 without one. Raises IntegrityError for another line."""
    match parse_strict(line, origin=origin):
        case {"step": int(step)}:
            return step
        case dict(entry) if entry.get("step") is None:
            return 0
    raise IntegrityError(
        f"{origin} is not an object with a whole number as step", next_step="restore the file"
    )


def default_run_dir(recipe: str, seed: int) -> Path:
    """`runs/<recipe>-<n>`, the first that is free."""
    n = 1
    while (path := Path("runs") / f"{recipe}-{n}").exists():
        n += 1
    return path


def parent_run(parent: Path) -> Path:
    """The run directory of a path: the path itself, or that of its
    checkpoints folder or step folder.
    """
    return next((p for p in (parent, *parent.parents[:2]) if (p / "run.json").is_file()), parent)

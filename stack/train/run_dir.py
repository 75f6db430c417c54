"""The run directory: run.json before step 1, one JSON line per step, sample and verdict,
and what a resume rewinds.
"""

import json
from pathlib import Path
from typing import Any

from stackproof.spec.building import RecordBuilder, iso
from stackproof.spec.canonical import canonical_json, parse_strict
from stackproof.spec.errors import CheckpointError, IntegrityError, UsageError
from stackproof.spec.files import write_atomically

SERIES = (
    "metrics.jsonl",
    "samples.jsonl",
    "gates.jsonl",
    "curriculum.jsonl",
    "points.jsonl",
    "events.jsonl",
)
STEPPED = SERIES[:5]  # rewound when a run continues from an earlier step


class RunDir:
    """Paths and append-only logs of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"

    def create(self) -> None:
        """Make the folder. Raises UsageError if a run already lives there."""
        if (self.path / "run.json").exists():
            raise UsageError(
                f"{self.path} already holds a run",
                allowed="a new folder",
                next_step=f"stack train --resume {self.path}, or choose another --run-dir",
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def write_run(
        self, record: RecordBuilder, *, device: str, inherited_s: float = 0.0, **more: Any
    ) -> None:
        """Write run.json: all that a resume reads before it loads a checkpoint."""
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
        write_atomically(self.path / "run.json", canonical_json(document))

    def read_run(self) -> dict:
        """The run.json. Raises CheckpointError without a readable one."""
        try:
            return parse_strict(
                (self.path / "run.json").read_bytes(), origin=str(self.path / "run.json")
            )
        except (OSError, IntegrityError) as e:
            raise CheckpointError(
                f"{self.path} is not a run directory: {e}",
                allowed="a folder with run.json",
                next_step=(
                    "stack train --run-dir DIR makes one; a run that ended before step 1 is begun "
                    "again in the same way"
                ),
            ) from e

    def log(self, name: str, **line: Any) -> None:
        """Append one canonical JSON line to a series, whole or not at all."""
        with open(self.path / name, "ab") as f:
            f.write(canonical_json(line) + b"\n")

    def rewind(self, step: int) -> int:
        """Cut every series back to lines of at most `step`, so that replayed steps are not logged
        twice. Returns lines cut.
        """
        cut = 0
        for name in STEPPED:
            lines, kept = _lines_until(self.path / name, step)
            cut += len(lines) - len(kept)
            if len(kept) != len(lines):
                write_atomically(self.path / name, b"".join(kept))
        return cut

    def copy_history(self, source: "RunDir", name: str, step: int) -> None:
        """Take over another run's lines of a series up to a step."""
        lines, kept = _lines_until(source.path / name, step)
        if lines:
            write_atomically(self.path / name, b"".join(kept))

    def read_lines(self, name: str) -> list[dict]:
        path = self.path / name
        return (
            [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        )


def _lines_until(path: Path, step: int) -> tuple[list[bytes], list[bytes]]:
    """All lines of a series, and those of at most `step`: lines of before step 1 have none, and a
    line that a kill cut off is left out.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return lines, [line for line in whole if (json.loads(line).get("step") or 0) <= step]


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

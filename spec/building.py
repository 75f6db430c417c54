"""Collects the fields of one run's record and writes `metadata.json`."""

import datetime as dt
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stackproof.spec.canonical import encodable, sha256_file, sha256_json
from stackproof.spec.files import write_atomically
from stackproof.spec.gates import Spec
from stackproof.spec.provenance import code_state
from stackproof.spec.records import (
    SCHEMA,
    Artefact,
    Code,
    GateResult,
    Kill,
    Metric,
    Override,
    Record,
    Scalar,
    Series,
    SpecRef,
)


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def iso(moment: dt.datetime) -> str:
    """2026-01-31T12:00:00.123Z"""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def artefact(
    path: Path,
    *,
    root: Path,
    name: str | None = None,
    license: str | None = None,
) -> Artefact:
    """A file by hash. Its path is relative to `root` if the file lies below it."""
    shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return Artefact(
        name=name or encodable(path.name),
        path=encodable(shown),
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        license=license,
    )


@dataclass
class RecordBuilder:
    """Builds a record. Code state, start time and id are taken when it is created."""

    kind: str
    spec: Spec
    config: dict
    claim: str
    not_covered: Sequence[str]
    command: Sequence[str] = field(default_factory=lambda: ["stack", *map(encodable, sys.argv[1:])])
    overrides: Sequence[Override] = ()
    environment: dict[str, Scalar] = field(default_factory=dict)
    compute: str = "real"
    parents: Sequence[str] = ()
    code: Code = field(default_factory=code_state)
    started: dt.datetime = field(default_factory=utc_now)
    device_s: float = 0.0
    metrics: dict[str, Metric] = field(default_factory=dict)
    inputs: list[Artefact] = field(default_factory=list)
    outputs: list[Artefact] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self):
        self._clock: float | None = time.monotonic()
        self.config_sha256 = sha256_json(self.config)
        nonce = sha256_json(
            [self.config_sha256, list(self.command), iso(self.started), os.getpid()]
        )[:8]
        self.id = f"{self.kind}-{self.started:%Y%m%dT%H%M%SZ}-{nonce}"

    def continue_record(self, record_id: str, started_at: str) -> None:
        """Continue the record of an interrupted run: take over its id and start time."""
        self.id, self.started, self._clock = record_id, dt.datetime.fromisoformat(started_at), None

    def metric(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        n: int | None = None,
        stderr: float | None = None,
        better: str = "neither",
    ) -> None:
        """Add one metric."""
        as_text = value if isinstance(value, int) or abs(value) < float("inf") else str(value)
        self.metrics[name] = Metric(value=as_text, unit=unit, n=n, stderr=stderr, better=better)

    def finish(
        self,
        directory: Path,
        *,
        status: str,
        end_reason: str,
        exit_code: int,
        gates: Iterable[GateResult] = (),
        series: Iterable[str] = (),
    ) -> Record:
        """Write `directory/metadata.json` atomically and return the record. Raises OSError."""
        # By the monotonic clock, since the system's may have been set back. A resumed run has only
        # the latter; there the time since its start is at least 0.
        elapsed_s = (
            (utc_now() - self.started).total_seconds()
            if self._clock is None
            else time.monotonic() - self._clock
        )
        finished = self.started + dt.timedelta(seconds=max(0.0, elapsed_s))
        record = Record(
            schema=SCHEMA,
            id=self.id,
            kind=self.kind,
            status=status,
            end_reason=encodable(end_reason),
            exit_code=exit_code,
            claim=self.claim,
            not_covered=tuple(self.not_covered),
            spec=SpecRef(version=self.spec.version, sha256=self.spec.sha256),
            code=self.code,
            command=tuple(self.command),
            config=self.config,
            config_sha256=self.config_sha256,
            overrides=tuple(self.overrides),
            environment=self.environment,
            compute=self.compute,
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            metrics=self.metrics,
            series=tuple(
                Series(path=p, sha256=sha256_file(directory / p))
                for p in series
                if (directory / p).is_file()
            ),
            gates=tuple(gates),
            kills=tuple(self.kills),
            parents=tuple(self.parents),
            started_at=iso(self.started),
            finished_at=iso(finished),
            wall_s=round((finished - self.started).total_seconds(), 3),
            device_s=round(self.device_s, 3),
        )
        write_atomically(directory / "metadata.json", record.to_bytes())
        return record

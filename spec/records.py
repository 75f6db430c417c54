"""The record every run leaves: `metadata.json`, canonical JSON,
validated on the way in and on the way out.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from stackproof.spec.canonical import AS_TEXT, canonical_json, parse_strict, sha256_bytes
from stackproof.spec.checksums import require_unchanged
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import read_bytes
from stackproof.spec.gates import GATE_ID, Frozen, Spec
from stackproof.spec.tables import validated

SCHEMA = "stackproof/record/1"
Kind = Literal[
    "train",
    "tune",
    "evaluate",
    "trace",
    "compare",
    "falsification",
    "mutation",
    "export",
    "import",
    "benchmark",
    "resume",
    "rerun",
    "data",
    "foreign",
]
Status = Literal["completed", "early_stopped", "halted", "interrupted", "preempted", "failed"]
Outcome = Literal["killed", "missed", "crashed", "equivalent", "awaiting"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
# A float is tried first, as most values are floats; each value keeps its own type in any order.
Scalar = float | int | bool | str | None
MOMENT = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?Z$"
HEX64 = r"^[0-9a-f]{64}$"
RECORD_ID = r"^[a-z]+-\d{8}T\d{6}Z-[0-9a-f]{8}$"
PLANT_ID = r"^[a-z0-9]+([.-][a-z0-9]+)*$"
PLAIN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
# Names become paths, anchors and columns, so they are plain.
GateId = Annotated[str, Field(pattern=GATE_ID)]
RecordId = Annotated[str, Field(pattern=RECORD_ID)]
PlantId = Annotated[str, Field(pattern=PLANT_ID)]
Name = Annotated[str, Field(pattern=PLAIN)]
NumberAsText = Annotated[str, Field(pattern=AS_TEXT)]
# Keys of a run that decide what is kept, shown or looked at, not what is computed:
# a resumed run may change them.
BESIDE_TRAINING = (
    *("train.log_every", "checkpoint.keep", "checkpoint.layout", "trace.every", "gates.waive"),
    *(f"parallel.{key}" for key in ("replicate", "shard", "tensor", "timeout_s", "compare_every")),
)


class Waiver(Frozen):
    """A gate the user chose to let fail, with reason and expiry (ISO date)."""

    id: GateId
    reason: str = Field(min_length=10)
    expires: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")


class GateResult(Frozen):
    """The result of one gate in one run.
    `checks` counts how often it looked; one that never did cannot have passed or failed.
    """

    id: GateId
    fingerprint: str = Field(pattern=HEX64)
    verdict: Literal["pass", "fail", "not_run"]
    checks: int = Field(ge=0)
    heartbeat_last_step: int | None = None
    first_failure_step: int | None = None
    measured: dict[Name, Scalar] = {}
    limits: dict[Name, float] = {}
    message: str = ""
    seconds: float = Field(default=0.0, ge=0)
    waiver: Waiver | None = None

    @model_validator(mode="after")
    def _has_looked(self):
        if self.verdict != "not_run" and self.checks == 0:
            raise ValueError(
                f"gate {self.id} has the verdict {self.verdict} and never looked (0 checks)"
            )
        return self


class Kill(Frozen):
    """The receipt of one plant under one gate: red on the plant, green on the control.

    `measured` is what the gate measured on the plant, `control_measured` its worst on the same
    stack without it. `moment` is when it turned red, `latency_steps` how many steps of a run the
    planted line had lived by then, `touches` how often it ran.
    """

    gate: GateId
    fingerprint: str = Field(pattern=HEX64)
    plant: PlantId
    plant_sha256: str = Field(pattern=HEX64)
    outcome: Outcome
    control: Literal["pass", "fail", "not_run"]
    latency: str
    seconds: float = Field(ge=0)
    measured: dict[Name, Scalar] = {}
    message: str = ""
    control_measured: dict[Name, Scalar] = {}
    moment: str = ""
    latency_steps: int | None = None
    touches: int | None = None


class Metric(Frozen):
    """One number with unit, sample count and spread. `better` is the good direction."""

    value: float | int | NumberAsText
    unit: str
    n: int | None = None
    stderr: float | NumberAsText | None = None
    better: Literal["lower", "higher", "neither"] = "neither"


class Artefact(Frozen):
    """A file that went in or came out, by hash."""

    name: str
    path: str
    sha256: str = Field(pattern=HEX64)
    bytes: int = Field(ge=0)
    tokens: int | None = None
    license: str | None = None


class Series(Frozen):
    """A JSON-lines file beside the record."""

    path: Name
    sha256: str = Field(pattern=HEX64)


class SpecRef(Frozen):
    version: str
    sha256: str = Field(pattern=HEX64)


class Code(Frozen):
    """The code that ran. `commit` is `unknown` outside a git checkout;
    such a record can never discharge a gate.
    """

    commit: str = Field(pattern=r"^([0-9a-f]{40}|unknown)$")
    dirty: bool
    diff_sha256: str | None = None
    lock_sha256: str | None = None


class Override(Frozen):
    """One configuration value that differs from its default, and where it came from."""

    key: str
    value: object
    source: str = Field(alias="from")
    model_config = {"frozen": True, "extra": "forbid", "populate_by_name": True}


class Record(Frozen):
    """One run. Field meanings are in docs/records.md; nothing here is ever
    edited after it was written.
    """

    schema_: str = Field(alias="schema", pattern=f"^{SCHEMA}$")
    id: str = Field(pattern=RECORD_ID)
    kind: Kind
    status: Status
    end_reason: str
    exit_code: int
    claim: str
    not_covered: tuple[str, ...]
    spec: SpecRef
    code: Code
    command: tuple[str, ...]
    config: dict
    config_sha256: str = Field(pattern=HEX64)
    overrides: tuple[Override, ...] = ()
    environment: dict[Name, Scalar]
    compute: Literal["real", "synthetic"]
    inputs: tuple[Artefact, ...] = ()
    outputs: tuple[Artefact, ...] = ()
    metrics: dict[Name, Metric] = {}
    series: tuple[Series, ...] = ()
    gates: tuple[GateResult, ...] = ()
    kills: tuple[Kill, ...] = ()
    parents: tuple[RecordId, ...] = ()
    started_at: str = Field(pattern=MOMENT)
    finished_at: str = Field(pattern=MOMENT)
    wall_s: float = Field(ge=0)
    device_s: float = Field(ge=0)
    model_config = {"frozen": True, "extra": "forbid", "populate_by_name": True}

    @model_validator(mode="after")
    def _is_named_after_its_kind(self) -> "Record":
        if self.id.partition("-")[0] != self.kind:
            raise ValueError(f"the id {self.id} is not one of a record of kind {self.kind}")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON bytes; their sha256 is what the ledger holds."""
        return canonical_json(self.model_dump(by_alias=True, mode="json"))

    @property
    def sha256(self) -> str:
        return sha256_bytes(self.to_bytes())

    @property
    def succeeded(self) -> bool:
        """Ended as planned, by itself."""
        return self.status in ("completed", "early_stopped")

    def metric(self, name: str) -> float | int | str:
        """A metric's value. Raises IntegrityError if the record does not hold it."""
        if name not in self.metrics:
            raise IntegrityError(
                f"record {self.id} has no metric {name}", allowed=", ".join(sorted(self.metrics))
            )
        return self.metrics[name].value


def left_out(spec: Spec, record: Record) -> list[str]:
    """Ids of gates that runs of the record's kind and configuration hold and the record does not.
    Valid only for a record of this version of the spec.
    """
    held = {g.id for g in record.gates}
    world_size = record.environment.get("world_size")
    n_ranks = world_size if isinstance(world_size, int) else 1
    return [
        g.id
        for g in spec.required(record.kind)
        if g.id not in held and g.applies_to(record.config, n_ranks)
    ]


def parse_record(data: bytes, *, origin: str) -> Record:
    """Strictly parse and validate a record. Raises IntegrityError naming file and field."""
    return validated(Record, parse_strict(data, origin=origin), origin=origin)


def read_record(path: Path) -> Record:
    """Read one `metadata.json`. Raises IntegrityError if it is missing, invalid, or other than when
    its run ended.
    """
    try:
        data = read_bytes(path)
    except OSError as e:
        raise IntegrityError(
            f"cannot read record {path}: {e.strerror}",
            next_step="give a run directory that holds metadata.json",
        ) from e
    require_unchanged(path.parent, path.name, data)
    return parse_record(data, origin=str(path))

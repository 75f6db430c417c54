"""The documents of a step folder as models: manifest.json, and the plain values of state.json."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stackproof import tensorfolder
from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64, Name, RecordId, Scalar

# Far enough below 2^53 that a resumed run can count on.
Count = Annotated[int, Field(ge=0, le=2**52)]


class Mark(BaseModel):
    """Length and sha256 of a log."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=HEX64)


class Process(BaseModel):
    """A process that continued a run: the step that it began after, and where its code and
    environment differ from those in run.json; None if they are not known.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    after: Count
    differs: dict[str, Scalar] | None


class RunState(BaseModel):
    """What a checkpoint states of its run directory. Early ones of this format state no process."""

    model_config = ConfigDict(strict=True, extra="forbid")
    sha256: str = Field(pattern=HEX64)
    logs: dict[str, Mark]
    compared: list[str]
    processes: list[Process] | None = None


class Manifest(Frozen):
    """manifest.json: what each file of a step folder must be."""

    schema_: str = Field(alias="schema")
    files: dict[str, tensorfolder.Declared]


class GateDocument(BaseModel):
    """The counts and the verdict of a gate; former versions saved no verdict. What its check
    remembers is of a form of its own.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    checks: Count
    heartbeat: Count | None
    first_failure: Count | None = None
    outcome: Literal["pass", "fail", "not_run"] = "not_run"
    message: str = ""
    measured: dict[Name, Scalar] = {}
    not_run: Count = 0
    not_run_reason: str = ""
    watcher: dict[str, Any]

    @model_validator(mode="after")
    def _was_checked(self) -> Self:
        if self.outcome != "not_run" and self.checks == 0:
            raise ValueError(f"the outcome is {self.outcome} after 0 checks")
        return self


class StopperDocument(BaseModel):
    """The state of the stop rule."""

    model_config = ConfigDict(strict=True, extra="allow")
    rounds: Count
    wait: Count
    best_round: int
    best_batch_nats: list[float]


class StateDocument(BaseModel):
    """state.json: its keys, and the types of its plain values; what they belong to checks the
    others.
    """

    model_config = ConfigDict(strict=True, extra="ignore")
    schema_: str = Field(alias="schema")
    config_sha256: str
    step: Count
    tokens_seen: Count
    cursor: Count
    vocab_size: int = Field(ge=1)
    wall_s: float = Field(ge=0)
    ema_loss_nats: float | None
    min_ema_loss_nats: float | None
    last_val_nats: float | None
    best: dict[str, float]
    config: dict[str, Any]
    curriculum: dict[str, Any]
    scaler: dict[str, float]
    stopper: StopperDocument
    gates: dict[str, GateDocument]
    record: RecordId
    tokenizer_sha256: str
    run: RunState | None = None


STATE_KEYS = frozenset(field.alias or name for name, field in StateDocument.model_fields.items())

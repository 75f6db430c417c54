"""The documents of a step folder as models: manifest.json, and the plain values of state.json."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stackproof import tensorfolder
from stackproof.contracts.keeper import GateDocument, ResumedCount
from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64, RecordId, Scalar


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
    after: ResumedCount
    differs: dict[str, Scalar] | None


class RunState(BaseModel):
    """What a checkpoint states of its run. Early ones of this format state neither processes nor
    held-out batches.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    sha256: str = Field(pattern=HEX64)
    logs: dict[str, Mark]
    compared: list[str]
    processes: list[Process] | None = None
    held_out_sha256: str | None = Field(default=None, pattern=HEX64)


class Manifest(Frozen):
    """manifest.json: what each file of a step folder must be."""

    schema_: str = Field(alias="schema")
    files: dict[str, tensorfolder.Declared]


class StopperDocument(BaseModel):
    """The state of the stop rule."""

    model_config = ConfigDict(strict=True, extra="allow")
    rounds: ResumedCount
    wait: ResumedCount
    best_round: int
    best_batch_nats: list[float]


class StateDocument(BaseModel):
    """state.json: its keys, and the types of its plain values; what they belong to checks the
    others.
    """

    model_config = ConfigDict(strict=True, extra="ignore")
    schema_: str = Field(alias="schema")
    config_sha256: str
    step: ResumedCount
    tokens_seen: ResumedCount
    cursor: ResumedCount
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

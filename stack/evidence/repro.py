"""A repro bundle: one folder from which a failed runtime gate can be reproduced. Read strictly.

repro.json           the document below
tensors.safetensors  rows of every step since the base (int32), held-out rows if the gate
                     judges them, random state
tokenizer.json       the tokenizer of the run
checkpoint/          the state at the start of the replay, unless it starts from the seed
points.jsonl         activation statistics of every point on the rows of the failed step
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stackproof.contracts.keeper import GateDocument
from stackproof.spec.canonical import MAX_SAFE_INTEGER, read_json, sha256_file
from stackproof.spec.errors import DataError, IntegrityError
from stackproof.spec.records import HEX64, Code, RecordId, Scalar
from stackproof.spec.series import Count, Figure
from stackproof.spec.tables import validated

SCHEMA = "stackproof/repro/1"
DOCUMENT, TENSORS, TOKENIZER, CHECKPOINT, POINTS = (
    "repro.json",
    "tensors.safetensors",
    "tokenizer.json",
    "checkpoint",
    "points.jsonl",
)
MAX_THREADS, MAX_VOCAB = 1024, 2**31 - 1  # of the largest machines, and of the ids of int32 rows
# Measurements that a replay takes over.
FROM_CORPUS = ("found_frac", "found_in_training_frac", "compressed_bits_per_byte")
COPY_AGAIN = "copy the whole folder again"

Integer = Annotated[int, Field(ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)]
Finite = Annotated[Figure, Field(allow_inf_nan=False)]
Measured = Integer | float | bool | str | None  # a float takes whole numbers that it can hold
Integers = Annotated[tuple[Integer, ...], Field(strict=False)]  # a list in JSON
Texts = Annotated[tuple[str, ...], Field(strict=False)]
FileName = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Strict(BaseModel):
    """Base of all models here: of exact types, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class File(Strict):
    """A file of the bundle, by hash."""

    sha256: str = Field(pattern=HEX64)
    bytes: Count


class Base(Strict):
    """Start of the replay: the seed, a step folder in the bundle, or a step folder that was too
    large to copy.
    """

    kind: Literal["seed", "checkpoint", "elsewhere"]
    step: Count = Field(description="the last step of the state")
    path: str = Field("", description="path of the step folder in the run")


class MicroBatch(Strict):
    """Rows of one micro-step: windows and sources. Their tokens are the tensors
    `step-N.M.input_ids` and so on.
    """

    sample_ids: Integers
    sources: Integers = ()
    epochs: Integers = ()
    epoch: Integer
    cursor_before: Integer
    cursor_after: Integer


class Step(Strict):
    """The rows of one step; `cursor` is the position of the reader after them."""

    step: Count = Field(ge=1)
    cursor: Count
    batches: Annotated[tuple[MicroBatch, ...], Field(strict=False)]


class Source(Strict):
    """A source of rows: its windows in the training split, and the bounds of its share (0-1)."""

    name: str
    first: Count
    n_windows: Count
    cap: Finite
    floor: Finite


class Plan(Strict):
    """What the run declared to its gates at the start of the replay. It may hold more keys, such as
    those of a model with experts.
    """

    model_config = ConfigDict(extra="allow")
    peak_lr: Finite
    peak_lrs: dict[str, Finite]
    schedule: dict[str, Any]
    warmup_steps: Count
    max_steps: Count
    tokens_per_step: Count
    tokens_seen: Count
    untrained: bool
    rows_per_step: Count
    cursor: Count
    sources: Annotated[tuple[Source, ...], Field(strict=False)]
    order: str
    drawn: Integers
    warmup_rows: Count
    warmup_sources: Texts
    random_loss_nats: Finite
    n_eval_batches: Count
    intervals: dict[str, Annotated[tuple[Count, str], Field(strict=False)]]


class Bundle(Strict):
    """The failed gate, its run, and the inputs of the replay.
    `gates` and `plan` are the state of the gates at the start of the replay.
    """

    schema_: str = Field(alias="schema", pattern=f"^{SCHEMA}$")
    gate: str
    fingerprint: str = Field(pattern=HEX64)
    spec_version: str
    severity: str
    event: str = Field(description="the kind of the event at which the gate failed")
    step: Count
    message: str
    measured: dict[str, Measured]
    limits: dict[str, Finite]
    nonfinite: dict[str, Texts] = Field(
        {}, description="the first parameters and gradients with a NaN or infinity"
    )
    record: RecordId
    config: dict[str, Any]
    code: Code
    environment: dict[str, Scalar]
    device: Literal["cpu", "cuda"]
    threads: int = Field(ge=1, le=MAX_THREADS)
    vocab_size: int = Field(ge=1, le=MAX_VOCAB)
    peak_flops: Finite = Field(gt=0)
    flops_per_step: Finite = Field(ge=0)
    base: Base
    continued: bool = Field(description="whether the base is a resumed state, not a fresh one")
    plan: Plan
    gates: dict[str, GateDocument]
    steps: Annotated[tuple[Step, ...], Field(strict=False)]
    n_held_out: Count
    lacking: str = Field("", description="why the folder alone is not sufficient; empty if it is")
    no_points: str = Field(
        "", description="why the folder has no statistics of points; empty if it has"
    )
    command: Texts
    files: dict[FileName, File]

    @field_validator("measured")
    @classmethod
    def _figures(cls, measured: Mapping[str, Measured]) -> Mapping[str, Measured]:
        for name in FROM_CORPUS:
            float(measured.get(name) or 0.0)
        return measured

    @field_validator("steps")
    @classmethod
    def _each_once(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        if any(b.step <= a.step for a, b in pairwise(steps)):
            raise ValueError("the steps do not ascend")
        return steps

    @model_validator(mode="after")
    def _state_of_the_gate(self) -> "Bundle":
        if self.gate not in self.gates:
            raise ValueError(f"gates does not hold the state of {self.gate}")
        return self


def read_bundle(folder: Path) -> Bundle:
    """The document of a bundle, after comparing every file with its hash. Reads no weights.

    Raises DataError if the folder is not a bundle, IntegrityError naming an invalid file or field.
    """
    path = folder / DOCUMENT
    if not path.is_file():
        raise DataError(
            f"{folder} is not a repro bundle",
            allowed=f"a folder with {DOCUMENT}",
            next_step="RUN/repro holds one per failed runtime gate",
        )
    try:
        value = read_json(path)
    except OSError as e:
        raise IntegrityError(f"cannot read {path}: {e}", next_step=COPY_AGAIN) from e
    bundle = validated(Bundle, value, origin=str(path), next_step=COPY_AGAIN)
    if TENSORS not in bundle.files:
        raise IntegrityError(f"{path} states no hash of {TENSORS}", next_step=COPY_AGAIN)
    for name, file in bundle.files.items():
        inside = folder / name
        if not _holds(folder, inside, file):
            raise IntegrityError(
                f"{inside} is missing or was changed",
                allowed=f"sha256 {file.sha256[:12]}…",
                next_step=COPY_AGAIN,
            )
    return bundle


def _holds(folder: Path, inside: Path, file: File) -> bool:
    """Whether a file lies in the folder and has its hash."""
    try:
        within = inside.resolve().is_relative_to(folder.resolve())
        return within and inside.is_file() and sha256_file(inside) == file.sha256
    except OSError:
        return False

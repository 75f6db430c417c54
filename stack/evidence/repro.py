"""A repro bundle: one folder from which a failed runtime gate can be reproduced. Read strictly.

repro.json           the document below
tensors.safetensors  rows of every step since the base (int32), held-out rows if the gate
                     judges them, random state
tokenizer.json       the tokenizer of the run
checkpoint/          the state at the start of the replay, unless it starts from the seed
points.jsonl         activation statistics of every point on the rows of the failed step
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stackproof.spec.canonical import read_json, sha256_file
from stackproof.spec.errors import DataError, IntegrityError
from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64, Code, Scalar
from stackproof.spec.tables import validated

SCHEMA = "stackproof/repro/1"
DOCUMENT, TENSORS, TOKENIZER, CHECKPOINT, POINTS = (
    "repro.json",
    "tensors.safetensors",
    "tokenizer.json",
    "checkpoint",
    "points.jsonl",
)


class File(Frozen):
    """A file of the bundle, by hash."""

    sha256: str = Field(pattern=HEX64)
    bytes: int = Field(ge=0)


class Base(Frozen):
    """Start of the replay: the seed, a step folder in the bundle, or a step folder that was too
    large to copy.
    """

    kind: Literal["seed", "checkpoint", "elsewhere"]
    step: int = Field(ge=0, description="the last step of the state")
    path: str = Field("", description="path of the step folder in the run")


class MicroBatch(Frozen):
    """Rows of one micro-step: windows and sources. Their tokens are the tensors
    `step-N.M.input_ids` and so on.
    """

    sample_ids: tuple[int, ...]
    sources: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()
    epoch: int
    cursor_before: int
    cursor_after: int


class Step(Frozen):
    """The rows of one step; `cursor` is the position of the reader after them."""

    step: int = Field(ge=1)
    cursor: int = Field(ge=0)
    batches: tuple[MicroBatch, ...]


class Bundle(Frozen):
    """The failed gate, its run, and the inputs of the replay.
    `gates` and `plan` are the state of the gates at the start of the replay.
    """

    schema_: str = Field(alias="schema", pattern=f"^{SCHEMA}$")
    gate: str
    fingerprint: str = Field(pattern=HEX64)
    spec_version: str
    severity: str
    event: str = Field(description="the kind of the event at which the gate failed")
    step: int = Field(ge=0)
    message: str
    measured: dict[str, Scalar]
    limits: dict[str, float]
    nonfinite: dict[str, tuple[str, ...]] = Field(
        {}, description="the first parameters and gradients with a NaN or infinity"
    )
    record: str
    config: dict
    code: Code
    environment: dict[str, Scalar]
    device: Literal["cpu", "cuda"]
    threads: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    peak_flops: float = Field(gt=0)
    flops_per_step: float = Field(ge=0)
    base: Base
    continued: bool = Field(description="whether the base is a resumed state, not a fresh one")
    plan: dict
    gates: dict
    steps: tuple[Step, ...]
    n_held_out: int = Field(ge=0)
    lacking: str = Field("", description="why the folder alone is not sufficient; empty if it is")
    no_points: str = Field(
        "", description="why the folder has no statistics of points; empty if it has"
    )
    command: tuple[str, ...]
    files: dict[str, File]
    model_config = {"frozen": True, "extra": "forbid", "populate_by_name": True}


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
        raise IntegrityError(f"cannot read {path}: {e}") from e
    bundle = validated(Bundle, value, origin=str(path))
    if TENSORS not in bundle.files:
        raise IntegrityError(
            f"{path} states no hash of {TENSORS}", next_step="copy the whole folder again"
        )
    for name, file in bundle.files.items():
        inside = folder / name
        if (
            not inside.resolve().is_relative_to(folder.resolve())
            or not inside.is_file()
            or sha256_file(inside) != file.sha256
        ):
            raise IntegrityError(
                f"{inside} is missing or was changed",
                allowed=f"sha256 {file.sha256[:12]}…",
                next_step="copy the whole folder again",
            )
    return bundle

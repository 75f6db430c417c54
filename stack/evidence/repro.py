"""A repro bundle: everything that is needed to see a red runtime gate again, in one folder,
read strictly.

repro.json           the document below
tensors.safetensors rows of every step since the base as int32,
held-out rows where the gate judges them, random state
tokenizer.json       the run's tokenizer
checkpoint/          the state the replay begins from, unless it begins from the seed
points.jsonl statistics of every point of the model on the rows of the step,
as it stood when the gate turned red
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from stackproof.spec.canonical import parse_strict, sha256_file
from stackproof.spec.errors import DataError, IntegrityError
from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64, Code, Scalar

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
    """Where the replay begins: from the seed, from a step folder in the bundle,
    or from one that was too large to copy.
    """

    kind: Literal["seed", "checkpoint", "elsewhere"]
    step: int = Field(ge=0, description="the last step that the state holds")
    path: str = Field("", description="the step folder as the run saw it")


class MicroBatch(Frozen):
    """Rows of one micro-step: which windows of which sources.
    Their tokens are `step-N.M.input_ids` and so on.
    """

    sample_ids: tuple[int, ...]
    sources: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()
    epoch: int
    cursor_before: int
    cursor_after: int


class Step(Frozen):
    """What was drawn for one step; `cursor` is where the reader then stood."""

    step: int = Field(ge=1)
    cursor: int = Field(ge=0)
    batches: tuple[MicroBatch, ...]


class Bundle(Frozen):
    """What fired, in which run, and how to come there again.
    `gates` and `plan` are what the watcher knew where the replay begins.
    """

    schema_: str = Field(alias="schema", pattern=f"^{SCHEMA}$")
    gate: str
    fingerprint: str = Field(pattern=HEX64)
    spec_version: str
    severity: str
    event: str = Field(description="the kind of event that turned the gate red")
    step: int = Field(ge=0)
    message: str
    measured: dict[str, Scalar]
    limits: dict[str, float]
    nonfinite: dict[str, tuple[str, ...]] = Field(
        {}, description="the first parameters and gradients that hold a NaN or infinity"
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
    continued: bool = Field(
        description="whether the base is a state that a run had left, and not a fresh one"
    )
    plan: dict
    gates: dict
    steps: tuple[Step, ...]
    n_held_out: int = Field(ge=0)
    lacking: str = Field(
        "", description="why the folder alone does not suffice; empty where it does"
    )
    no_points: str = Field(
        "", description="why the folder holds no statistics of points; empty where it does"
    )
    command: tuple[str, ...]
    files: dict[str, File]
    model_config = {"frozen": True, "extra": "forbid", "populate_by_name": True}


def read_bundle(folder: Path) -> Bundle:
    """The document of a bundle, after every file was compared with its hash. Reads no weights.

    Raises DataError if there is no bundle, IntegrityError naming the file or field that is wrong.
    """
    path = folder / DOCUMENT
    if not path.is_file():
        raise DataError(
            f"{folder} is no repro bundle",
            allowed=f"a folder with {DOCUMENT}",
            next_step="RUN/repro holds one per gate that turned red",
        )
    try:
        bundle = Bundle.model_validate(parse_strict(path.read_bytes(), origin=str(path)))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise IntegrityError(
            f"{path}: field {where}: {first['msg']}", value=str(first.get("input"))[:120]
        ) from e
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

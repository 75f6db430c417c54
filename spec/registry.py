"""The registry of released models and the records that support them: `evidence/registry.toml`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64, Name, RecordId
from stackproof.spec.tables import read_tables


class Release(Frozen):
    """One released model. Its metrics are read from its records."""

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9.]+)*$")
    series: str
    status: Literal["candidate", "released", "retired", "tainted"]
    recipe: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    tag: str | None = None
    researcher: str
    license: str
    data_license: str
    n_params: int = Field(gt=0)
    tokenizer_sha256: str = Field(pattern=HEX64)
    weights_sha256: str = Field(pattern=HEX64)
    card: str
    records: dict[Name, RecordId]


REQUIRED_RECORDS = ("train", "evaluate", "resume", "falsification")


def read_registry(path: Path) -> list[Release]:
    """All releases, in file order. A missing file is an empty registry.
    Raises IntegrityError naming entry and field.
    """
    return read_tables(path, "model", Release)

"""The manifest of a built data set as a model: what readers of it may rely on."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from stackproof.spec.canonical import MAX_SAFE_INTEGER, read_json
from stackproof.spec.records import HEX64
from stackproof.spec.tables import validated

FILE = "manifest.json"
Count = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]


class _Part(BaseModel):
    """A part of the manifest; it may hold more keys."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class _Shard(_Part):
    path: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*$")
    bytes: Count
    sha256: str = Field(pattern=HEX64)
    tokens: Count


class _Split(_Part):
    tokens: Count
    documents: Count
    bytes: Count
    shards: list[_Shard]


class _Source(_Part):
    name: str
    license: str
    weight: float
    cap: float
    floor: float
    tokens: dict[str, Count]


class _Tokenizer(_Part):
    kind: str
    vocab_size: int = Field(ge=1, le=2**31)
    sha256: str = Field(pattern=HEX64)


class _Splits(_Part):
    train: _Split
    validation: _Split


class _Manifest(_Part):
    config: dict[str, Any]
    sources: list[_Source]
    splits: _Splits
    tokenizer: _Tokenizer


def read_manifest(path: Path, *, schema: str = "") -> dict[str, Any]:
    """The manifest in a file as it stands there. One whose schema is not `schema` is returned
    unvalidated.

    Raises OSError, and IntegrityError naming file and field.
    """
    document = read_json(path)
    if not (schema and isinstance(document, dict) and document.get("schema", schema) != schema):
        validated(_Manifest, document, origin=str(path))
    return document

"""The manifest of a built data set as a model: what readers of it may rely on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from stackproof.config.data import MAX_SHINGLE_WORDS
from stackproof.data.shard_table import (
    BLOCK_SHARDS,
    LISTED_SHARDS,
    WINDOW_SIZES,
    is_block,
    write_blocks,
)
from stackproof.spec.canonical import (
    MAX_MANIFEST_VALUES,
    MAX_SAFE_INTEGER,
    canonical_json,
    read_json,
    sha256_json,
)
from stackproof.spec.files import write_atomically
from stackproof.spec.records import HEX64
from stackproof.spec.tables import validated

FILE = "manifest.json"
Count = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]


class _Part(BaseModel):
    """A part of the manifest; it may hold more keys."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class _Shard(_Part):
    source: str
    documents: Count
    path: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*$")
    bytes: Count
    sha256: str = Field(pattern=HEX64)
    tokens: Count


class _Block(_Shard):
    n_shards: int = Field(ge=1, le=BLOCK_SHARDS)
    windows: list[Count] = Field(min_length=len(WINDOW_SIZES), max_length=len(WINDOW_SIZES))


def _kind(entry: Any) -> str:
    return "block" if isinstance(entry, Mapping) and is_block(entry) else "shard"


_Entry = Annotated[
    Annotated[_Shard, Tag("shard")] | Annotated[_Block, Tag("block")], Discriminator(_kind)
]


class _Split(_Part):
    tokens: Count
    documents: Count
    bytes: Count
    dropped_chars: Count
    shards: list[_Entry]


class _Dropped(_Part):
    documents: Count
    bytes: Count
    example: str


class _Receipt(_Part):
    documents_in: Count
    bytes_in: Count
    documents_out: Count
    bytes_out: Count
    dropped: dict[str, _Dropped]


class _PassedOver(_Part):
    number: Count
    example: str


class _Source(_Part):
    name: str
    kind: str
    languages: list[str]
    license: str
    weight: float
    cap: float
    floor: float
    files: Count
    files_passed_over: _PassedOver
    sha256: str = Field(pattern=HEX64)
    receipt: _Receipt
    tokens: dict[Literal["train", "validation"], Count] = Field(min_length=2)


class _Tokenizer(_Part):
    kind: str
    vocab_size: int = Field(ge=1, le=2**31)
    sha256: str = Field(pattern=HEX64)
    encoder: str


class _KeptOut(_Part):
    path: str
    records: Count
    records_kept_out: Count


class _Decontamination(_Part):
    sets: list[_KeptOut]
    gram_words: Count
    canary: str


class _Filters(_Part):
    rules: list[str]


class _HowSplit(_Part):
    kind: Literal["document-hash", "tail"]


class _Exact(_Part):
    kind: Literal["exact"]


class _Near(_Part):
    kind: Literal["near"]
    similarity_min: float = Field(gt=0, le=1)
    shingle_words: int = Field(ge=1, le=MAX_SHINGLE_WORDS)


class _Config(_Part):
    split: _HowSplit
    dedup: _Exact | _Near = Field(discriminator="kind")


class _Corpus(_Part):
    sha256: str = Field(pattern=HEX64)


class _Splits(_Part):
    train: _Split
    validation: _Split


class _Manifest(_Part):
    config: _Config
    corpus: _Corpus
    sources: list[_Source]
    filters: _Filters
    decontamination: _Decontamination | None
    splits: _Splits
    tokenizer: _Tokenizer

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("two sources have one name")
        shards = (*self.splits.train.shards, *self.splits.validation.shards)
        if strange := [shard.source for shard in shards if shard.source not in names]:
            raise ValueError(f"a shard is of the source {strange[0]}, which is not listed")
        return self


def read_manifest(path: Path, *, schema: str = "") -> dict[str, Any]:
    """The manifest in a file as it stands there. One whose schema is not `schema` is returned
    unvalidated.

    Raises OSError, and IntegrityError naming file and field.
    """
    document = read_json(path, max_values=MAX_MANIFEST_VALUES)
    if not (schema and isinstance(document, dict) and document.get("schema", schema) != schema):
        validated(_Manifest, document, origin=str(path))
    return document


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder, and return it as written. Entries of a split that lists more
    than LISTED_SHARDS shards are written as blocks beside it.
    """
    splits = {
        name: split | {"shards": write_blocks(folder, name, split["shards"])}
        if len(split["shards"]) > LISTED_SHARDS
        else split
        for name, split in manifest["splits"].items()
    }
    written = {**manifest, "splits": splits}
    write_atomically(folder / FILE, canonical_json(written))
    return written


def stated(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest as a run states it: of a split of more than LISTED_SHARDS shards, their number and
    the hash of their entries. What is stated already stays as it is.
    """

    def short(split: Mapping[str, Any]) -> Mapping[str, Any]:
        entries = split["shards"]
        if not isinstance(entries, list):
            return split
        n_shards = sum(e.get("n_shards", 1) for e in entries)
        if n_shards <= LISTED_SHARDS:
            return split
        return {**split, "shards": {"n_shards": n_shards, "sha256": sha256_json(entries)}}

    return {**manifest, "splits": {k: short(s) for k, s in manifest["splits"].items()}}

"""The registry of released models and the records they stand on: `evidence/registry.toml`."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from spec.errors import IntegrityError
from spec.gates import Frozen
from spec.records import HEX64


class Release(Frozen):
    """One released model. Metrics are not repeated here: they are read from the records."""

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
    records: dict[str, str]


REQUIRED_RECORDS = ("train", "evaluate", "resume", "falsification")


def read_registry(path: Path) -> list[Release]:
    """All releases, in file order. A missing file is an empty registry. Raises IntegrityError naming entry and field."""
    if not path.is_file():
        return []
    try:
        entries = tomllib.loads(path.read_text("utf-8")).get("model", [])
    except tomllib.TOMLDecodeError as e:
        raise IntegrityError(f"{path}: {e}") from e
    releases = []
    for entry in entries:
        try:
            releases.append(Release.model_validate(entry))
        except ValidationError as e:
            first = e.errors()[0]
            raise IntegrityError(f"{path}: model {entry.get('id', '?')}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e
    return releases

"""Reads a TOML file of tables with one key, such as `[[model]]`, strictly, into one pydantic
model.
"""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from stackproof.spec.errors import IntegrityError

Kind = TypeVar("Kind", bound=BaseModel)


def read_tables(path: Path, key: str, kind: type[Kind]) -> list[Kind]:
    """All tables of a key, in file order; empty if the file is missing.
    Raises IntegrityError naming the table by its id, and the field.
    """
    if not path.is_file():
        return []
    try:
        tables = tomllib.loads(path.read_text("utf-8")).get(key, [])
    except tomllib.TOMLDecodeError as e:
        raise IntegrityError(f"{path}: {e}") from e
    found: list[Kind] = []
    for table in tables:
        try:
            found.append(kind.model_validate(table))
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "entry"
            raise IntegrityError(
                f"{path}: {key} {table.get('id', '?')}: {where}: {first['msg']}"
            ) from e
    return found

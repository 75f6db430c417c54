"""The header of a .gguf file, read with limits before the library reads it, which has no
limits.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stackproof.spec.errors import CheckpointError
from stackproof.spec.files import open_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_TENSORS, MAX_KEYS, MAX_DIMENSIONS = 2**16, 2**12, 4
# Entries of all lists together; a vocabulary of 262,144 tokens has 1.3 million.
MAX_ITEMS = 2**21
MAX_NAME_BYTES, MAX_TEXT_BYTES = 2**16, 2**24
# The narrowest type has 1.56 bits a weight.
WEIGHTS_PER_BYTE = 6
# Format characters of `struct` by number of the type.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, LIST = 8, 9


@dataclass(frozen=True)
class Header:
    """The numbers of a header by key, its tensors, and the weights in all of them."""

    numbers: dict[str, int | float | bool]
    n_tensors: int
    n_weights: int


class _Fields:
    """Fields of a header, one after the other."""

    def __init__(self, path: Path, f: BinaryIO):
        self.path, self.f, self.n_items = path, f, 0
        self.size = os.fstat(f.fileno()).st_size

    def refuse(self, what: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"the header of {self.path} is not valid: {what}",
            value=str(value)[:80],
            allowed=allowed,
            next_step="download the file again, from a publisher that you trust",
        )

    def scalar(self, code: str) -> int | float | bool:
        width = struct.calcsize(code)
        if len(data := self.f.read(width)) < width:
            raise self.refuse("it ends early", f"{self.size} bytes", "the whole header")
        return struct.unpack(f"<{code}", data)[0]

    def count(self, code: str, what: str, most: int) -> int:
        if (number := int(self.scalar(code))) > most:
            raise self.refuse(what, number, f"at most {most}")
        return number

    def skip(self, n_bytes: int) -> None:
        if self.f.seek(n_bytes, os.SEEK_CUR) > self.size:
            raise self.refuse("it ends early", f"{self.size} bytes", "the whole header")

    def text(self, what: str) -> str:
        n_bytes = self.count("Q", f"length of {what}, bytes", MAX_NAME_BYTES)
        return self.f.read(n_bytes).decode("utf-8", "replace")

    def value(self, key: str) -> int | float | bool | None:
        """The value of a key if it is a number; others are passed over."""
        kind = int(self.scalar("I"))
        if code := SCALARS.get(kind):
            return self.scalar(code)
        if kind == STRING:
            self.skip(self.count("Q", f"length of {key}, bytes", MAX_TEXT_BYTES))
        elif kind == LIST:
            self._pass_over_list(key)
        else:
            raise self.refuse(f"type of {key}", kind, "the types of the format")
        return None

    def _pass_over_list(self, key: str) -> None:
        kind, n_items = int(self.scalar("I")), int(self.scalar("Q"))
        self.n_items += n_items
        if self.n_items > MAX_ITEMS:
            raise self.refuse("entries of its lists", self.n_items, f"at most {MAX_ITEMS}")
        if code := SCALARS.get(kind):
            self.skip(n_items * struct.calcsize(code))
        elif kind == STRING:
            for _ in range(n_items):
                self.skip(self.count("Q", f"length of an entry of {key}", MAX_NAME_BYTES))
        else:
            raise self.refuse(f"type of the entries of {key}", kind, "numbers or texts")

    def tensor(self) -> int:
        """Weights of the next tensor."""
        name = self.text("the name of a tensor")
        n_dimensions = self.count("I", f"dimensions of {name}", MAX_DIMENSIONS)
        shape = [int(self.scalar("Q")) for _ in range(n_dimensions)]
        self.skip(4 + 8)  # type and place
        return math.prod(shape)


def read_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is not .gguf, or whose header exceeds a limit."""
    try:
        with open_regular(path) as f:
            return _read(_Fields(path, f))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e}", allowed="a .gguf file") from e


def _read(fields: _Fields) -> Header:
    if (magic := fields.f.read(4)) != MAGIC:
        raise fields.refuse("its first bytes", magic, repr(MAGIC))
    if (version := int(fields.scalar("I"))) not in VERSIONS:
        raise fields.refuse("its version", version, " or ".join(map(str, VERSIONS)))
    n_tensors = fields.count("Q", "number of tensors", MAX_TENSORS)
    n_keys = fields.count("Q", "number of keys", MAX_KEYS)
    values = {}
    for _ in range(n_keys):
        key = fields.text("a key")
        values[key] = fields.value(key)
    n_weights = sum(fields.tensor() for _ in range(n_tensors))
    if n_weights > WEIGHTS_PER_BYTE * fields.size:
        most = f"at most {WEIGHTS_PER_BYTE} for each of its {fields.size} bytes"
        raise fields.refuse("number of weights", n_weights, most)
    return Header({k: v for k, v in values.items() if v is not None}, n_tensors, n_weights)

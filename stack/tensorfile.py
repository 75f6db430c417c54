"""Strict access to safetensors files: what is read is exactly what the header declares, and what is written is on the disk."""

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {
    "F64": (8, "<f8"),
    "F32": (4, "<f4"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "I64": (8, "<i8"),
    "I32": (4, "<i4"),
    "I16": (2, "<i2"),
    "I8": (1, "|i1"),
    "U64": (8, "<u8"),
    "U32": (4, "<u4"),
    "U16": (2, "<u2"),
    "U8": (1, "|u1"),
    "BOOL": (1, "|b1"),
}
MAX_HEADER_BYTES = 100 * 2**20


class BadTensorFile(Exception):
    """A file that is not a complete, unambiguous safetensors file."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype code, shape, and byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file declares."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parse and check a header: JSON at once, unique keys, tensors that cover the data exactly. Raises BadTensorFile."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(8)
        _refuse_foreign(start, size)
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise BadTensorFile(f"the header claims {length} bytes, the file has {size}")
        raw = f.read(length)
    if not raw.startswith(b"{"):
        raise BadTensorFile("the header does not begin with '{'")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        metadata = document.pop("__metadata__", {})
        tensors = {name: _entry(name, fields, 8 + length) for name, fields in document.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise BadTensorFile(f"the header is not valid: {e}") from e
    _require_exact_cover(tensors, 8 + length, size)
    return Header(tensors, metadata)


def _refuse_foreign(start: bytes, size: int) -> None:
    if start[:2] == b"PK":
        raise BadTensorFile("this is a zip archive as torch.save writes it, with a pickle inside; pickles are never loaded")
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        raise BadTensorFile("this is a pickle; pickles are never loaded")
    if size < 10:
        raise BadTensorFile(f"the file has only {size} bytes")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _entry(name: str, fields: dict[str, Any], base: int) -> Entry:
    start, stop = fields["data_offsets"]
    shape = tuple(fields["shape"])
    n_bytes = DTYPES[fields["dtype"]][0] * int(np.prod(shape, dtype=np.int64))
    if set(fields) != {"dtype", "shape", "data_offsets"} or stop - start != n_bytes or start < 0:
        raise ValueError(f"tensor {name} declares {stop - start} bytes, its shape needs {n_bytes}")
    return Entry(fields["dtype"], shape, base + start, base + stop)


def _require_exact_cover(tensors: dict[str, Entry], base: int, size: int) -> None:
    position = base
    for entry in sorted(tensors.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != position:
            raise BadTensorFile(f"the tensors leave a gap or overlap at byte {position}")
        position = entry.stop
    if position != size:
        raise BadTensorFile(f"the file has {size} bytes, its tensors end at {position}: truncated or padded")


def tensor_sha256(path: Path) -> dict[str, str]:
    """Hex sha256 of every tensor's bytes by name. Raises BadTensorFile."""
    hashes = {}
    with open(path, "rb") as f:
        for name, entry in read_header(path).tensors.items():
            f.seek(entry.start)
            digest, left = hashlib.sha256(), entry.stop - entry.start
            while left:
                block = f.read(min(left, 1 << 20))
                if not block:
                    raise BadTensorFile(f"tensor {name} ends early")
                digest.update(block)
                left -= len(block)
            hashes[name] = digest.hexdigest()
    return hashes


def write(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Serialise numpy arrays or torch tensors (all of one kind) and put the file on the disk. Raises OSError."""
    arrays = {name: _as_numpy(t) for name, t in tensors.items()}
    import safetensors.numpy

    data = safetensors.numpy.save(arrays, metadata=metadata)
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _as_numpy(tensor: Any) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu().contiguous().numpy()
    return np.ascontiguousarray(tensor)


def memmap(path: Path, name: str) -> np.ndarray:
    """One tensor as a read-only memory map. Raises BadTensorFile if the file or the name is wrong."""
    header = read_header(path)
    if name not in header.tensors:
        raise BadTensorFile(f"there is no tensor {name}")
    entry = header.tensors[name]
    if entry.start == entry.stop:
        return np.zeros(entry.shape, DTYPES[entry.dtype][1])
    return np.memmap(path, dtype=DTYPES[entry.dtype][1], mode="r", offset=entry.start, shape=entry.shape)

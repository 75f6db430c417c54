"""Strict access to safetensors files: what is read is exactly what the header declares, and what is written is on the disk."""

import hashlib
import json
import math
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
METADATA_KEY = "stackproof"


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
    """Parse and check a header: JSON at once, unique keys, tensors that cover the data exactly.

    Raises BadTensorFile saying what is wrong, OSError if the file cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(8)
        if size < 10:
            raise BadTensorFile(_foreign(start) or f"the file has only {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
            raise BadTensorFile(_foreign(start) or f"the header claims {length} bytes, the file has {size}")
        raw = f.read(length)
    if not raw.startswith(b"{"):
        raise BadTensorFile(_foreign(start) or "the header does not begin with '{'")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        metadata = document.pop("__metadata__", {})
        tensors = {name: _entry(name, fields, 8 + length) for name, fields in document.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise BadTensorFile(f"the header is not valid: {type(e).__name__}: {e}") from e
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadTensorFile("the header is not valid: its metadata is no table of strings")
    _require_exact_cover(tensors, 8 + length, size)
    return Header(tensors, metadata)


def _foreign(start: bytes) -> str:
    """What a file that is no safetensors file is, if its first bytes tell; asked only once the length field makes no sense.

    A sound header of 384 bytes begins with 0x80 0x01 as a pickle may, so these bytes alone refuse nothing.
    """
    if start[:2] == b"PK":
        return "this is a zip archive as torch.save writes it, with a pickle inside; pickles are never loaded"
    if start[:1] == b"\x80":
        return "this is a pickle; pickles are never loaded"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _entry(name: str, fields: dict[str, Any], base: int) -> Entry:
    """One tensor's declaration. Sizes are multiplied as Python integers, so that no product can wrap around."""
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} declares {sorted(fields)}")
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown type {fields['dtype']!r}; known: {' '.join(DTYPES)}")
    shape, (start, stop) = fields["shape"], fields["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has a shape or offset that is no count: {shape}, {fields['data_offsets']}")
    n_bytes = DTYPES[fields["dtype"]][0] * math.prod(shape)
    if stop - start != n_bytes:
        raise ValueError(f"tensor {name} declares {stop - start} bytes, its shape needs {n_bytes}")
    return Entry(fields["dtype"], tuple(shape), base + start, base + stop)


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
    """Serialise numpy arrays or torch tensors of any type and put the file on the disk. The same content gives the same bytes.

    Raises OSError if it cannot be written, BadTensorFile if it cannot be expressed.
    """
    import safetensors

    try:
        data = _serialised(tensors, metadata)
    except safetensors.SafetensorError as e:
        raise BadTensorFile(f"these tensors cannot be written: {e}") from e
    (length,) = struct.unpack("<Q", data[:8])
    header = _ordered_header(data[8 : 8 + length])
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.write(memoryview(data)[8 + length :])
        f.flush()
        os.fsync(f.fileno())


def _ordered_header(raw: bytes) -> bytes:
    """The header with its metadata in alphabetical order: the library writes them in an order that differs between processes."""
    document = json.loads(raw)
    document["__metadata__"] = dict(sorted(document.get("__metadata__", {}).items()))
    ordered = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return ordered + b" " * (-len(ordered) % 8)


def _serialised(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """The library's bytes. Arrays go through numpy, which has no bfloat16; a file that holds one goes through torch."""
    if any(str(t.dtype) == "torch.bfloat16" for t in tensors.values()):
        import safetensors.torch
        import torch

        copies = {name: torch.as_tensor(t).detach().cpu().clone().contiguous() for name, t in tensors.items()}
        return safetensors.torch.save(copies, metadata=metadata)
    import safetensors.numpy

    arrays = {n: t if isinstance(t, np.ndarray) else t.detach().cpu().contiguous().numpy() for n, t in tensors.items()}
    return safetensors.numpy.save({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}, metadata=metadata)


def memmap(path: Path, name: str) -> np.ndarray:
    """One tensor as a read-only memory map; bfloat16 appears as its uint16 bits. Raises BadTensorFile if the file or the name is wrong."""
    header = read_header(path)
    if name not in header.tensors:
        raise BadTensorFile(f"there is no tensor {name}")
    entry = header.tensors[name]
    if entry.start == entry.stop:
        return np.zeros(entry.shape, DTYPES[entry.dtype][1])
    if not entry.shape:
        return np.fromfile(path, DTYPES[entry.dtype][1], count=1, offset=entry.start).reshape(())
    return np.memmap(path, dtype=DTYPES[entry.dtype][1], mode="r", offset=entry.start, shape=entry.shape)

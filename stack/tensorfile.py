"""Strict access to safetensors files: reads exactly the declared content, and syncs writes to
disk.
"""

import errno
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from stackproof.spec.files import create, open_regular

DTYPES = {  # from the first laid out to the last, as the library does it
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F64": (8, "<f8"),
    "F32": (4, "<f4"),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "BF16": (2, "<u2"),
    "F16": (2, "<f2"),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "I8": (1, "|i1"),
    "U8": (1, "|u1"),
    "BOOL": (1, "|b1"),
}
LAYOUT = tuple(DTYPES)
CODES = dict(
    zip(
        (
            "uint64 int64 float64 float32 uint32 int32 bfloat16 float16 uint16 int16 int8 uint8 "
            "bool"
        ).split(),
        LAYOUT,
        strict=True,
    )
)
SLICE_BYTES = 4 * 2**20  # of a tensor at a time: written, hashed, compared
READ_BYTES = 2**20  # at a time, while it lies in the processor's cache
# errors of a file system or device without this call
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV)
# Far above every published model: a header takes up to thirty times its bytes when it is parsed.
MAX_HEADER_BYTES, MAX_DIMENSIONS = 16 * 2**20, 32
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


def n_elements(entry: Entry) -> int:
    """Numbers in one tensor."""
    return math.prod(entry.shape)


@dataclass(frozen=True)
class Header:
    """The declarations in the header of a file."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parse and check a header: JSON at once, unique keys, tensors that cover the data exactly.

    Raises BadTensorFile for an invalid file, OSError for an unreadable one.
    """
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        start = f.read(8)
        if size < 10:
            raise BadTensorFile(_foreign(start) or f"the file has only {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
            raise BadTensorFile(
                _foreign(start)
                or f"the header claims {length} bytes, the file has {size}, and at most "
                f"{MAX_HEADER_BYTES} are read"
            )
        raw = f.read(length)
    if not raw.startswith(b"{"):
        raise BadTensorFile(_foreign(start) or "the header does not begin with '{'")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        metadata = document.pop("__metadata__", {})
        tensors = {name: _entry(name, fields, 8 + length) for name, fields in document.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadTensorFile(f"the header is not valid: {type(e).__name__}: {str(e)[:300]}") from e
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadTensorFile("the header is not valid: its metadata is not a table of strings")
    _require_exact_cover(tensors, 8 + length, size)
    return Header(tensors, metadata)


def _foreign(start: bytes) -> str:
    """The format of a file that is not a safetensors file, by its first bytes; empty if unknown.
    Called only for an invalid length field.

    A valid header of 384 bytes begins with 0x80 0x01, as a pickle may, so these bytes alone are not
    an error.
    """
    if start[:2] == b"PK":
        return (
            "this is a zip archive as torch.save writes it, with a pickle inside; pickles are "
            "never loaded"
        )
    if start[:1] == b"\x80":
        return "this is a pickle; pickles are never loaded"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _entry(name: str, fields: dict[str, Any], base: int) -> Entry:
    """The declaration of one tensor. Sizes are multiplied as Python integers, so products cannot
    overflow.
    """
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} declares {sorted(fields)}")
    if fields["dtype"] not in DTYPES:
        raise ValueError(
            f"tensor {name} has the unknown type {fields['dtype']!r}; known: {' '.join(DTYPES)}"
        )
    shape, (start, stop) = fields["shape"], fields["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has more than {MAX_DIMENSIONS} dimensions")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(
            f"tensor {name} has a shape or offset that is not a count: {shape}, "
            f"{fields['data_offsets']}"
        )
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
        raise BadTensorFile(
            f"the file has {size} bytes, its tensors end at {position}: truncated or padded"
        )


def digests(path: Path) -> tuple[str, dict[str, str]]:
    """Hex sha256 of a file, and hex CRC-32 of the bytes of every tensor by name, from one read.
    Raises BadTensorFile, OSError.
    """
    tensors = read_header(path).tensors
    whole, checksums, block = (
        hashlib.sha256(),
        dict.fromkeys(tensors, 0),
        memoryview(bytearray(READ_BYTES)),
    )
    with open_regular(path) as f:
        whole.update(f.read(min((e.start for e in tensors.values()), default=path.stat().st_size)))
        for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            left = entry.stop - entry.start
            while left:
                read = block[: f.readinto(block[: min(left, READ_BYTES)])]
                if not read:
                    raise BadTensorFile(f"tensor {name} ends early")
                whole.update(read)
                checksums[name] = crc32(read, checksums[name])
                left -= len(read)
    return whole.hexdigest(), {name: f"{checksum:08x}" for name, checksum in checksums.items()}


def write(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write numpy arrays or torch tensors of any dtype and device to disk. Equal content gives
    equal bytes.

    Makes no copy of the whole. Raises OSError if the file cannot be written, BadTensorFile for an
    unsupported dtype.
    """
    pieces = _pieces(tensors, metadata)
    with created(path, tensors) as f:
        for _, piece in pieces:
            f.write(_bytes_of(piece))
        _sync(f)


@contextmanager
def created(path: Path, tensors: dict[str, Any]) -> Iterator[BinaryIO]:
    """A new file with reserved space for tensors, if the system supports it: a full disk fails
    early, and writing is faster.

    The reserved size is below the final one, so that a truncated file never has the full length.
    Raises OSError.
    """
    with create(path, replace=True) as f:
        _reserve(f.fileno(), sum(t.nbytes for t in tensors.values()))
        yield f


@dataclass(frozen=True)
class Written:
    """A written file: its checksums as from `digests`, its sha256 when the hashing thread is done,
    and its sync to disk.
    """

    sha256: Future[str]
    crc32: dict[str, str]
    synced: Future[None]


def write_hashed(
    f: BinaryIO, tensors: dict[str, Any], metadata: dict[str, str], pool: Executor
) -> Written:
    """As `write`, into a file of `created`.
    One thread of `pool` follows and hashes, another syncs while the next file is written.

    The hashing thread receives a piece, a view of its tensor, after it is written. So a tensor that
    changes meanwhile cannot agree with the hash, the file and a later comparison at the same time.
    The caller closes the file when the pool is done.
    """
    checksums, written = dict.fromkeys(tensors, 0), SimpleQueue()
    sha256 = pool.submit(_hash, written)
    try:
        for name, piece in _pieces(tensors, metadata):
            data = _bytes_of(piece)
            f.write(data)
            written.put(piece)
            if name is not None:
                checksums[name] = crc32(data, checksums[name])
    finally:
        written.put(None)
    return Written(
        sha256,
        {name: f"{checksum:08x}" for name, checksum in checksums.items()},
        pool.submit(_sync, f),
    )


def _hash(written: SimpleQueue) -> str:
    sha256 = hashlib.sha256()
    while (piece := written.get()) is not None:
        sha256.update(_bytes_of(piece))
    return sha256.hexdigest()


def _sync(f: BinaryIO) -> None:
    f.flush()
    os.fsync(f.fileno())


def require_equal(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Read a file and compare it byte for byte with the arguments of `write`.
    Raises BadTensorFile naming the first part that differs.
    """
    block = np.empty(SLICE_BYTES, np.uint8)
    with open_regular(path) as f:
        for name, piece in _pieces(tensors, metadata):
            part, expected = "the header" if name is None else f"tensor {name}", _bytes_of(piece)
            read = block[: len(expected)]
            if (n := f.readinto(read)) != len(expected):
                raise BadTensorFile(f"{part} ends {len(expected) - n} bytes early")
            if not _equal(read, expected):
                raise BadTensorFile(f"{part} is not what was written")
        if f.read(1):
            raise BadTensorFile("there are bytes behind the last tensor")


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether bytes are the same; eight at a time, which takes half the time."""
    whole = len(a) // 8 * 8
    return np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64)) and np.array_equal(
        a[whole:], b[whole:]
    )


def _reserve(descriptor: int, n_bytes: int) -> None:
    if not n_bytes or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as e:
        if e.errno not in CANNOT_RESERVE:
            raise


def _pieces(tensors: dict[str, Any], metadata: dict[str, str]) -> Iterator[tuple[str | None, Any]]:
    """A file from first to last byte: its header, named None, then each tensor by name in slices of
    at most SLICE_BYTES, at least one.

    Raises BadTensorFile immediately, before the first piece is read.
    """
    codes = {name: _code(name, t) for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: (LAYOUT.index(codes[name]), name))
    header = _header_bytes(
        [(name, codes[name], list(tensors[name].shape)) for name in order], metadata
    )
    return _slices(
        [(None, np.frombuffer(header, np.uint8)), *((name, tensors[name]) for name in order)]
    )


def _slices(parts: list[tuple[str | None, Any]]) -> Iterator[tuple[str | None, Any]]:
    for name, tensor in parts:
        flat = _in_a_row(tensor)
        n_elements = SLICE_BYTES // flat.itemsize
        for start in range(0, max(1, len(flat)), n_elements):
            yield name, flat[start : start + n_elements]


def _bytes_of(piece: Any) -> np.ndarray:
    """The bytes of a piece as uint8, copied only if it lies on another device."""
    return (piece if isinstance(piece, np.ndarray) else piece.cpu().numpy()).view(np.uint8)


def _code(name: str, tensor: Any) -> str:
    kind = (
        str(tensor.dtype).removeprefix("torch.")
        if not isinstance(tensor, np.ndarray)
        else tensor.dtype.name
    )
    if kind not in CODES or name == "__metadata__":
        raise BadTensorFile(
            f"these tensors cannot be written: {name} is of type {kind}; allowed: {' '.join(CODES)}"
        )
    return CODES[kind]


def _header_bytes(entries: list[tuple[str, str, list[int]]], metadata: dict[str, str]) -> bytes:
    """Length and header, its metadata in alphabetical order: the library writes them in an order
    that differs between processes.
    """
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, code, shape in entries:
        stop = start + DTYPES[code][0] * math.prod(shape)
        document[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _in_a_row(tensor: Any) -> Any:
    """An array or tensor as one dimension, little-endian, where it is, without a copy if it lies
    so; bfloat16 as its int16 bits.
    """
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).reshape(-1)
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat


def memmap(path: Path, name: str) -> np.ndarray:
    """One tensor as a read-only memory map; bfloat16 appears as its uint16 bits.
    Raises BadTensorFile if the file or the name is wrong.
    """
    header = read_header(path)
    if name not in header.tensors:
        raise BadTensorFile(f"there is no tensor {name}")
    entry = header.tensors[name]
    if entry.start == entry.stop:
        return np.zeros(entry.shape, DTYPES[entry.dtype][1])
    if not entry.shape:
        return np.fromfile(path, DTYPES[entry.dtype][1], count=1, offset=entry.start).reshape(())
    return np.memmap(
        path, dtype=DTYPES[entry.dtype][1], mode="r", offset=entry.start, shape=entry.shape
    )

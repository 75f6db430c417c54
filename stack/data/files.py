"""Documents in text, JSON-lines and parquet files, read as streams to bound the memory."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stackproof.config import Files
from stackproof.data import filters
from stackproof.data.parquet_pages import claims
from stackproof.spec.errors import DataError, EnvironmentUnfit
from stackproof.spec.files import open_regular

COMPRESSED = (".gz", ".zst")
MAX_DOCUMENT_BYTES = 16 * 2**20
MAX_RATIO, FREE_BYTES = 250, 64 * 2**20
# Rows of a parquet file at a time, and the limits of its own header.
ROWS_AT_ONCE = 16
MAX_PARQUET_TEXT, MAX_PARQUET_ITEMS = 2**24, 2**20
VALUE_BYTES = 256  # of memory for a value without text, such as an empty turn of a chat
TURN_KEYS = ("role", "from", "content", "value")
DENSE = 20  # a column that expands by more is read row by row
SHOWN_CHARS = 300
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text, and a name with its origin."""

    id: str
    text: str


@dataclass(frozen=True)
class Unreadable:
    """An unreadable item: its place, the reason code and its size in bytes."""

    id: str
    reason: str
    n_bytes: int


@dataclass(frozen=True)
class Slice:
    """Bytes start … stop-1 of a file (None: to its end). A document belongs to the slice in which
    it begins.
    """

    path: Path
    start: int = 0
    stop: int | None = None


def suffixes(path: Path) -> tuple[str, str]:
    """Content type and compression: `a.jsonl.gz` gives (.jsonl, .gz)."""
    last = path.suffix.lower()
    kind, packed = (Path(path.stem).suffix.lower(), last) if last in COMPRESSED else (last, "")
    return ".jsonl" if kind == ".ndjson" else kind, packed


def read_slice(piece: Slice, cfg: Files) -> Iterator[Document | Unreadable]:
    """The documents of a slice. Raises DataError with the file for every failure."""
    with _readable(piece.path):
        yield from _file(piece, cfg)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert exceptions of reading a file to DataError."""
    try:
        yield
    except FileNotFoundError as e:
        raise DataError(
            f"{path} vanished while it was read",
            next_step="restore it, then run the same command again",
        ) from e
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(
            f"cannot read {path}: {e}", next_step="unpack it by hand to see what is wrong with it"
        ) from e


def _file(piece: Slice, cfg: Files) -> Iterator[Document | Unreadable]:
    kind = suffixes(piece.path)[0]
    if kind == ".parquet":
        yield from _parquet(piece.path, cfg.text_field)
    elif kind == ".jsonl":
        yield from _json_lines(piece, cfg.text_field)
    elif cfg.documents == "file":
        yield from read_whole(piece.path, str(piece.path))
    else:
        yield from _lines_of_text(piece, cfg.documents)


class _Unpacked(io.RawIOBase):
    """The content of a compressed file. Raises DataError when it is far larger than text ever is:
    a few hundred kilobytes can expand to terabytes.
    """

    def __init__(self, path: Path, stream: Any, packed_bytes: int):
        self.path, self.stream, self.packed_bytes, self.n_bytes = path, stream, packed_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, block: Any) -> int:
        data = self.stream.read(len(block))
        block[: len(data)] = data
        self.n_bytes += len(data)
        require_ratio(self.path, self.n_bytes, self.packed_bytes)
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def require_ratio(path: Path, n_bytes: int, packed_bytes: int) -> None:
    """Raises DataError if a compressed file holds more than MAX_RATIO times its bytes."""
    if n_bytes > max(MAX_RATIO * packed_bytes, FREE_BYTES):
        raise DataError(
            f"{path} expands to more than {MAX_RATIO} times its size, as no text does",
            value=f"{n_bytes} bytes of {packed_bytes}",
            allowed=f"{MAX_RATIO} times the size of the file, or {FREE_BYTES} bytes",
            next_step="leave it out, or unpack it by hand and read the result",
        )


def _open(path: Path) -> BinaryIO:
    """A regular file's uncompressed bytes as a stream."""
    file = open_regular(path)
    packed_bytes = os.fstat(file.fileno()).st_size
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(_Unpacked(path, _Gzip(file), packed_bytes), 2**17)
        case ".zst":
            try:
                import pyarrow
            except ImportError as e:
                raise EnvironmentUnfit(
                    f"{path} is compressed by zstandard", next_step="pip install 'stackproof[data]'"
                ) from e
            # raises for a file that ends within a frame; zstandard's own reader returns less text
            stream = pyarrow.input_stream(file, compression="zstd")
            return io.BufferedReader(_Unpacked(path, stream, packed_bytes), 2**17)
    return file


class _Gzip(gzip.GzipFile):
    """A gzip file that closes the file below it."""

    def __init__(self, file: BinaryIO):
        super().__init__(fileobj=file)
        self.below = file

    def close(self) -> None:
        super().close()
        self.below.close()


def read_whole(path: Path, name: str) -> Iterator[Document | Unreadable]:
    """A file as one document."""
    with _open(path) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            yield Unreadable(name, "too-long", len(data) + _skip(stream))
            return
    yield from _decoded(data.removeprefix(BOM), name, empty_counts=True)


def _decoded(
    data: bytes, place: str, *, empty_counts: bool = False
) -> Iterator[Document | Unreadable]:
    """Bytes as a document, if they are UTF-8 and not blank. A blank line gives no document; an
    empty file gives one.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        lines_on = data[: e.start].count(b"\n")
        where = f" +{lines_on} lines" if lines_on else ""
        yield Unreadable(f"{place}{where}, byte 0x{data[e.start]:02x}", "not-utf8", len(data))
        return
    if text.strip():
        yield Document(place, text)
    elif empty_counts:
        yield Unreadable(place, "empty", len(data))


def _skip(stream: BinaryIO) -> int:
    """Read to the end and discard the content. Returns the number of bytes."""
    return sum(len(block) for block in iter(lambda: stream.read(2**20), b""))


def _raw_lines(piece: Slice) -> Iterator[tuple[str, bytes | int]]:
    """(place, bytes) of every line that begins in a slice, without its line end; for a line above
    MAX_DOCUMENT_BYTES only the size.
    """
    with _open(piece.path) as stream:
        number, position = 0, piece.start
        if piece.start:
            stream.seek(piece.start - 1)
            position += _line(stream)[1] - 1
        while piece.stop is None or position < piece.stop:
            line, size = _line(stream)
            if not size:
                return
            number += 1
            place = (
                f"{piece.path} byte {position}" if piece.start else f"{piece.path} line {number}"
            )
            line = line.removeprefix(BOM) if position == 0 else line
            yield place, line.rstrip(b"\n") if size <= MAX_DOCUMENT_BYTES else size
            position += size


def _line(stream: BinaryIO) -> tuple[bytes, int]:
    """The next line with its line end, and its size; only the beginning of an over-long line is
    kept.
    """
    line = stream.readline(MAX_DOCUMENT_BYTES + 1)
    size = len(line)
    while size > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
        line = stream.readline(2**20)
        size += len(line)
        if not line:
            break
    return line, size


def _lines_of_text(piece: Slice, documents: str) -> Iterator[Document | Unreadable]:
    """Lines, or paragraphs: lines up to a blank one."""
    pending, place, size = [], "", 0
    for where, line in _raw_lines(piece):
        if isinstance(line, int):
            yield Unreadable(where, "too-long", line)
            continue
        if documents == "line":
            for part in line.split(b"\r"):  # a bare carriage return ends a line too
                yield from _decoded(part, where)
            continue
        if line.strip():
            place, size = place or where, size + len(line) + 1
            if size <= MAX_DOCUMENT_BYTES:
                pending.append(line)
            continue
        yield from _paragraph(pending, place, size)
        pending, place, size = [], "", 0
    yield from _paragraph(pending, place, size)


def _paragraph(lines: list[bytes], place: str, size: int) -> Iterator[Document | Unreadable]:
    if size > MAX_DOCUMENT_BYTES:
        yield Unreadable(place, "too-long", size)
    elif lines:
        yield from _decoded(b"\n".join(lines).removesuffix(b"\r"), place)


def _json_lines(piece: Slice, field: str) -> Iterator[Document | Unreadable]:
    for place, line in _raw_lines(piece):
        if isinstance(line, int):
            yield Unreadable(place, "too-long", line)
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            yield Unreadable(place, "not-utf8", len(line))
            continue
        except (ValueError, RecursionError) as e:
            raise DataError(f"{place} is not JSON: {e}", next_step="repair the line") from e
        yield from _record(value, place, field, len(line))


def _parquet(path: Path, field: str) -> Iterator[Document | Unreadable]:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise EnvironmentUnfit(
            f"{path} is a parquet file", next_step="pip install 'stackproof[data]'"
        ) from e
    import pyarrow

    with open_regular(path) as source:
        yield from _parquet_rows(path, source, field, pyarrow, pq)


def _parquet_rows(
    path: Path, source: BinaryIO, field: str, pyarrow: Any, pq: Any
) -> Iterator[Document | Unreadable]:
    packed_bytes, n_bytes = os.fstat(source.fileno()).st_size, 0
    limits = {
        "thrift_string_size_limit": MAX_PARQUET_TEXT,
        "thrift_container_size_limit": MAX_PARQUET_ITEMS,
    }
    try:
        file, number = pq.ParquetFile(source, **limits), 0
        leaves = _text_leaves(file.schema, field)
        if not leaves:
            raise _no_field(str(path), field, file.schema_arrow.names)
        largest = _require_small(path, source, file.metadata, leaves)
        dense = largest <= max(MAX_DOCUMENT_BYTES, DENSE * packed_bytes)
        names = [file.schema.column(i).path for i in leaves]
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE if dense else 1, columns=names):
            n_bytes += batch.nbytes
            require_ratio(path, n_bytes, packed_bytes)
            for value in _rows(batch.column(0), pyarrow):
                number += 1
                place = f"{path} row {number}"
                if not isinstance(value, bytes):
                    yield from _record({batch.schema.names[0]: value}, place, field, 0)
                elif len(value) > MAX_DOCUMENT_BYTES:
                    yield Unreadable(place, "too-long", len(value))
                else:
                    yield from _decoded(value, place, empty_counts=True)
    # ArrowNotImplementedError for a compression that it lacks, OSError or ValueError for a damaged
    # page
    except (pyarrow.ArrowException, OSError, MemoryError, ValueError) as e:
        raise DataError(
            f"cannot read {path}: {e}", next_step="check that it is a whole parquet file"
        ) from e


def _text_leaves(schema: Any, field: str) -> list[int]:
    """The numbers of the columns that hold the text of a field: itself, or the keys of the turns of
    a chat. Columns of another type are not read, nor lists in lists.
    """
    found = []
    for i in range(len(schema)):
        leaf = schema.column(i)
        is_text = leaf.physical_type == "BYTE_ARRAY" and leaf.max_repetition_level <= 1
        if is_text and (
            leaf.path == field
            or (leaf.path.startswith(f"{field}.") and leaf.path.rpartition(".")[2] in TURN_KEYS)
        ):
            found.append(i)
    return found


def _require_small(path: Path, source: BinaryIO, metadata: Any, leaves: list[int]) -> int:
    """The bytes of the largest part of these columns. Raises DataError if a column holds more bytes
    or values than a file of this size may hold, ValueError for pages that are not valid.
    """
    packed_bytes, largest = os.fstat(source.fileno()).st_size, 0
    for leaf in leaves:
        total = 0
        for i in range(metadata.num_row_groups):
            n_bytes, n_values = claims(source, metadata.row_group(i).column(leaf))
            total += max(n_bytes, VALUE_BYTES * n_values)
            require_ratio(path, total, packed_bytes)
            largest = max(largest, n_bytes)
    return largest


def _rows(values: Any, pyarrow: Any) -> list:
    """Values of a column; strings as bytes, because they may be invalid UTF-8."""
    text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
    return values.cast(pyarrow.large_binary()).to_pylist() if text else values.to_pylist()


def _record(value: Any, place: str, field: str, n_bytes: int) -> Iterator[Document | Unreadable]:
    """The text of one record: a string, or a list of chat turns, which becomes
    `> user / < assistant …`.
    """
    text = _at(value, field)
    if isinstance(text, list) and (text := chat_text(text, place)) is None:
        yield Unreadable(place, "chat-turns", n_bytes)
        return
    if not isinstance(text, str):
        found = f"a {type(text).__name__} under it; " if text is not None else ""
        raise _no_field(
            place,
            field,
            [f"{found}keys {', '.join(sorted(value))}"]
            if isinstance(value, dict)
            else [type(value).__name__],
        )
    if not _is_unicode(text):
        yield Unreadable(place, "half-surrogate", n_bytes or len(text))
    elif len(text) > MAX_DOCUMENT_BYTES:
        yield Unreadable(place, "too-long", n_bytes or len(text))
    else:
        yield Document(place, text) if text.strip() else Unreadable(place, "empty", n_bytes)


def _at(value: Any, field: str) -> Any:
    if isinstance(value, dict) and field in value:
        return value[field]
    for key in field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def chat_text(turns: list, place: str) -> str | None:
    """Chat turns as one text, without system messages. None unless user and assistant alternate,
    the user first.

    Raises DataError for a turn with another role.
    """
    marks = {
        "user": filters.USER,
        "human": filters.USER,
        "assistant": filters.ASSISTANT,
        "gpt": filters.ASSISTANT,
        "system": None,
    }
    said = []
    for turn in turns:
        role = str(turn.get("role", turn.get("from"))) if isinstance(turn, dict) else ""
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if role not in marks or not isinstance(content, str):
            raise DataError(
                f"{place} has a chat turn of an unknown role",
                value=f"role {role or type(turn).__name__!r}",
                allowed=f"role {', '.join(marks)} with a text as content",
                next_step="repair the record",
            )
        if marks[role] is not None:
            said.append(marks[role] + content.strip())
    text = filters.TURN.join(said)
    return text if not said or filters.takes_turns(said) else None


def _no_field(place: str, field: str, keys: list[str]) -> DataError:
    return DataError(
        f"{place} has no text under {field!r}",
        value=", ".join(keys)[:SHOWN_CHARS],
        allowed="a string, or a list of chat turns with role and content",
        next_step="--text-field NAME, or text_field of the source in the mixture file",
    )


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; JSON escapes can hold lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def evaluation_texts(path: Path, fields: tuple[str, ...]) -> Iterator[list[str]]:
    """The texts of each record of an evaluation set: in a .jsonl file the given fields, or all with
    text; in other files the paragraphs.

    Raises DataError with file and line of a record without any of the fields.
    """
    if not path.is_file():
        raise DataError(
            f"there is no evaluation set {path}",
            next_step="check the path; in a mixture file it is relative to that file",
        )
    if suffixes(path)[0] != ".jsonl":
        cfg = Files(paths=(str(path),), documents="paragraph")
        for item in read_slice(Slice(path), cfg):
            if isinstance(item, Unreadable):
                raise DataError(
                    f"{item.id} of an evaluation set cannot be read: {item.reason}",
                    allowed=f"UTF-8, in paragraphs of at most {MAX_DOCUMENT_BYTES} bytes",
                    next_step="repair that place, or leave the file out",
                )
            yield [item.text]
        return
    with _readable(path):
        for place, line in _raw_lines(Slice(path)):
            if isinstance(line, int):
                raise DataError(
                    f"{place} of an evaluation set is too long to be read",
                    value=f"{line:,} bytes",
                    next_step="cut the line",
                )
            if line.strip():
                yield _evaluation_record(line, place, fields)


def _evaluation_record(line: bytes, place: str, fields: tuple[str, ...]) -> list[str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{place} is not JSON: {e}", next_step="repair the line") from e
    keys = fields or (tuple(record) if isinstance(record, dict) else ())
    found = [v for f in keys if isinstance(v := _at(record, f), str)]
    if not found:
        raise DataError(
            f"{place} has no text under {', '.join(fields) or 'any key'}",
            value=(
                f"keys {', '.join(record) if isinstance(record, dict) else type(record).__name__}"
            ),
            next_step="name other fields: --field, or decontaminate_fields in a mixture file",
        )
    return found

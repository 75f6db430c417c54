"""Documents of a source in a fixed order, and unreadable ones with the reason.

A source is split into parts that processes read independently.
"""

import glob
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from stackproof.config import Files, Mixture, Pangram, StdlibCode, StdlibDocs
from stackproof.data import stdlib
from stackproof.data.files import (
    COMPRESSED,
    Document,
    Slice,
    Unreadable,
    read_slice,
    read_whole,
    suffixes,
)
from stackproof.spec.canonical import sha256_file
from stackproof.spec.errors import DataError

EXTRACTOR_VERSION = 4
TEXT_SUFFIXES = frozenset((".txt", ".md", ".rst", ".py", ".jsonl", ".parquet"))
PART_BYTES = 16 * 2**20
TextSource = StdlibDocs | StdlibCode | Pangram | Files


@dataclass(frozen=True)
class Part:
    """The unit of work of one process: slices of files, or a whole embedded corpus (no slices)."""

    slices: tuple[Slice, ...] = ()
    n_bytes: int = 0


def read_documents(cfg: TextSource) -> Iterator[Document]:
    """All readable documents of a source in a fixed order.
    Raises DataError with file and line of a record that must not be skipped.
    """
    for part in parts(cfg):
        yield from (d for d in read_part(cfg, part) if isinstance(d, Document))


def sources_of(cfg: TextSource | Mixture) -> dict[str, TextSource]:
    """Sources by name. A corpus that is not a mixture is one source, named after its kind."""
    return {s.name: s for s in cfg.sources} if isinstance(cfg, Mixture) else {cfg.kind: cfg}


def source_paths(cfg: TextSource) -> list[Path]:
    """Every file with content of a source."""
    match cfg:
        case StdlibDocs():
            from pydoc_data import topics

            return [*stdlib.source_files(), Path(topics.__file__)]
        case StdlibCode():
            return stdlib.source_files()
        case Pangram():
            return []
        case Files():
            return resolve_paths(cfg)
        case _:
            assert_never(cfg)


def corpus_sha256(cfg: TextSource | Mixture) -> str:
    """Hash of the content of every source file and of the reading options; without parsing.

    Paths, the name and the licence of a source do not enter, so equal text has an equal hash
    everywhere.
    """
    digest = hashlib.sha256(str(EXTRACTOR_VERSION).encode())
    for source in sources_of(cfg).values():
        kept = source.model_dump_json(
            exclude={"license", "paths", "name", "weight", "cap", "floor"}
        )
        digest.update(
            kept.encode() + (sys.version.encode() if isinstance(source, StdlibDocs) else b"")
        )
        for path in source_paths(source):
            # The suffix defines how a file is split into documents; a document of the standard
            # library has the name of its module.
            name = "".join(suffixes(path)) if isinstance(source, Files) else path.name
            digest.update(name.encode() + b"\0" + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces. Raises DataError if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as e:
        raise DataError(
            f"cannot read {path}: {e.strerror}", next_step="check the file and its permissions"
        ) from e


def resolve_paths(cfg: Files) -> list[Path]:
    """Files of paths, folders and globs, sorted, each once.
    Raises DataError for a path or glob without readable files.
    """
    found: list[Path] = []
    for pattern in cfg.paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [
                p for p in path.rglob("*") if p.is_file() and suffixes(p)[0] in TEXT_SUFFIXES
            ]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not matches:
            raise DataError(
                f"paths{f' of source {name}' if (name := getattr(cfg, 'name', '')) else ''} names "
                f"nothing readable: {pattern}",
                allowed=(
                    f"files, globs, or folders with {' '.join(sorted(TEXT_SUFFIXES))} files, also "
                    f"{' '.join(COMPRESSED)}"
                ),
                next_step=(
                    "check the path: in a mixture file it is relative to that file, elsewhere to "
                    "where you are"
                ),
            )
        if unread := [p for p in matches if suffixes(p)[0] == ".json"]:
            raise DataError(
                f"{unread[0]} is one JSON value, and no text",
                allowed="one record per line in a .jsonl file",
                next_step="convert it, or leave it out",
            )
        found += sorted(matches)
    return list(dict.fromkeys(found))


def passed_over(cfg: TextSource) -> list[Path]:
    """Files of unsupported types in the folders of a source, sorted."""
    folders = [Path(p).expanduser() for p in cfg.paths] if isinstance(cfg, Files) else []
    files = (p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in files if suffixes(p)[0] not in TEXT_SUFFIXES)


def parts(cfg: TextSource) -> list[Part]:
    """Split a source into parts of about PART_BYTES: small files are grouped, large line-based
    files split. Raises DataError for a file that has disappeared.
    """
    if not isinstance(cfg, Files):
        return [Part()]
    made, current, size = [], [], 0
    for piece, n_bytes in (p for path in resolve_paths(cfg) for p in _slices(path, cfg)):
        if current and size + n_bytes > PART_BYTES:
            made.append(Part(tuple(current), size))
            current, size = [], 0
        current.append(piece)
        size += n_bytes
    return [*made, Part(tuple(current), size)]


def _slices(path: Path, cfg: Files) -> list[tuple[Slice, int]]:
    try:
        size = path.stat().st_size
    except OSError as e:
        raise DataError(
            f"{path} has vanished: {e.strerror}",
            next_step="restore it, then run the same command again",
        ) from e
    of_lines = suffixes(path) == (".jsonl", "") or (
        cfg.documents == "line" and suffixes(path)[1] == ""
    )
    if not of_lines or size <= PART_BYTES or suffixes(path)[0] == ".parquet":
        return [(Slice(path), size)]
    starts = range(0, size, PART_BYTES)
    return [
        (Slice(path, start, min(start + PART_BYTES, size)), min(PART_BYTES, size - start))
        for start in starts
    ]


def read_part(cfg: TextSource, part: Part) -> Iterator[Document | Unreadable]:
    """All documents and unreadable items of a part, in order.
    Raises DataError naming file and line of a damaged file or a record without its text.
    """
    match cfg:
        case StdlibDocs():
            yield from (Document(name, text) for name, text in stdlib.documentation())
        case StdlibCode():
            for path in stdlib.source_files():
                yield from read_whole(path, stdlib.module_name(path))
        case Pangram():
            yield Document("pangram", stdlib.PANGRAM * cfg.repeats)
        case Files():
            for piece in part.slices:
                yield from read_slice(piece, cfg)
        case _:
            assert_never(cfg)

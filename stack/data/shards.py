"""Token shards: safetensors files of ids and document starts,
described by a manifest with hashes.
"""

import errno
import hashlib
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from stackproof import tensorfile
from stackproof.contracts.conditions import require
from stackproof.data.shard_table import BLOCKS_KEPT, ShardTable, n_windows, sums_before
from stackproof.spec.canonical import sha256_file
from stackproof.spec.errors import DataError

MAX_SHARD_TOKENS = 64 * 2**20
GRIDS_KEPT = 64
COUNTS = ("tokens", "bytes", "documents", "dropped_chars")
MAX_MAPPED = 32_000  # shards of a stream at a time; Linux allows a process 65,530 maps


def normalised(text: str) -> str:
    """Text without differences of case and white space."""
    return " ".join(text.casefold().split())


def document_hash(text: str) -> int:
    """First 8 bytes of sha256 of the normalised text, as a signed 64-bit integer."""
    return int.from_bytes(
        hashlib.sha256(normalised(text).encode()).digest()[:8], "big", signed=True
    )


def token_dtype(vocab_size: int) -> type:
    """uint16 if every id fits, else uint32."""
    return np.uint16 if vocab_size <= 65536 else np.uint32


def pack_ids(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Ids in the storage dtype. Raises DataError for an id outside the vocabulary, before the
    cast.
    """
    array = np.asarray(ids, np.int64)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        worst = int(array.max()) if array.max() >= vocab_size else int(array.min())
        raise DataError(
            f"token id {worst} is outside the vocabulary",
            allowed=f"0 … {vocab_size - 1}",
            next_step="rebuild the tokenizer",
        )
    return array.astype(token_dtype(vocab_size))


def write_split(
    folder: Path,
    split: str,
    documents: Iterable[tuple[Sequence[int], int]],
    tokenizer,
    *,
    max_tokens: int = MAX_SHARD_TOKENS,
    first_number: int = 0,
) -> list[dict]:
    """Write (ids, document hash) pairs as shards. An end-of-text id precedes the split and ends
    every document.

    Returns the manifest's entries: path, sha256, bytes, tokens, documents.
    """
    entries: list[dict] = []
    end, rest = pack_ids([tokenizer.eos_id], tokenizer.vocab_size), iter(documents)
    for document in rest:
        parts, starts, hashes, length = [end], [], [], 1
        for ids, digest in chain([document], rest):
            starts.append(length)
            hashes.append(digest)
            parts += [pack_ids(ids, tokenizer.vocab_size), end]
            length += len(ids) + 1
            if length >= max_tokens:
                break
        number = first_number + len(entries)
        entries.append(_write(folder, split, number, parts, starts, hashes, tokenizer))
    return entries


def write_documents(
    folder: Path,
    split: str,
    documents: Iterable[tuple[str, int]],
    tokenizer,
    *,
    source: str,
    encode: Callable[[list[str]], list[Any]],
    at_once: int,
    **options: int,
) -> dict[str, Any]:
    """Encode (text, document hash) pairs, `at_once` at a time, and write them as shards of a
    source. `options` are those of `write_split`.

    Returns the entry of a split in a manifest: tokens, bytes of text, documents, characters outside
    the vocabulary, and shards.
    """
    counts = Counter(dict.fromkeys(COUNTS, 0))

    def encoded() -> Iterator[tuple[np.ndarray, int]]:
        rest = iter(documents)
        while batch := list(islice(rest, at_once)):
            for encoding, (_, digest) in zip(encode([text for text, _ in batch]), batch):
                ids = np.asarray(encoding.ids, np.int64)
                counts["documents"] += 1
                counts["bytes"] += int(tokenizer.token_bytes[ids].sum(dtype=np.int64))
                counts["dropped_chars"] += encoding.dropped_chars
                yield ids, digest

    entries = write_split(folder, split, encoded(), tokenizer, **options)
    counts["tokens"] = sum(e["tokens"] for e in entries)
    return {**counts, "shards": [e | {"source": source} for e in entries]}


def _write(
    folder: Path, split: str, number: int, parts: list, starts: list, hashes: list, tokenizer
) -> dict:
    path = folder / f"{split}-{number:05d}.safetensors"
    tokens = np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size))
    arrays = {
        "tokens": tokens,
        "document_starts": np.array(starts, np.int64),
        "document_hashes": np.array(hashes, np.int64),
    }
    metadata = {
        "tokenizer_sha256": tokenizer.sha256,
        "split": split,
        "vocab_size": str(tokenizer.vocab_size),
    }
    tensorfile.write(path, arrays, metadata)
    return {
        "path": path.name,
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "tokens": int(tokens.size),
        "documents": len(starts),
    }


class MappedShards(Sequence):
    """Token arrays of shards by number, memory-mapped on first use. Beyond `mappable()` maps, the
    least recently used is closed.

    Lengths come from the table of the shards, so opening a stream reads only the first shard.
    """

    def __init__(self, table: ShardTable, vocab_size: int):
        self.table, self.vocab_size = table, vocab_size
        self._recent = lru_cache(mappable())(self._random_access)
        if len(table):
            self._recent(0)  # detects shards of another vocabulary immediately

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._recent(number)

    def _random_access(self, number: int) -> np.ndarray:
        """A map without read-ahead, for random access to rows."""
        tokens = self.fresh(number)
        if isinstance(tokens, np.memmap) and hasattr(mmap, "MADV_RANDOM"):
            tokens._mmap.madvise(mmap.MADV_RANDOM)
        return np.asarray(tokens)  # a slice of a memmap is another memmap, at five times the cost

    def fresh(self, number: int) -> np.ndarray:
        """A separate map for sequential reading.
        Raises DataError if the shard contradicts the manifest.
        """
        entry, dtype = self.table[number], token_dtype(self.vocab_size)
        return map_shard(self.table.folder / entry["path"], "tokens", dtype, entry["tokens"])


def mappable() -> int:
    """Maximum number of mapped shards of a stream: a quarter of the process's file descriptors,
    since each map uses one.
    """
    try:
        import resource
    except ImportError:
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_MAPPED if soft == resource.RLIM_INFINITY else max(1, min(soft // 4, MAX_MAPPED))


def map_shard(path: Path, name: str, dtype: type, length: int | None = None) -> np.ndarray:
    """One array (length,) of a shard as a memory map. Raises DataError for a damaged shard, an
    array of another type or shape, or if a limit of the process is too low.
    """
    try:
        array = tensorfile.memmap(path, name)
    except (OSError, tensorfile.BadTensorFile) as e:
        if getattr(e, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise DataError(
                f"shard {path} cannot be opened: {e}",
                next_step="raise ulimit -n or vm.max_map_count; the data are sound",
            ) from e
        raise DataError(f"shard {path} cannot be read: {e}", next_step=_rebuild(path)) from e
    if array.dtype != dtype or array.ndim != 1 or length not in (None, len(array)):
        raise DataError(
            f"shard {path} stores {name} as {array.dtype} {array.shape}",
            allowed=f"{np.dtype(dtype)} ({'n' if length is None else length},)",
            next_step=_rebuild(path),
        )
    return array


def _rebuild(path: Path) -> str:
    return f"delete {path.parent} and run again to rebuild it"


class TokenStream:
    """The shards of one split, memory-mapped.
    A window is seq_len + 1 tokens; windows do not cross shards.
    """

    def __init__(self, folder: Path, split: dict, vocab_size: int):
        self.n_tokens, self.n_bytes = split["tokens"], split["bytes"]
        self.n_documents = split["documents"]
        self.vocab_size = vocab_size
        self.shards = ShardTable(folder, split["shards"])
        self._tokens = MappedShards(self.shards, vocab_size)
        self._windows_before = cache(self._count_windows)
        self._windows_before_in = lru_cache(BLOCKS_KEPT)(self._count_windows_in)
        self._grid = lru_cache(min(GRIDS_KEPT, mappable()))(self._make_grid)

    @property
    def paths(self) -> list[Path]:
        """The file of each shard."""
        return [self.shards.folder / entry["path"] for entry in self.shards]

    @property
    def document_hashes(self) -> np.ndarray:
        """int64 (n_documents,), copied from the shards, so that none stays mapped."""
        return np.concatenate(
            [
                np.array(map_shard(path, "document_hashes", np.int64, entry["documents"]))
                for path, entry in zip(self.paths, self.shards)
            ]
        )

    @property
    def tokenizer_sha256(self) -> list[str]:
        """The tokenizer hash in the header of each shard."""
        return [tensorfile.read_header(p).metadata.get("tokenizer_sha256", "") for p in self.paths]

    def shard_tokens(self) -> list[int]:
        """Tokens of each shard."""
        return [entry["tokens"] for entry in self.shards]

    def shard_document_starts(self) -> list[np.ndarray]:
        """Position of every document's first token in its shard, int64, per shard."""
        return [self.starts_in(shard) for shard in range(len(self.shards))]

    def starts_in(self, shard: int) -> np.ndarray:
        """Position of every document's first token in one shard, int64. Raises DataError for
        positions that do not rise, or lie outside the shard.
        """
        entry = self.shards[shard]
        path = self.shards.folder / entry["path"]
        starts = np.array(map_shard(path, "document_starts", np.int64, entry["documents"]))
        bounds = np.concatenate([[0], starts, [entry["tokens"]]])
        if (bounds[1:] <= bounds[:-1]).any():
            raise DataError(
                f"shard {path} holds document_starts that do not rise within its tokens",
                next_step=_rebuild(path),
            )
        return starts

    def documents(self) -> Iterator[tuple[str, int, int]]:
        """(source, start, stop) of every document in the split, in order. A shard is opened when
        its first document is reached.
        """
        for shard, entry in enumerate(self.shards):
            first = self.shards.start(shard)
            bounds = [*(self.starts_in(shard) + first).tolist(), first + entry["tokens"]]
            yield from zip(repeat(entry["source"]), bounds, bounds[1:])

    @property
    def document_starts(self) -> np.ndarray:
        """Position of every document's first token in the split, int64 (n_documents,)."""
        return np.concatenate(
            [
                starts + self.shards.start(shard)
                for shard, starts in enumerate(self.shard_document_starts())
            ]
        )

    @require(lambda seq_len: seq_len >= 1, "a window has at least one input")
    def n_windows(self, seq_len: int) -> int:
        """Number of windows of seq_len + 1 tokens in the shards; the last tokens of a shard may not
        fill one.
        """
        return int(self._windows_before(seq_len)[-1])

    def n_labels(self, seq_len: int) -> int:
        """Labels of all rows, without padding."""
        return self.n_windows(seq_len) * seq_len

    def dropped_tokens(self, seq_len: int) -> int:
        """Tokens of the split that are the label of no row, besides the leading one of each
        shard.
        """
        return self.shards.n_tokens - len(self.shards) - self.n_labels(seq_len)

    def padding(self, seq_len: int) -> int:
        """Positions of all rows that hold no token."""
        return self.n_windows(seq_len) * seq_len - self.n_labels(seq_len)

    def part_windows(self, seq_len: int) -> np.ndarray:
        """Windows of every part of the table of shards, int64 (n_parts,)."""
        return self.shards.windows(seq_len)

    def windows_in(self, part: int, seq_len: int) -> np.ndarray:
        """Windows of every shard of a part, int64."""
        return n_windows(self.shards.lengths(part), seq_len)

    def _count_windows(self, seq_len: int) -> np.ndarray:
        """Windows before every part, and of all, int64 (n_parts + 1,)."""
        return sums_before(self.part_windows(seq_len))

    def _count_windows_in(self, part: int, seq_len: int) -> np.ndarray:
        """Windows of a part before every shard of it, and of all, int64."""
        return sums_before(self.windows_in(part, seq_len))

    def places(self, numbers: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard of every window, and its number there, int64 (len(numbers),)."""
        numbers, before = np.asarray(numbers, np.int64), self._windows_before(seq_len)
        parts = np.searchsorted(before, numbers, side="right") - 1
        shards, places = self.shards.first[parts], numbers - before[parts]
        for part in set(parts[self.shards.sizes[parts] > 1].tolist()):
            here, inner = parts == part, self._windows_before_in(part, seq_len)
            shard = np.searchsorted(inner, places[here], side="right") - 1
            shards[here] += shard
            places[here] -= inner[shard]
        return shards, places

    def _make_grid(self, shard: int, seq_len: int) -> np.ndarray:
        """A shard as a view (n_windows, seq_len + 1); consecutive windows share a token."""
        return sliding_window_view(self._tokens[shard], seq_len + 1)[::seq_len]

    def shard_windows(self, seq_len: int) -> list[int]:
        """Windows of every shard."""
        parts = range(len(self.shards.parts))
        return [n for part in parts for n in self.windows_in(part, seq_len).tolist()]

    def spans(self, seq_len: int) -> dict[str, tuple[int, int]]:
        """(first window, number of windows) of every source, in order."""
        return self.shards.spans(self.part_windows(seq_len))

    def window(self, number: int, seq_len: int) -> np.ndarray:
        """Tokens of one window, int64 (seq_len + 1,).
        Raises DataError for an id outside the vocabulary.
        """
        return self.windows(np.array([number]), seq_len)[0]

    @require(
        lambda self, numbers, seq_len: within(numbers, self.n_windows(seq_len)),
        "window numbers are 0 … n_windows-1",
    )
    def windows(self, numbers: np.ndarray, seq_len: int) -> np.ndarray:
        """Tokens of windows by number, int64 (len(numbers), seq_len + 1).
        Raises DataError for an id outside the vocabulary.
        """
        shards, places = self.places(numbers, seq_len)
        out = np.empty((len(numbers), seq_len + 1), token_dtype(self.vocab_size))
        for shard in set(shards.tolist()):
            here = shards == shard
            out[here] = self._grid(shard, seq_len)[places[here]]
        return self._checked(out).astype(np.int64)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if ids.max(initial=0) >= self.vocab_size:
            raise DataError(
                f"a shard under {self.shards.folder} holds token id {int(ids.max())}",
                allowed=f"0 … {self.vocab_size - 1}",
                next_step=_rebuild(self.shards.path(0)),
            )
        return ids

    def token_range(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1 of the split in order, over shard boundaries, int64.
        Raises DataError for an id outside the vocabulary.
        """
        pieces = [
            np.asarray(self._tokens.fresh(shard)[max(start - first, 0) : stop - first], np.int64)
            for shard, first, _ in self.shards.overlapping(start, stop)
        ]
        return self._checked(np.concatenate(pieces)) if pieces else np.zeros(0, np.int64)


def within(numbers: np.ndarray, n: int) -> bool:
    """Whether all numbers are in 0 … n-1."""
    return len(numbers) == 0 or (int(np.min(numbers)) >= 0 and int(np.max(numbers)) < n)

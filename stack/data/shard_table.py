"""The table of the shards of a split: listed in the manifest, or in blocks in files beside it.

    manifest.json       hash, sums and windows of each block
    train-00000.shards  a block: one row of fixed width for each of up to BLOCK_SHARDS shards of a
                        source: tokens, documents and bytes (int64), sha256, name of the file

The hash of the manifest covers the blocks, and their hashes cover the shards.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from stackproof.spec.canonical import sha256_bytes
from stackproof.spec.errors import DataError
from stackproof.spec.files import MAX_TEXT_BYTES, read_bytes, write_atomically

LISTED_SHARDS = 10_000  # in a manifest or a record; of a longer table it holds the blocks
BLOCK_SHARDS, BLOCKS_KEPT = 1024, 256  # 20 MB of blocks at most
COUNTED = ("tokens", "documents", "bytes")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
WINDOW_SIZES = tuple(2**k for k in range(4, 21))  # in tokens, of windows that a block counts


def row_dtype(name_bytes: int) -> np.dtype:
    """A row of a block, in which the longest name of a file has `name_bytes`."""
    return np.dtype([*((k, "<i8") for k in COUNTED), ("sha256", "V32"), ("path", f"S{name_bytes}")])


def is_block(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a manifest is a block of shards, and not one shard."""
    return "n_shards" in entry


def n_windows(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Windows of seq_len + 1 tokens in shards of these lengths."""
    return (lengths - 1) // seq_len


def sums_before(counts: np.ndarray) -> np.ndarray:
    """The sum of all counts before each, and of all, int64 (len(counts) + 1,)."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def write_blocks(folder: Path, split: str, entries: Sequence[dict]) -> list[dict]:
    """Write the entries of shards as blocks beside them. Returns the entries of the blocks."""
    written: list[dict] = []
    for source, of_source in groupby(entries, key=lambda e: e["source"]):
        shards = list(of_source)
        for first in range(0, len(shards), BLOCK_SHARDS):
            block = shards[first : first + BLOCK_SHARDS]
            path = folder / f"{split}-{len(written):05d}.shards"
            dtype = row_dtype(max(len(e["path"].encode()) for e in block))
            rows = np.array(
                [
                    (*(e[k] for k in COUNTED), bytes.fromhex(e["sha256"]), e["path"].encode())
                    for e in block
                ],
                dtype,
            )
            data = rows.tobytes()
            write_atomically(path, data)
            written.append(
                {"path": path.name, "sha256": sha256_bytes(data), "bytes": len(data)}
                | {"source": source, "n_shards": len(rows)}
                | _sums(rows)
            )
    return written


def _sums(rows: np.ndarray) -> dict[str, Any]:
    return {
        **{k: int(rows[k].sum()) for k in COUNTED if k != "bytes"},
        "windows": [int(n_windows(rows["tokens"], n).sum()) for n in WINDOW_SIZES],
    }


def require_beside(folder: Path, name: str) -> None:
    """Raises DataError for the name of a file that does not lie in the folder itself."""
    if not FILE_NAME.fullmatch(name):
        raise DataError(
            f"the manifest in {folder} names a file outside of the folder",
            value=name,
            allowed="names of files beside the manifest",
        )


class ShardTable(Sequence):
    """The entries of the shards of a split by number.

    A part is an entry of the manifest: a shard, or a block. The file of a block is read when one of
    its shards is needed, and compared with its hash and sums; BLOCKS_KEPT blocks stay in memory.
    `first` and `starts` int64 (n_parts + 1,) hold the first shard and the first token of each part.
    """

    def __init__(self, folder: Path, entries: Sequence[dict]):
        self.folder, self.parts = folder, entries
        self.sizes = np.array([e.get("n_shards", 1) for e in entries], np.int64)
        self.tokens = np.array([e["tokens"] for e in entries], np.int64)
        self.first, self.starts = sums_before(self.sizes), sums_before(self.tokens)
        self._rows = lru_cache(BLOCKS_KEPT)(self._read)

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The entry of a shard. Raises IndexError, and DataError for a damaged block."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        part, place = self._place(number)
        entry = self.parts[part]
        if not is_block(entry):
            return entry
        row = self._rows(part)[place]
        path = row["path"].decode("ascii", "replace")
        require_beside(self.folder, path)
        return {
            **{k: int(row[k]) for k in COUNTED},
            **{"sha256": row["sha256"].tobytes().hex(), "path": path, "source": entry["source"]},
        }

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / self[number]["path"]

    def _place(self, number: int) -> tuple[int, int]:
        """Part of a shard, and its place there."""
        part = int(np.searchsorted(self.first, number, side="right")) - 1
        return part, number - int(self.first[part])

    def shards_of(self, part: int) -> range:
        """The numbers of the shards of a part."""
        return range(int(self.first[part]), int(self.first[part + 1]))

    def lengths(self, part: int) -> np.ndarray:
        """Tokens of the shards of a part, int64."""
        one = self.tokens[part : part + 1]
        return self._rows(part)["tokens"] if is_block(self.parts[part]) else one

    def start(self, number: int) -> int:
        """Position of the first token of a shard in the split."""
        part, place = self._place(number)
        return int(self.starts[part] + self.lengths(part)[:place].sum())

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(number, first token, tokens) of the shards that hold tokens start … stop-1 of the
        split.
        """
        low, high = np.searchsorted(self.starts, [start, stop], side="right").tolist()
        for part in range(max(low - 1, 0), min(high, len(self.parts))):
            lengths = self.lengths(part)
            firsts = self.starts[part] + sums_before(lengths)[:-1]
            for place in np.flatnonzero((firsts < stop) & (firsts + lengths > start)).tolist():
                yield int(self.first[part]) + place, int(firsts[place]), int(lengths[place])

    def windows(self, seq_len: int) -> np.ndarray:
        """Windows of seq_len + 1 tokens in each part, int64 (n_parts,). Blocks count those of
        WINDOW_SIZES; for another `seq_len` each block is read.
        """
        counted = WINDOW_SIZES.index(seq_len) if seq_len in WINDOW_SIZES else None
        counts = n_windows(self.tokens, seq_len)
        for part in (i for i, e in enumerate(self.parts) if is_block(e)):
            counts[part] = (
                n_windows(self.lengths(part), seq_len).sum()
                if counted is None
                else self.parts[part]["windows"][counted]
            )
        return counts

    def sample(self, n: int) -> list[dict[str, Any]]:
        """Entries of about `n` shards, at least one of each source, spread evenly over each; all
        shards if there are not more.
        """
        if len(self) <= n:
            return list(self)
        spans, chosen = self.spans(self.sizes), []
        for first, size in spans.values():
            k = min(size, max(1, n // len(spans)))
            chosen += [self[first + (2 * i + 1) * size // (2 * k)] for i in range(k)]
        return chosen

    def spans(self, counts: np.ndarray) -> dict[str, tuple[int, int]]:
        """(first, number) by source of what is counted per part, as its shards or windows; the
        shards of a source are consecutive.
        """
        spans, first = {}, 0
        for entry, n in zip(self.parts, counts.tolist()):
            source = entry["source"]
            spans[source] = (
                (spans[source][0], spans[source][1] + n) if source in spans else (first, n)
            )
            first += n
        return spans

    def _read(self, part: int) -> np.ndarray:
        """The rows of a block. Raises DataError for a file that is not what the manifest states."""
        entry = self.parts[part]
        require_beside(self.folder, entry["path"])
        path = self.folder / entry["path"]
        damaged = DataError(
            f"{path} is not the block of shards that the manifest describes",
            allowed=f"sha256 {entry['sha256'][:12]}…",
            next_step=f"restore it, or delete {self.folder} and run again to rebuild it",
        )
        try:
            data = read_bytes(path, min(entry["bytes"], MAX_TEXT_BYTES))
        except OSError as e:
            raise damaged from e
        width, rest = divmod(len(data), entry["n_shards"])
        names = width - row_dtype(1).itemsize + 1
        if sha256_bytes(data) != entry["sha256"] or rest or names < 1:
            raise damaged
        rows = np.frombuffer(data, row_dtype(names))
        if rows["tokens"].min() < 1 or any(entry[k] != v for k, v in _sums(rows).items()):
            raise damaged
        return rows

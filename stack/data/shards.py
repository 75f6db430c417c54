"""Token shards: safetensors files of ids and document starts, described by a manifest with hashes."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from contracts.conditions import require
from spec.canonical import sha256_file
from spec.errors import DataError
from stack import tensorfile

MAX_SHARD_TOKENS = 64 * 2**20


def normalised(text: str) -> str:
    """Text without differences of case and white space."""
    return " ".join(text.casefold().split())


def document_hash(text: str) -> int:
    """First 8 bytes of sha256 of the normalised text, as a signed 64-bit integer."""
    return int.from_bytes(hashlib.sha256(normalised(text).encode()).digest()[:8], "big", signed=True)


def token_dtype(vocab_size: int) -> type:
    """uint16 where every id fits, else uint32."""
    return np.uint16 if vocab_size <= 65536 else np.uint32


def pack_ids(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Ids in the storage type. Raises DataError for an id outside the vocabulary, before a cast could wrap it."""
    array = np.asarray(ids, np.int64)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        worst = int(array.max()) if array.max() >= vocab_size else int(array.min())
        raise DataError(f"token id {worst} is outside the vocabulary", allowed=f"0 … {vocab_size - 1}", next_step="rebuild the tokenizer")
    return array.astype(token_dtype(vocab_size))


def write_split(
    folder: Path, split: str, documents: Iterable[tuple[list[int], int]], tokenizer, *, max_tokens: int = MAX_SHARD_TOKENS
) -> list[dict]:
    """Write (ids, document hash) pairs as shards; an end-of-text id begins the split and ends every document.

    Returns the manifest's entries: path, sha256, bytes, tokens, documents.
    """
    entries: list[dict] = []
    parts, starts, hashes, length = [np.array([tokenizer.eos_id])], [], [], 1
    for ids, digest in documents:
        starts.append(length)
        hashes.append(digest)
        parts.append(pack_ids([*ids, tokenizer.eos_id], tokenizer.vocab_size))
        length += len(ids) + 1
        if length >= max_tokens:
            entries.append(_write(folder, split, len(entries), parts, starts, hashes, tokenizer))
            parts, starts, hashes, length = [np.array([tokenizer.eos_id])], [], [], 1
    if starts:
        entries.append(_write(folder, split, len(entries), parts, starts, hashes, tokenizer))
    return entries


def _write(folder: Path, split: str, number: int, parts: list, starts: list, hashes: list, tokenizer) -> dict:
    path = folder / f"{split}-{number:05d}.safetensors"
    tokens = np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size))
    arrays = {"tokens": tokens, "document_starts": np.array(starts, np.int64), "document_hashes": np.array(hashes, np.int64)}
    metadata = {"tokenizer_sha256": tokenizer.sha256, "split": split, "vocab_size": str(tokenizer.vocab_size)}
    tensorfile.write(path, arrays, metadata)
    return {
        "path": path.name,
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "tokens": int(tokens.size),
        "documents": len(starts),
    }


class TokenStream:
    """The shards of one split, memory-mapped. A window is seq_len + 1 tokens; windows do not cross shards."""

    def __init__(self, folder: Path, split: dict, vocab_size: int):
        self.n_tokens, self.n_bytes, self.n_documents = split["tokens"], split["bytes"], split["documents"]
        self.vocab_size = vocab_size
        self.paths = [folder / s["path"] for s in split["shards"]]
        self._tokens = [self._map(p, "tokens") for p in self.paths]
        for path, tokens in zip(self.paths, self._tokens):
            if tokens.dtype != token_dtype(vocab_size):
                raise DataError(
                    f"shard {path} stores ids as {tokens.dtype}",
                    allowed=f"{np.dtype(token_dtype(vocab_size))} for a vocabulary of {vocab_size}",
                    next_step=f"delete {path.parent} and run again to rebuild it",
                )
        self._starts = np.cumsum([0, *(len(t) for t in self._tokens)])

    @staticmethod
    def _map(path: Path, name: str) -> np.ndarray:
        try:
            return tensorfile.memmap(path, name)
        except (OSError, tensorfile.BadTensorFile) as e:
            raise DataError(f"shard {path} cannot be read: {e}", next_step=f"delete {path.parent} and run again to rebuild it") from e

    @property
    def document_hashes(self) -> np.ndarray:
        """int64 (n_documents,), read from the shards."""
        return np.concatenate([np.asarray(self._map(p, "document_hashes")) for p in self.paths])

    @property
    def tokenizer_sha256(self) -> list[str]:
        """What each shard's header says it was encoded with."""
        return [tensorfile.read_header(p).metadata.get("tokenizer_sha256", "") for p in self.paths]

    @property
    def document_starts(self) -> np.ndarray:
        """Position of every document's first token in the split, int64 (n_documents,)."""
        parts = [np.asarray(self._map(p, "document_starts")) + first for p, first in zip(self.paths, self._starts.tolist())]
        return np.concatenate(parts)

    @require(lambda seq_len: seq_len >= 1, "a window has at least one input")
    def n_windows(self, seq_len: int) -> int:
        """How many windows of seq_len + 1 tokens the shards hold; the last few tokens of a shard may fill none."""
        return int(sum((len(t) - 1) // seq_len for t in self._tokens))

    def window(self, number: int, seq_len: int) -> np.ndarray:
        """Tokens of one window, int64 (seq_len + 1,). Raises DataError for an id outside the vocabulary."""
        return self.windows(np.array([number]), seq_len)[0]

    @require(lambda self, numbers, seq_len: _within(numbers, self.n_windows(seq_len)), "window numbers are 0 … n_windows-1")
    def windows(self, numbers: np.ndarray, seq_len: int) -> np.ndarray:
        """Tokens of windows by number, int64 (len(numbers), seq_len + 1). Raises DataError for an id outside the vocabulary."""
        ends = np.cumsum([(len(t) - 1) // seq_len for t in self._tokens])
        shards = np.searchsorted(ends, numbers, side="right")
        out = np.empty((len(numbers), seq_len + 1), np.int64)
        for row, (shard, number) in enumerate(zip(shards.tolist(), np.asarray(numbers).tolist())):
            start = (number - (int(ends[shard - 1]) if shard else 0)) * seq_len
            out[row] = self._tokens[shard][start : start + seq_len + 1]
        return self._checked(out)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if ids.max(initial=0) >= self.vocab_size:
            raise DataError(
                f"a shard under {self.paths[0].parent} holds token id {int(ids.max())}",
                allowed=f"0 … {self.vocab_size - 1}",
                next_step=f"delete {self.paths[0].parent} and run again to rebuild it",
            )
        return ids

    def token_range(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1 of the split in order, over shard boundaries, int64. Raises DataError for an id outside the vocabulary."""
        pieces = []
        for first, tokens in zip(self._starts.tolist(), self._tokens):
            low, high = max(start - first, 0), min(stop - first, len(tokens))
            if low < high:
                pieces.append(np.asarray(tokens[low:high], np.int64))
        return self._checked(np.concatenate(pieces)) if pieces else np.zeros(0, np.int64)


def _within(numbers: np.ndarray, n: int) -> bool:
    """Whether all numbers are in 0 … n-1."""
    return len(numbers) == 0 or (int(np.min(numbers)) >= 0 and int(np.max(numbers)) < n)

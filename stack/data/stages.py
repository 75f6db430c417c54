"""The work of one process on one part of a corpus: read and filter it into chunks, and encode a
chunk into shards.

Both are pure functions of their job, write their result atomically, and skip a finished one.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

import numpy as np

from stackproof import tensorfile
from stackproof.config import ExactDedup, HashSplit, NearDedup, TailSplit
from stackproof.data import corpus, dedup, filters, receipts, shards
from stackproof.data import tokenizer as tokenizers
from stackproof.data.corpus import Part, TextSource
from stackproof.data.tokenizer import Tokenizer
from stackproof.spec.canonical import canonical_json, parse_strict

SPLITS = ("train", "validation")
CHUNK_BYTES = 32 * 2**20
HELD_OUT_MARK = 0x5A5A5A5A5A5A5A5A
SHINGLES_AT_ONCE, ENCODED_AT_ONCE = 4096, 512


@dataclass(frozen=True)
class FilterJob:
    """Job: read and filter one part."""

    number: int
    source: str
    cfg: TextSource
    part: Part
    plugins: tuple[str, ...]
    dedup: ExactDedup | NearDedup
    grams: Path | None
    work: Path


@dataclass(frozen=True)
class EncodeJob:
    """Job: encode one chunk into shards."""

    number: int
    source: str
    chunk: Path
    keep: np.ndarray
    split: HashSplit | TailSplit
    tokenizer: Path
    work: Path
    folder: Path


@dataclass
class Chunk:
    """Filtered documents of one source in a file of the work folder."""

    source: str
    path: Path
    keep: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


def write_json(path: Path, document: dict) -> None:
    """Write a JSON document atomically."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_bytes(canonical_json(document))
    os.replace(temporary, path)


def filter_part(job: FilterJob) -> dict:
    """Read one part, keep the documents that pass every filter, and write them as chunks. Returns
    the receipt. A finished part is not read again.
    """
    final = job.work / f"part-{job.number:05d}"
    if (final / "receipt.json").is_file():
        return parse_strict((final / "receipt.json").read_bytes(), origin=str(final))
    temporary = job.work / f".part-{job.number:05d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    receipt, texts, size, n_chunks = receipts.empty(), [], 0, 0
    plugins = filters.load_plugins(job.plugins)
    grams = tensorfile.memmap(job.grams, "grams") if job.grams else None
    for item in corpus.read_part(job.cfg, job.part):
        if (
            text := receipts.judge(receipt, item, corpus.languages_of(job.cfg), plugins, grams)
        ) is None:
            continue
        texts.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            _write_chunk(temporary / f"chunk-{n_chunks:04d}.safetensors", texts, job.dedup)
            texts, size, n_chunks = [], 0, n_chunks + 1
    if texts:
        _write_chunk(temporary / f"chunk-{n_chunks:04d}.safetensors", texts, job.dedup)
        n_chunks += 1
    receipt["chunks"] = n_chunks
    write_json(temporary / "receipt.json", receipt)
    if (
        final / "receipt.json"
    ).is_file():  # another process finished it first, with the same result
        shutil.rmtree(temporary)
        return receipt
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return receipt


def _write_chunk(path: Path, texts: list[str], how: ExactDedup | NearDedup) -> None:
    blobs = [t.encode() for t in texts]
    arrays = {
        "text": np.frombuffer(b"".join(blobs), np.uint8),
        "offsets": np.cumsum([0, *map(len, blobs)]).astype(np.int64),
        "hashes": np.array([shards.document_hash(t) for t in texts], np.int64),
    }
    match how:
        case NearDedup():
            pieces = [
                texts[i : i + SHINGLES_AT_ONCE] for i in range(0, len(texts), SHINGLES_AT_ONCE)
            ]
            arrays["signatures"] = np.concatenate(
                [dedup.signatures(p, how.shingle_words) for p in pieces]
            )
        case ExactDedup():
            pass
        case _:
            assert_never(how)
    tensorfile.write(path, arrays, {})


class Signatures(Sequence):
    """MinHash signatures of chunks by number, memory-mapped on each access, so that pages do not
    stay resident.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        return tensorfile.memmap(self.paths[number], "signatures")


def chunk_texts(path: Path, keep: np.ndarray) -> Iterator[str]:
    """The kept documents of a chunk."""
    text, offsets = tensorfile.memmap(path, "text"), np.asarray(tensorfile.memmap(path, "offsets"))
    for i in np.flatnonzero(keep).tolist():
        yield text[offsets[i] : offsets[i + 1]].tobytes().decode()


def sides(
    cfg: HashSplit | TailSplit, texts: Iterable[str], hashes: Iterable[int]
) -> Iterator[tuple[str, str, int]]:
    """(split, text, document hash) of every text.
    Equal documents are always on one side of a hash split.

    A tail split cuts each document in two; the hash of the held-out half is that of the whole with
    HELD_OUT_MARK, so the halves differ.
    """
    match cfg:
        case HashSplit(validation_frac=frac):
            for text, digest in zip(texts, hashes):
                yield ("validation" if (digest % 2**32) / 2**32 < frac else "train"), text, digest
        case TailSplit(validation_frac=frac):
            for text, digest in zip(texts, hashes):
                cut = len(text) - round(len(text) * frac)
                for split, part, mark in (
                    ("train", text[:cut], 0),
                    ("validation", text[cut:], HELD_OUT_MARK),
                ):
                    if part:
                        yield split, part, digest ^ mark
        case _:
            assert_never(cfg)


def chunk_sides(cfg: HashSplit | TailSplit, chunk: Chunk) -> Iterator[tuple[str, str, int]]:
    """(split, text, document hash) of the kept documents of a chunk."""
    hashes = np.asarray(tensorfile.memmap(chunk.path, "hashes"))[chunk.keep].tolist()
    return sides(cfg, chunk_texts(chunk.path, chunk.keep), hashes)


def encode_chunk(job: EncodeJob) -> dict:
    """Write the shards of one chunk. Returns counts and manifest entries per split.
    A finished chunk is not encoded again.
    """
    done = job.work / f"encoded-{job.number:05d}.json"
    if done.is_file():
        return parse_strict(done.read_bytes(), origin=str(done))
    tokenizer = tokenizers.load_tokenizer(job.tokenizer)
    texts: dict[str, list[str]] = {s: [] for s in SPLITS}
    hashes: dict[str, list[int]] = {s: [] for s in SPLITS}
    for split, text, digest in chunk_sides(job.split, Chunk(job.source, job.chunk, job.keep)):
        texts[split].append(text)
        hashes[split].append(digest)
    result = {
        split: _encode_split(job, split, texts[split], hashes[split], tokenizer) for split in SPLITS
    }
    write_json(done, result)
    return result


def _encode_split(
    job: EncodeJob, split: str, texts: list[str], hashes: list[int], tokenizer: Tokenizer
) -> dict:
    counts = {"documents": len(texts), "bytes": 0, "dropped_chars": 0}
    sizes = tokenizer.token_bytes

    def encoded() -> Iterator[tuple[np.ndarray, int]]:
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            for encoding, digest in zip(
                tokenizer.encode_batch(texts[start : start + ENCODED_AT_ONCE]), hashes[start:]
            ):
                ids = np.asarray(encoding.ids, np.int64)
                counts["bytes"] += int(sizes[ids].sum(dtype=np.int64))
                counts["dropped_chars"] += encoding.dropped_chars
                yield ids, digest

    entries = shards.write_split(
        job.folder, split, encoded(), tokenizer, first_number=job.number, max_tokens=2**62
    )
    return {
        **counts,
        "tokens": sum(e["tokens"] for e in entries),
        "shards": [{**e, "source": job.source} for e in entries],
    }

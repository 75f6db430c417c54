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
from stackproof.data import corpus, dedup, plugins, receipts, shards
from stackproof.data import tokenizer as tokenizers
from stackproof.data.corpus import Part, TextSource
from stackproof.spec.canonical import canonical_json, read_json
from stackproof.spec.files import process_name, write_atomically

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


@dataclass
class Chunk:
    """Filtered documents of one source in a file of the work folder; `part` is the number of their
    part.
    """

    source: str
    part: int
    path: Path
    keep: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


@dataclass(frozen=True)
class EncodeJob:
    """Job: encode one chunk into shards."""

    number: int
    chunk: Chunk
    split: HashSplit | TailSplit
    work: Path
    folder: Path


def write_json(path: Path, document: dict) -> None:
    """Write a JSON document atomically and durably."""
    write_atomically(path, canonical_json(document))


def part_folder(job: FilterJob) -> Path:
    """The finished part of a job: its chunks and its receipt."""
    return job.work / f"part-{job.number:05d}"


def filter_part(job: FilterJob) -> dict:
    """Read one part, keep the documents that pass every filter, and write them as chunks. Returns
    the receipt. A finished part is not read again.
    """
    final = part_folder(job)
    if (final / "receipt.json").is_file():
        return read_json(final / "receipt.json")
    temporary = final.with_name(f".{final.name}-{process_name()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    receipt = receipts.empty() | {"chunks": 0}
    # the process that made the job has loaded them too
    with plugins.permitted(job.plugins):
        loaded = plugins.load(job.plugins)
    grams = tensorfile.memmap(job.grams, "grams") if job.grams else None
    judged = (
        receipts.judge(receipt, item, job.cfg.languages, loaded, grams)
        for item in corpus.read_part(job.cfg, job.part)
    )
    for texts in _chunks(text for text in judged if text is not None):
        path = temporary / f"chunk-{receipt['chunks']:04d}.safetensors"
        _write_chunk(path, texts, job.dedup)
        receipt["chunks"] += 1
    write_json(temporary / "receipt.json", receipt)
    # another process finished it first, with the same result
    if (final / "receipt.json").is_file():
        shutil.rmtree(temporary)
        return receipt
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return receipt


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of consecutive texts, each of CHUNK_BYTES or the first size above it."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_chunk(path: Path, texts: list[str], how: ExactDedup | NearDedup) -> None:
    blobs = [t.encode() for t in texts]
    arrays = {
        "text": np.frombuffer(b"".join(blobs), np.uint8),
        "offsets": np.cumsum([0, *map(len, blobs)]).astype(np.int64),
        "hashes": np.array([shards.document_hash(t) for t in texts], np.int64),
    }
    match how:
        case NearDedup():
            arrays["signatures"] = np.concatenate(
                [
                    dedup.signatures(texts[i : i + SHINGLES_AT_ONCE], how.shingle_words)
                    for i in range(0, len(texts), SHINGLES_AT_ONCE)
                ]
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
        return read_json(done)
    tokenizer = tokenizers.load_tokenizer(job.work / "tokenizer.json")
    documents: dict[str, list[tuple[str, int]]] = {s: [] for s in SPLITS}
    for split, text, digest in chunk_sides(job.split, job.chunk):
        documents[split].append((text, digest))
    result = {
        split: shards.write_documents(
            job.folder,
            split,
            documents[split],
            tokenizer,
            source=job.chunk.source,
            encode=tokenizer.encode_batch,
            at_once=ENCODED_AT_ONCE,
            first_number=job.number,
            max_tokens=2**62,
        )
        for split in SPLITS
    }
    write_json(done, result)
    return result

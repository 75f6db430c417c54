"""Builds a data set: read and filter, deduplicate, tokenise, write shards.

Every stage processes one part at a time and can be interrupted anywhere.

    folder/.work/plan.json, part-00000/   finished parts; the next run of the same plan resumes here
    folder/train-00000.safetensors …      shards of the splits
    folder/tokenizer.json, manifest.json  written last: a folder with a manifest is complete
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from stackproof import tensorfile
from stackproof.config import DataConfig, NearDedup
from stackproof.contracts import subject
from stackproof.contracts.gate import call_check
from stackproof.data import corpus, dedup, filters, plugins, receipts, shards
from stackproof.data import tokenizer as tokenizers
from stackproof.data.corpus import TextSource
from stackproof.data.files import evaluation_texts
from stackproof.data.manifest import read_manifest, write_manifest
from stackproof.data.stages import (
    SPLITS,
    Chunk,
    EncodeJob,
    FilterJob,
    Signatures,
    chunk_sides,
    encode_chunk,
    filter_part,
    part_folder,
    write_json,
)
from stackproof.data.tokenizer import Tokenizer
from stackproof.data.workers import Pool
from stackproof.evidence.file_lock import file_lock
from stackproof.spec.canonical import canonical_json
from stackproof.spec.errors import DataError, UsageError
from stackproof.spec.files import holds, remedy, remove_leftovers, write_atomically
from stackproof.spec.gates import load_spec
from stackproof.tensorfile import BadTensorFile

FORMAT = "stackproof/data/3"
LEFTOVERS = ("safetensors", "shards")  # kinds of files of a split


@dataclass
class Progress:
    """Progress of a build. Bytes are those of the source files in the first stage, of kept text in
    the last.
    """

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0
    documents: int = 0
    dropped: int = 0


def build(
    cfg: DataConfig,
    folder: Path,
    *,
    workers: int = 1,
    pool: Callable[[Path], Pool] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict:
    """Build the data set in `folder` and return its manifest. Resumes an interrupted build. The
    jobs run in `workers` processes, or in the pool that `pool` makes of the work folder; the
    written files are the same.

    Raises DataError for an unreadable source, an empty split, or a source that changed meanwhile;
    UsageError if the folder holds another data set. Writes to no other folder.
    """
    plan, jobs = _plan(cfg, folder / ".work")
    _require_tokenizer(cfg)
    manifest_path = folder / "manifest.json"
    if manifest_path.is_file():
        return _finished(manifest_path, plan)
    _make(folder)
    if (others := {p.name for p in folder.iterdir()} - {".lock"}) and ".work" not in others:
        raise UsageError(
            f"{folder} holds something else",
            value=sorted(others)[0],
            allowed="an empty folder, or that of a build",
            next_step="another --out",
        )
    try:
        with file_lock(folder, "build"):
            if manifest_path.is_file():
                return _finished(manifest_path, plan)
            remove_leftovers(folder)
            return _Build(cfg, folder, plan, jobs, on_progress).run(workers, pool)
    except (OSError, BadTensorFile) as e:
        raise Unwritable(
            f"the data set could not be written to {folder}: {e}",
            allowed="a writable folder",
            next_step=f"{remedy(e)}, then repeat the command, which resumes; or another --out",
        ) from e


class Unwritable(DataError):
    """A data set that could not be written, on a full disk for example."""


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(
            f"cannot write to {folder}: {e.strerror}",
            allowed="a writable folder",
            next_step="another --out",
        ) from e


class GivenTokenizer(subject.Tokenizer):
    """A tokenizer that a configuration names."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer


class PlainText(subject.Corpus):
    """One short text, before any file of the corpus is read."""

    held_out_texts = ("A plain text, for a start.",)


def _require_tokenizer(cfg: DataConfig) -> None:
    """Raises DataError for a given tokenizer that loses text, before any text is read."""
    if cfg.tokenizer.kind != "file":
        return
    tokenizer = tokenizers.make_tokenizer(cfg.tokenizer, ())
    given = subject.Subject(tokenizer=GivenTokenizer(tokenizer), corpus=PlainText())
    verdict = call_check(load_spec().gates["tokenizer.round-trip"], given)
    if verdict.outcome != "pass":
        raise DataError(
            f"text does not survive the tokenizer {cfg.tokenizer.path}: {verdict.message}",
            allowed="tokenizers that give back what they were given: byte-level ones do",
            next_step="stack tokenizer train makes one",
        )


def changed_meanwhile() -> DataError:
    """The error for a corpus that changed during the build."""
    return DataError(
        "the corpus changed while it was read",
        next_step="run again when nothing writes to its files",
    )


# --- plan -----------------------------------------------------------------------------------------


def _plan(cfg: DataConfig, work: Path) -> tuple[dict, list[FilterJob]]:
    """The inputs that determine the result (configuration, sizes and times of all files), and the
    parts to read.
    """
    plugins.load(cfg.filters)
    if isinstance(cfg.dedup, NearDedup):
        dedup.require_library()
    jobs, files = [], []
    for name, source in corpus.sources_of(cfg.corpus).items():
        files += [[str(p), *_stamp(p)] for p in corpus.source_paths(source)]
        grams = work / "grams.safetensors" if cfg.decontaminate else None
        for part in corpus.parts(source):
            jobs.append(
                FilterJob(len(jobs), name, source, part, cfg.filters, cfg.dedup, grams, work)
            )
    files += [[p, *_stamp(Path(p))] for p in given_files(cfg)]
    decisive = cfg.model_dump(mode="json", exclude={"packing", "on_exhausted", "verify"})
    rules = filters.fingerprint(cfg.filters)
    return {
        "format": FORMAT,
        "extractor": corpus.EXTRACTOR_VERSION,
        "rules": rules,
        "config": decisive,
        "files": files,
    }, jobs


def given_files(cfg: DataConfig) -> list[str]:
    """Files other than the sources that affect the result."""
    return [*cfg.decontaminate, *([cfg.tokenizer.path] if cfg.tokenizer.kind == "file" else [])]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as e:
        raise DataError(
            f"cannot read {path}: {e.strerror}", next_step="check the file and its permissions"
        ) from e
    return status.st_size, status.st_mtime_ns


def _finished(path: Path, plan: dict) -> dict:
    """The manifest of a complete folder.
    Raises UsageError if it was built from other sources or another configuration.
    """
    built_from = path.with_name("plan.json")
    if not built_from.is_file() or not holds(built_from, canonical_json(plan)):
        raise UsageError(
            f"{path.parent} already holds another data set",
            allowed="a new folder, or the same sources and configuration",
            next_step="give another --out, or delete the folder",
        )
    # left by a build that was killed just before its end
    shutil.rmtree(path.with_name(".work"), ignore_errors=True)
    return read_manifest(path)


def _open_work(folder: Path, plan: dict) -> None:
    """Make the work folder of this plan; files of another plan are removed."""
    work = folder / ".work"
    path = work / "plan.json"
    if work.exists() and not (path.is_file() and holds(path, canonical_json(plan))):
        shutil.rmtree(work)
        for pattern in (f"{split}-*.{kind}" for split in SPLITS for kind in LEFTOVERS):
            for leftover in folder.glob(pattern):
                leftover.unlink()
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


# --- stages ---------------------------------------------------------------------------------------


@dataclass
class _Build:
    """A build in progress: the receipts of its parts, and their chunks with the documents kept."""

    cfg: DataConfig
    folder: Path
    plan: dict
    jobs: list[FilterJob]
    on_progress: Callable[[Progress], None]
    receipts: list[dict] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.folder / ".work"

    def run(self, workers: int, pool: Callable[[Path], Pool] | None = None) -> dict:
        """Every stage in order, then the manifest."""
        cfg, folder, work = self.cfg, self.folder, self.work
        _open_work(folder, self.plan)
        grams = _evaluation_grams(cfg, work)
        n_bytes = sum(j.part.n_bytes for j in self.jobs)
        own = Pool(workers if n_bytes > corpus.PART_BYTES else 1)
        with pool(work) if pool else own as running:
            self.receipts = self._filter(running, n_bytes)
            self.chunks = self._drop_repeats()
            by_source = self._by_source()
            tokenizer = self._tokenizer()
            encoded = self._encode(running)
        if _plan(cfg, work)[0] != self.plan:
            raise changed_meanwhile()
        manifest = self._manifest(by_source, tokenizer, encoded, grams)
        write_atomically(folder / "tokenizer.json", tokenizer.to_bytes())
        if grams is not None:
            shutil.copyfile(work / "grams.safetensors", folder / "grams.safetensors")
        write_json(folder / "plan.json", self.plan)
        manifest = write_manifest(folder, manifest)
        shutil.rmtree(work, ignore_errors=True)
        return manifest

    def _results(
        self,
        results: Iterable[tuple[FilterJob | EncodeJob, dict]],
        progress: Progress,
        count: Callable[[Any, dict], tuple[int, int, int]],
    ) -> list[dict]:
        """The results in the order of the jobs. `count` gives bytes, documents and dropped
        documents of one.
        """
        self.on_progress(progress)
        found = {}
        for job, result in results:
            found[job.number] = result
            n_bytes, documents, dropped = count(job, result)
            progress.done_bytes += n_bytes
            progress.documents += documents
            progress.dropped += dropped
            self.on_progress(progress)
        return [found[number] for number in sorted(found)]

    def _filter(self, pool: Pool, n_bytes: int) -> list[dict]:
        """Receipts of all parts."""

        def count(job: FilterJob, receipt: dict) -> tuple[int, int, int]:
            dropped = receipt["documents_in"] - receipt["documents_out"]
            return job.part.n_bytes, receipt["documents_in"], dropped

        return self._results(
            pool(filter_part, self.jobs), Progress("filter", total_bytes=n_bytes), count
        )

    def _drop_repeats(self) -> list[Chunk]:
        """All chunks in order, each with its kept documents; duplicates are counted in the receipts
        of their parts.
        """
        n_documents = sum(r["documents_out"] for r in self.receipts)
        self.on_progress(Progress("deduplicate", documents=n_documents))
        chunks = [
            Chunk(job.source, job.number, part_folder(job) / f"chunk-{c:04d}.safetensors")
            for job, receipt in zip(self.jobs, self.receipts)
            for c in range(receipt["chunks"])
        ]
        exact = dedup.first_of_each([np.array(tensorfile.memmap(c.path, "hashes")) for c in chunks])
        near = [np.zeros(len(k), bool) for k in exact]
        if isinstance(self.cfg.dedup, NearDedup) and chunks:
            signatures = Signatures([c.path for c in chunks])
            near = dedup.near_repeats(signatures, exact, self.cfg.dedup.similarity_min)
        for chunk, first, repeat in zip(chunks, exact, near):
            sizes = np.diff(np.asarray(tensorfile.memmap(chunk.path, "offsets")))
            receipt = self.receipts[chunk.part]
            receipts.drop_many(receipt, "exact-repeat", sizes[~first])
            receipts.drop_many(receipt, "near-repeat", sizes[repeat & first])
            chunk.keep = first & ~repeat
        return chunks

    def _by_source(self) -> dict[str, dict]:
        """The receipt of every source. Raises DataError for a source without kept documents, with
        the reason that dropped most of them.
        """
        whole = {}
        for name in corpus.sources_of(self.cfg.corpus):
            whole[name] = receipts.total(
                r for job, r in zip(self.jobs, self.receipts) if job.source == name
            )
            if not whole[name]["documents_out"]:
                raise DataError(
                    f"nothing is left of source {name}",
                    value=receipts.worst(whole[name]) or "no document in its files",
                    next_step=(
                        "check its paths, documents, text_field and languages, or leave the source "
                        "out"
                    ),
                )
        return whole

    @property
    def _n_kept(self) -> int:
        return sum(int(c.keep.sum()) for c in self.chunks)

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, trained on the kept documents of the training side, or loaded. A finished
        one is not trained again.
        """
        path, cfg = self.work / "tokenizer.json", self.cfg
        if path.is_file():
            return tokenizers.load_tokenizer(path)
        self.on_progress(Progress(f"{cfg.tokenizer.kind} tokenizer", documents=self._n_kept))
        texts = (
            text
            for chunk in self.chunks
            for split, text, _ in chunk_sides(cfg.split, chunk)
            if split == "train"
        )
        first = next(texts, None)
        if first is None:
            raise self._empty_split("train")
        tokenizer = tokenizers.make_tokenizer(cfg.tokenizer, chain([first], texts))
        write_atomically(path, tokenizer.to_bytes())
        return tokenizer

    def _empty_split(self, split: str) -> DataError:
        """The error for a split without documents, with the reason that dropped most of them."""
        lost = receipts.worst(receipts.total(self.receipts))
        return DataError(
            f"the {split} split is empty",
            value=(
                f"{self._n_kept} document(s) after filtering, data.split.kind = "
                f"{self.cfg.split.kind}"
            )
            + (f"; {lost}" if lost else ""),
            allowed="at least one document on each side",
            next_step=(
                "more documents (stack data build --documents paragraph cuts files), or --set a "
                "larger split.validation_frac, or split.kind=tail, which cuts each document in "
                "two; the keys of stack train begin with data."
            ),
        )

    def _encode(self, pool: Pool) -> list[dict]:
        """The encoded chunks."""
        jobs = [
            EncodeJob(i, chunk, self.cfg.split, self.work, self.folder)
            for i, chunk in enumerate(self.chunks)
        ]
        sizes = [c.path.stat().st_size for c in self.chunks]
        encoded = self._results(
            pool(encode_chunk, jobs),
            Progress("tokenise", total_bytes=sum(sizes)),
            lambda job, _: (sizes[job.number], int(job.chunk.keep.sum()), 0),
        )
        for split in SPLITS:
            if not any(r[split]["documents"] for r in encoded):
                self._remove_encoded()
                raise self._empty_split(split)
        return encoded

    def _remove_encoded(self) -> None:
        """Delete the shards of a data set that cannot be finished; its parts stay."""
        shards_of = (self.folder.glob(f"{split}-*.safetensors") for split in SPLITS)
        for path in chain(*shards_of, self.work.glob("encoded-*.json")):
            path.unlink()

    def _manifest(
        self,
        by_source: dict[str, dict],
        tokenizer: Tokenizer,
        encoded: list[dict],
        grams: dict | None,
    ) -> dict:
        built = self.cfg.model_dump(
            mode="json",
            include={
                "split",
                "tokenizer",
                "filters",
                "dedup",
                "decontaminate",
                "decontaminate_fields",
            },
        )
        sources = [
            _source_entry(
                name,
                source,
                by_source[name],
                [e for c, e in zip(self.chunks, encoded) if c.source == name],
            )
            for name, source in corpus.sources_of(self.cfg.corpus).items()
        ]
        splits = {
            split: {k: sum(r[split][k] for r in encoded) for k in shards.COUNTS}
            | {"shards": [s for r in encoded for s in r[split]["shards"]]}
            for split in SPLITS
        }
        whole = receipts.total(s["receipt"] for s in sources)
        return {
            "schema": FORMAT,
            "config": built,
            "corpus": {
                "kind": self.cfg.corpus.kind,
                "sha256": corpus.corpus_sha256(self.cfg.corpus),
                "license": " AND ".join(dict.fromkeys(s["license"] for s in sources)),
                "documents": whole["documents_out"],
                "bytes": whole["bytes_out"],
            },
            "sources": sources,
            "filters": {
                "rules": list(filters.RULES),
                "plugins": list(self.cfg.filters),
                "limits": vars(filters.limits()),
            },
            "decontamination": grams,
            "tokenizer": {
                "kind": tokenizer.kind,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "encoder": getattr(tokenizer, "encoder", "stackproof"),
            },
            "splits": splits,
        }


def _source_entry(name: str, source: TextSource, receipt: dict, encoded: list[dict]) -> dict:
    passed_over = corpus.passed_over(source)
    return {
        "name": name,
        "kind": source.kind,
        "languages": list(source.languages),
        "license": source.license,
        **{
            k: float(getattr(source, k, default))
            for k, default in (("weight", 1.0), ("cap", 1.0), ("floor", 0.0))
        },
        "files": len(corpus.source_paths(source)),
        "files_passed_over": {
            "number": len(passed_over),
            "example": str(passed_over[0]) if passed_over else "",
        },
        "sha256": corpus.corpus_sha256(source),
        "receipt": receipt,
        "tokens": {split: sum(r[split]["tokens"] for r in encoded) for split in SPLITS},
    }


def _evaluation_grams(cfg: DataConfig, work: Path) -> dict | None:
    """Write the word n-grams of the evaluation sets and return their description.
    Raises DataError if the scanner does not find a canary.
    """
    if not cfg.decontaminate:
        return None
    sets = {p: list(evaluation_texts(Path(p), cfg.decontaminate_fields)) for p in cfg.decontaminate}
    grams = dedup.gram_set(t for records in sets.values() for texts in records for t in texts)
    long = {
        p: [r for texts in records if (r := [t for t in texts if dedup.is_long(t)])]
        for p, records in sets.items()
    }
    canary = next((texts[0] for records in long.values() for texts in records), None)
    if canary is None:
        raise DataError(
            f"no text of the evaluation sets has {dedup.GRAM_WORDS} words, so nothing could ever "
            "be found",
            value=", ".join(cfg.decontaminate),
            next_step="check decontaminate and decontaminate_fields",
        )
    if not dedup.finds_hidden(canary, grams):
        raise DataError(
            "the scanner does not find an evaluation text hidden in another, so its zeros mean "
            "nothing"
        )
    tensorfile.write(work / "grams.safetensors", {"grams": grams}, {})
    described = [
        {
            "path": Path(p).name,
            "sha256": corpus.file_sha256(Path(p)),
            "records": len(r),
            "records_kept_out": len(long[p]),
        }
        for p, r in sets.items()
    ]
    return {
        "sets": described,
        "grams": len(grams),
        "gram_words": dedup.GRAM_WORDS,
        "canary": canary[:400],
        "canary_found": True,
    }

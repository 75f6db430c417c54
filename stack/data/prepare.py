"""The data set of a configuration: built once, cached by content, and verified when opened."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from stackproof.config import Built, DataConfig
from stackproof.data import build, corpus, filters, packing
from stackproof.data import tokenizer as tokenizers
from stackproof.data.build import FORMAT, Progress
from stackproof.data.manifest import read_manifest
from stackproof.data.packing import Packing
from stackproof.data.shard_table import LISTED_SHARDS, ShardTable, is_block, require_beside
from stackproof.data.shards import TokenStream, map_shard
from stackproof.data.stages import SPLITS
from stackproof.data.tokenizer import Tokenizer
from stackproof.evidence.file_lock import aside
from stackproof.spec.canonical import sha256_file, sha256_json
from stackproof.spec.errors import DataError, IntegrityError
from stackproof.spec.files import remedy
from stackproof.tensorfile import BadTensorFile

WORKERS = os.cpu_count() or 1
JUDGED_SHARDS = 16  # of a split, with data.verify = drawn
# Of documents longer than this a sample holds only a few of each source.
SAMPLED_TOKENS, LONG_DOCUMENTS = 65536, 2


class Dataset:
    """A prepared corpus: its tokenizer, its two splits, and the manifest that describes them.
    Gates read all shards, or a sample of `judged_shards` of each split.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict,
        tokenizer: Tokenizer,
        how: Packing,
        *,
        judged_shards: int | None = None,
    ):
        self.directory, self.manifest, self.tokenizer = directory, manifest, tokenizer
        self._how, self._judged_shards = how, judged_shards
        self.train, self.validation = (self._stream(manifest["splits"][s]) for s in SPLITS)

    def _stream(self, split: dict) -> TokenStream:
        vocab_size = self.manifest["tokenizer"]["vocab_size"]
        return packing.stream(self.directory, split, vocab_size, self._how)

    @cached_property
    def judged(self) -> Mapping[str, TokenStream]:
        """The splits by name as gates read them. The bytes of text of a sample are estimated."""
        whole = dict(zip(SPLITS, (self.train, self.validation)))
        if (most := self._judged_shards) is None:
            return whole
        return {
            name: stream if len(stream.shards) <= most else self._stream(_sample(stream, most))
            for name, stream in whole.items()
        }

    @property
    def sources(self) -> dict[str, dict]:
        """Manifest entries of the sources by name, in the order of their shards."""
        return {s["name"]: s for s in self.manifest["sources"]}

    def evaluation_grams(self) -> np.ndarray | None:
        """Hashes of the word n-grams of the evaluation sets that the corpus was decontaminated
        with, or None.
        """
        if not self.manifest["decontamination"]:
            return None
        return map_shard(self.directory / "grams.safetensors", "grams", np.uint64)

    def inputs(self) -> list[dict]:
        """Shards, tokenizer and manifest, as inputs of a record. More than LISTED_SHARDS shards are
        left out: the manifest states the hash of each.
        """
        n_shards = len(self.train.shards) + len(self.validation.shards)
        rows = [
            {
                "name": f"{split} tokens",
                **{k: s[k] for k in ("path", "sha256", "bytes", "tokens")},
                "license": self.sources[s["source"]]["license"],
            }
            for split, stream in zip(SPLITS, (self.train, self.validation))
            for s in (stream.shards if n_shards <= LISTED_SHARDS else ())
        ]
        paths = [self.directory / name for name in ("tokenizer.json", "manifest.json")]
        return [
            *rows,
            *(
                {
                    "name": p.stem,
                    "path": p.name,
                    "sha256": sha256_file(p),
                    "bytes": p.stat().st_size,
                }
                for p in paths
            ),
        ]

    def validation_texts(self, max_tokens: int | None = None) -> Iterator[str]:
        """Held-out documents as text, decoded from the shards; at most `max_tokens` of each.
        Documents without tokens are skipped.
        """
        for _, start, stop in self.validation.documents():
            cut = stop if max_tokens is None else min(stop, start + max_tokens)
            if text := self.text(self.validation, start, cut):
                yield text

    def sample_documents(self, frac: float, minimum: int) -> Iterator[tuple[str, str]]:
        """(source, text) of a share of the judged training documents of every source, spread
        evenly, decoded from the shards; at least `minimum`.
        """
        stream = self.judged["train"]
        bounds = np.append(stream.document_starts, stream.n_tokens)
        sources = [entry["source"] for entry in stream.shards]
        source_of = np.repeat(np.array(sources), [len(s) for s in stream.shard_document_starts()])
        for source in dict.fromkeys(sources):
            mine = np.flatnonzero(source_of == source)
            n_long = 0
            wanted = min(len(mine), max(minimum, round(frac * len(mine))))
            for i in mine[(np.arange(wanted) * len(mine)) // wanted].tolist():
                start, stop = int(bounds[i]), int(bounds[i + 1])
                n_long += stop - start > SAMPLED_TOKENS
                if stop - start <= SAMPLED_TOKENS or n_long <= LONG_DOCUMENTS:
                    yield source, self.text(stream, start, stop)

    def text(self, stream: TokenStream, start: int, stop: int) -> str:
        """Tokens start … stop-1 of a split as text, without end-of-text tokens."""
        ids = stream.token_range(start, stop)
        return self.tokenizer.decode(ids[ids != self.tokenizer.eos_id].tolist())


def _sample(stream: TokenStream, n_shards: int) -> dict:
    """A sample of the shards of a split, as a split of a manifest."""
    shards = stream.shards.sample(n_shards)
    tokens, documents = (sum(e[k] for e in shards) for k in ("tokens", "documents"))
    n_bytes = stream.n_bytes * tokens // stream.n_tokens
    return {"tokens": tokens, "documents": documents, "bytes": n_bytes, "shards": shards}


def cache_directory() -> Path:
    """`$STACKPROOF_CACHE`, else `~/.cache/stackproof`."""
    return Path(os.environ.get("STACKPROOF_CACHE") or Path.home() / ".cache" / "stackproof")


def prepare(
    cfg: DataConfig,
    *,
    cache_dir: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Dataset:
    """The data set of a configuration: built, or loaded from the cache or a built folder and
    verified.

    Raises DataError for an unreadable or empty corpus, a split without documents, a cache that
    cannot be written, or a damaged one.
    """
    if isinstance(cfg.corpus, Built):
        return open_folder(Path(cfg.corpus.path), cfg)
    corpus_sha256 = corpus.corpus_sha256(cfg.corpus)
    folder = (cache_dir or cache_directory()) / "data" / _cache_key(cfg, corpus_sha256)
    if not folder.exists():
        _build_aside(cfg, corpus_sha256, folder, on_progress)
    return open_folder(folder, cfg)


def _cache_key(cfg: DataConfig, corpus_sha256: str) -> str:
    """Key of the cache: hash of the texts, of names and declarations of sources, and of every key
    that a build reads.
    """
    sources = [
        [n, s.license, *(getattr(s, k, None) for k in ("weight", "cap", "floor"))]
        for n, s in corpus.sources_of(cfg.corpus).items()
    ]
    read = cfg.model_dump(mode="json", exclude={"corpus", "packing", "on_exhausted", "verify"})
    given = [corpus.file_sha256(Path(p)) for p in build.given_files(cfg)]
    return sha256_json(
        [FORMAT, corpus_sha256, sources, read, given, filters.fingerprint(cfg.filters)]
    )[:24]


def _build_aside(
    cfg: DataConfig, corpus_sha256: str, folder: Path, on_progress: Callable[[Progress], None]
) -> None:
    """Build in a new folder and rename it into place. If another process has built the same data
    meanwhile, that is used.
    """
    try:
        with aside(folder) as temporary:
            manifest = build.build(cfg, temporary, workers=WORKERS, on_progress=on_progress)
            if manifest["corpus"]["sha256"] != corpus_sha256:
                raise build.changed_meanwhile()
            os.replace(temporary, folder)
    except (OSError, BadTensorFile, build.Unwritable) as e:
        if not folder.exists():
            raise DataError(
                f"the prepared data could not be written to {folder}: {e}",
                next_step=f"{remedy(e)}, or set STACKPROOF_CACHE to a folder that can be written",
            ) from e


def open_folder(folder: Path, cfg: DataConfig) -> Dataset:
    """Open a built data set, verified by `data.verify` and packed by `data.packing`.
    Raises DataError if it is damaged.
    """
    path, rebuild = folder / "manifest.json", f"delete {folder} and run again to rebuild it"
    try:
        manifest = read_manifest(path, schema=FORMAT)
        if manifest["schema"] != FORMAT:
            raise DataError(
                f"{path} is of another format: {manifest['schema']}",
                allowed=FORMAT,
                next_step=rebuild,
            )
        for split in SPLITS:
            _verify_split(folder, manifest["splits"][split]["shards"], cfg.verify)
        tokenizer = tokenizers.load_tokenizer(folder / "tokenizer.json")
        if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
            raise DataError(
                f"{folder / 'tokenizer.json'} is not the tokenizer of these shards",
                next_step=rebuild,
            )
        return Dataset(
            folder,
            manifest,
            tokenizer,
            cfg.packing,
            judged_shards=JUDGED_SHARDS if cfg.verify == "drawn" else None,
        )
    except (
        OSError,
        IntegrityError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as e:
        raise DataError(
            f"the prepared data in {folder} are damaged: {type(e).__name__}: {str(e)[:300]}",
            next_step=rebuild,
        ) from e


def _verify_split(folder: Path, entries: Sequence[dict], verify: str) -> None:
    for entry in entries:  # shards, or blocks of them
        verify_shard(folder / entry["path"], entry, verify)
    if verify != "drawn" and any(map(is_block, entries)):
        for entry in ShardTable(folder, entries):
            verify_shard(folder / entry["path"], entry, verify)


def verify_shard(path: Path, entry: dict, verify: str) -> None:
    """Compare a shard with its manifest entry: its size, and its hash if `verify` is full. One that
    is verified when it is drawn is not looked at. Raises DataError.
    """
    require_beside(path.parent, entry["path"])
    if verify == "drawn":
        return
    size = path.stat().st_size if path.is_file() else -1
    rebuild = f"delete {path.parent} and run again to rebuild it"
    if size != entry["bytes"]:
        raise DataError(
            f"shard {path} is missing, truncated or padded",
            value=f"{size} bytes",
            allowed=f"{entry['bytes']} bytes",
            next_step=rebuild,
        )
    if verify == "full" and sha256_file(path) != entry["sha256"]:
        raise DataError(
            f"shard {path} was changed since it was written",
            allowed=f"sha256 {entry['sha256'][:12]}…",
            next_step=rebuild,
        )

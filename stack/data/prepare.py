"""From a corpus to a prepared data set: split, tokenizer, shards, manifest; cached by content."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import assert_never

from spec.canonical import canonical_json, parse_strict, sha256_file, sha256_json
from spec.errors import DataError, IntegrityError
from stack.config import DataConfig, Files, HashSplit, TailSplit
from stack.data import corpus, shards
from stack.data import tokenizer as tokenizers
from stack.data.shards import TokenStream
from stack.data.tokenizer import Tokenizer
from stack.tensorfile import BadTensorFile

FORMAT = "stackproof/data/2"
SPLITS = ("train", "validation")


class Dataset:
    """A prepared corpus: its tokenizer, its two splits, and the manifest that describes them."""

    def __init__(self, directory: Path, manifest: dict, tokenizer: Tokenizer):
        self.directory, self.manifest, self.tokenizer = directory, manifest, tokenizer
        vocab_size = manifest["tokenizer"]["vocab_size"]
        self.train, self.validation = (TokenStream(directory, manifest["splits"][s], vocab_size) for s in SPLITS)

    def inputs(self) -> list[dict]:
        """Shards and tokenizer as the record names them."""
        rows = [
            {
                "name": f"{split} tokens",
                **{k: s[k] for k in ("path", "sha256", "bytes", "tokens")},
                "license": self.manifest["corpus"]["license"],
            }
            for split in SPLITS
            for s in self.manifest["splits"][split]["shards"]
        ]
        path = self.directory / "tokenizer.json"
        return [*rows, {"name": "tokenizer", "path": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size}]

    def validation_texts(self, max_tokens: int | None = None) -> Iterator[str]:
        """Held-out documents as text, decoded from the shards; of each at most `max_tokens`. Documents without a token are left out."""
        starts = [*self.validation.document_starts.tolist(), self.validation.n_tokens]
        for start, stop in zip(starts, starts[1:]):
            ids = self.validation.token_range(start, stop if max_tokens is None else min(stop, start + max_tokens))
            if text := self.tokenizer.decode(ids[ids != self.tokenizer.eos_id].tolist()):
                yield text


def cache_directory() -> Path:
    """`$STACKPROOF_CACHE`, else `~/.cache/stackproof`."""
    return Path(os.environ.get("STACKPROOF_CACHE") or Path.home() / ".cache" / "stackproof")


def prepare(cfg: DataConfig, *, cache_dir: Path | None = None, progress: Callable[[str], None] = lambda message: None) -> Dataset:
    """Build the data set, or take it from the cache after verifying it.

    Raises DataError for an unreadable or empty corpus, a split without documents, a cache that cannot be written, or a damaged one.
    """
    corpus_sha256 = corpus.corpus_sha256(cfg.corpus)
    key = sha256_json([FORMAT, corpus_sha256, _license(cfg), cfg.split.model_dump(), cfg.tokenizer.model_dump()])[:24]
    folder = (cache_dir or cache_directory()) / "data" / key
    if not folder.exists():
        _build_aside(cfg, corpus_sha256, folder, progress)
    return _open(folder, cfg.verify)


def _build_aside(cfg: DataConfig, corpus_sha256: str, folder: Path, progress: Callable[[str], None]) -> None:
    """Build in a fresh folder and rename it into place; of two processes that build the same data the second takes the first's."""
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        _build(cfg, corpus_sha256, temporary, progress)
        if corpus.corpus_sha256(cfg.corpus) != corpus_sha256:
            raise DataError("the corpus changed while it was read", next_step="run again when nothing writes to data.corpus.paths")
        os.replace(temporary, folder)
    except (OSError, BadTensorFile) as e:
        if not folder.exists():
            raise DataError(
                f"the prepared data could not be written to {folder}: {e}",
                next_step="free space, or set STACKPROOF_CACHE to a folder that can be written",
            ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _license(cfg: DataConfig) -> str:
    """Licence of the text; the standard library carries Python's."""
    return cfg.corpus.license if isinstance(cfg.corpus, Files) else "PSF-2.0"


def _open(folder: Path, verify: str) -> Dataset:
    path, rebuild = folder / "manifest.json", f"delete {folder} and run again to rebuild it"
    try:
        manifest = parse_strict(path.read_bytes(), origin=str(path))
        if manifest["schema"] != FORMAT:
            raise DataError(f"{path} is of another format: {manifest['schema']}", allowed=FORMAT, next_step=rebuild)
        for split in SPLITS:
            for entry in manifest["splits"][split]["shards"]:
                _verify(folder / entry["path"], entry, verify)
        tokenizer = tokenizers.load_tokenizer(folder / "tokenizer.json")
        if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
            raise DataError(f"{folder / 'tokenizer.json'} is not the tokenizer of these shards", next_step=rebuild)
        return Dataset(folder, manifest, tokenizer)
    except (OSError, IntegrityError, KeyError, TypeError) as e:
        raise DataError(f"the prepared data in {folder} are damaged: {type(e).__name__}: {e}", next_step=rebuild) from e


def _verify(path: Path, entry: dict, verify: str) -> None:
    size = path.stat().st_size if path.is_file() else -1
    rebuild = f"delete {path.parent} and run again to rebuild it"
    if size != entry["bytes"]:
        raise DataError(
            f"shard {path} is missing, truncated or padded", value=f"{size} bytes", allowed=f"{entry['bytes']} bytes", next_step=rebuild
        )
    if verify == "full" and sha256_file(path) != entry["sha256"]:
        raise DataError(f"shard {path} was changed since it was written", allowed=f"sha256 {entry['sha256'][:12]}…", next_step=rebuild)


def _build(cfg: DataConfig, corpus_sha256: str, folder: Path, progress: Callable[[str], None]) -> None:
    progress(f"reading {cfg.corpus.kind}")
    texts, duplicates = _unique_texts(cfg)
    sides = split_texts(cfg, texts)
    for split in SPLITS:
        if not sides[split]:
            raise DataError(
                f"the {split} split is empty",
                value=f"{len(texts)} document(s), data.split.kind = {cfg.split.kind}",
                allowed="at least one document on each side",
                next_step="--set data.corpus.documents=paragraph, or --set data.split.kind=tail for few long documents",
            )
    progress(f"training a {cfg.tokenizer.kind} tokenizer on {len(sides['train']):,} documents")
    tokenizer = tokenizers.train_tokenizer(cfg.tokenizer, sides["train"])
    tokenizer.save(folder / "tokenizer.json")
    progress(f"encoding {len(texts):,} documents")
    manifest = {
        "schema": FORMAT,
        "corpus": {
            "kind": cfg.corpus.kind,
            "sha256": corpus_sha256,
            "license": _license(cfg),
            "documents": len(texts),
            "duplicates_dropped": duplicates,
            "bytes": sum(len(t.encode()) for t in texts),
        },
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "splits": {split: _encode(folder, split, sides[split], tokenizer) for split in SPLITS},
    }
    (folder / "manifest.json").write_bytes(canonical_json(manifest))


def _unique_texts(cfg: DataConfig) -> tuple[list[str], int]:
    """Texts without exact repeats (case and white space aside), and how many were dropped."""
    seen: dict[int, str] = {}
    n = 0
    for document in corpus.read_documents(cfg.corpus):
        n += 1
        seen.setdefault(shards.document_hash(document.text), document.text)
    if not n:
        raise DataError("the corpus has no document", next_step="check data.corpus")
    return list(seen.values()), n - len(seen)


def split_texts(cfg: DataConfig, texts: list[str]) -> dict[str, list[str]]:
    """Texts of each side. Equal documents are always on one side of a hash split."""
    match cfg.split:
        case HashSplit(validation_frac=frac):
            held_out = [(shards.document_hash(t) % 2**32) / 2**32 < frac for t in texts]
            return {
                "train": [t for t, held in zip(texts, held_out) if not held],
                "validation": [t for t, held in zip(texts, held_out) if held],
            }
        case TailSplit(validation_frac=frac):
            cuts = [len(t) - round(len(t) * frac) for t in texts]
            return {
                "train": [t[:cut] for t, cut in zip(texts, cuts) if t[:cut]],
                "validation": [t[cut:] for t, cut in zip(texts, cuts) if t[cut:]],
            }
    assert_never(cfg.split)


def _encode(folder: Path, split: str, texts: list[str], tokenizer: Tokenizer) -> dict:
    encodings = tokenizer.encode_batch(texts)
    hashes = [shards.document_hash(t) for t in texts]
    entries = shards.write_split(folder, split, [(e.ids, h) for e, h in zip(encodings, hashes)], tokenizer)
    kept = sum(int(tokenizer.token_bytes[e.ids].sum()) for e in encodings if e.ids)
    return {
        "tokens": sum(s["tokens"] for s in entries),
        "bytes": kept,
        "documents": len(texts),
        "dropped_chars": sum(e.dropped_chars for e in encodings),
        "shards": entries,
    }

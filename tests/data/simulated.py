"""Corpora of any number of shards in a few real files."""

import copy
from pathlib import Path

from stackproof.config import ByteTokenizer, DataConfig, Files
from stackproof.data import shards
from stackproof.data.prepare import prepare
from stackproof.spec.canonical import canonical_json, read_json

FILES = 16  # shards of the training split that exist
DOCUMENTS = 40  # of each, where a test states no other number
WORDS = (
    "river stone letter winter garden window morning paper silver bridge table forest market "
    "island candle mirror valley harbour meadow orchard quarry lantern"
).split()


def text_of(number: int) -> str:
    """A document that filters keep, and that shares no run of words with another."""
    digits, words = number, []
    for place in range(28):
        digits = (digits * 1_103_515_245 + 12_345 + place) % 2**31
        words.append(WORDS[(digits >> 8) % len(WORDS)])
    return f"Document {number} lists {', '.join(words)}, and nothing else follows."


def make_parts(place: Path, documents: int = DOCUMENTS) -> Path:
    """A folder with FILES training shards of so many documents each, a validation shard, a
    tokenizer and a manifest.
    """
    place.mkdir(parents=True, exist_ok=True)
    held_out = range(10**6, 10**6 + 4000)
    (place / "text").write_text("\n".join(map(text_of, held_out)))
    cfg = DataConfig(
        corpus=Files(paths=(str(place / "text"),), documents="line"), tokenizer=ByteTokenizer()
    )
    data = prepare(cfg, cache_dir=place / "cache")
    texts = [text_of(n) for n in range(FILES * documents)]
    entries: list = []
    for n in range(FILES):
        mine = texts[n * documents : (n + 1) * documents]
        entries.append(
            shards.write_documents(
                data.directory,
                "many",
                ((t, shards.document_hash(t)) for t in mine),
                data.tokenizer,
                source="files",
                encode=data.tokenizer.encode_batch,
                at_once=1000,
                first_number=n,
                max_tokens=2**62,
            )
        )
    (place / "entries.json").write_bytes(canonical_json(entries))
    (place / "folder").write_text(str(data.directory))
    return place


def document_of(place: Path, n_shards: int) -> dict:
    """The manifest of a corpus whose training split has `n_shards` shards. Each of the FILES equal
    parts of it is one file.
    """
    entries = read_json(place / "entries.json")
    manifest = copy.deepcopy(read_json(Path((place / "folder").read_text()) / "manifest.json"))
    chosen = [entries[i * FILES // n_shards] for i in range(n_shards)]
    train = {k: sum(e[k] for e in chosen) for k in shards.COUNTS}
    manifest["splits"]["train"] = train | {"shards": [e["shards"][0] for e in chosen]}
    (source,) = manifest["sources"]
    splits = manifest["splits"].values()
    for unit in ("documents", "bytes"):
        n = sum(s[unit] for s in splits)
        source["receipt"] |= {f"{unit}_in": n, f"{unit}_out": n}
        manifest["corpus"][unit] = n
    source["receipt"]["dropped"] = {}
    source["tokens"]["train"] = train["tokens"]
    return manifest


def link_files(place: Path, folder: Path) -> Path:
    """All files but the manifest as links in a new folder."""
    folder.mkdir(parents=True)
    for path in Path((place / "folder").read_text()).iterdir():
        if path.name != "manifest.json" and path.is_file():
            (folder / path.name).hardlink_to(path)
    return folder

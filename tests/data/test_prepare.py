"""Splits, the manifest and the cache."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from stackproof.config import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    DataConfig,
    Files,
    HashSplit,
    Pangram,
    TailSplit,
)
from stackproof.data import corpus, shards, stages
from stackproof.data.prepare import prepare
from stackproof.data.tokenizer import Chars
from stackproof.spec.errors import DataError

PANGRAM = "the quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"document number {n} says something of its own\n" for n in range(400)))
    return DataConfig(corpus=Files(paths=(str(path),), documents="line"), tokenizer=ByteTokenizer())


def test_pangram_is_cut_at_ninety_percent(tmp_path):
    cfg = DataConfig(
        corpus=Pangram(), split=TailSplit(validation_frac=0.1), tokenizer=CharTokenizer()
    )
    data = prepare(cfg, cache_dir=tmp_path / "c")
    assert len(data.tokenizer.symbols) == 28 and data.tokenizer.vocab_size == 29
    assert (data.train.n_bytes, data.validation.n_bytes) == (8100, 900)
    assert "".join(data.validation_texts()) == PANGRAM[8100:]


def test_splits_are_disjoint_complete_and_counted(texts, tmp_path):
    data = prepare(texts, cache_dir=tmp_path / "c")
    train, held_out = data.train, data.validation
    assert not set(train.document_hashes.tolist()) & set(held_out.document_hashes.tolist())
    assert train.n_documents + held_out.n_documents == 400
    for stream in (train, held_out):
        tokens = stream.token_range(0, stream.n_tokens)
        assert stream.n_tokens == len(tokens) == 1 + stream.n_bytes + stream.n_documents
        assert int((tokens == 256).sum()) == stream.n_documents + 1 and tokens[0] == 256


def test_pangram_from_a_file_is_what_the_filters_are_for(tmp_path):
    """Only the embedded corpus may repeat itself."""
    (tmp_path / "p.txt").write_text(PANGRAM)
    with pytest.raises(DataError, match=r"nothing is left of source files[\s\S]*long-paragraph"):
        prepare(
            DataConfig(corpus=Files(paths=(str(tmp_path / "p.txt"),)), split=TailSplit()),
            cache_dir=tmp_path / "c",
        )


def twins(n: int) -> list[str]:
    return [
        (
            f"{'The  TWINS of family' if i % 2 else 'the twins of Family'} {i // 2} differ in "
            "case and white space only"
        )
        for i in range(n)
    ]


def test_equal_documents_become_one(tmp_path):
    path = tmp_path / "twins.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in twins(200)))
    data = prepare(
        DataConfig(corpus=Files(paths=(str(path),)), tokenizer=ByteTokenizer()),
        cache_dir=tmp_path / "c",
    )
    (source,) = data.manifest["sources"]
    assert (
        source["receipt"]["dropped"]["exact-repeat"]["documents"]
        == 100
        == source["receipt"]["documents_out"]
    )
    assert data.train.n_documents + data.validation.n_documents == 100


def test_equal_documents_stay_on_one_side():
    texts = twins(400)
    sides = [
        split
        for split, _, _ in stages.sides(
            HashSplit(validation_frac=0.5), texts, map(shards.document_hash, texts)
        )
    ]
    assert sides[::2] == sides[1::2] and 50 < sides[::2].count("validation") < 150


def test_second_preparation_is_the_cache_and_an_edit_is_not(texts, tmp_path):
    first, again = (
        prepare(texts, cache_dir=tmp_path / "c"),
        prepare(texts, cache_dir=tmp_path / "c"),
    )
    assert first.directory == again.directory
    with open(texts.corpus.paths[0], "a") as f:
        f.write("one more line of text\n")
    assert prepare(texts, cache_dir=tmp_path / "c").directory != first.directory


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "padded"])
def test_a_damaged_shard_is_refused_with_what_to_do(texts, tmp_path, damage):
    data = prepare(texts, cache_dir=tmp_path / "c")
    path = data.train.paths[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    match damage:
        case "truncated":
            path.write_bytes(bytes(content[:-8]))
        case "padded":
            path.write_bytes(bytes(content) + b"\0")
        case "flipped":
            path.write_bytes(bytes(content))
        case "gone":
            path.unlink()
    with pytest.raises(DataError, match="delete"):
        prepare(texts, cache_dir=tmp_path / "c")


def test_size_verification_sees_truncation_but_declares_it_cannot_see_flips(texts, tmp_path):
    quick = texts.model_copy(update={"verify": "size"})
    path = prepare(quick, cache_dir=tmp_path / "c").train.paths[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    prepare(quick, cache_dir=tmp_path / "c")
    path.write_bytes(bytes(content[:-1]))
    with pytest.raises(DataError, match="truncated"):
        prepare(quick, cache_dir=tmp_path / "c")


def test_one_document_gives_no_split_and_says_what_to_do(tmp_path):
    (tmp_path / "one.txt").write_text(
        "This is the only document here, and no split by documents can cut it."
    )
    with pytest.raises(DataError, match=r"(?s)1 document\(s\) after filtering.*split\.kind=tail"):
        prepare(
            DataConfig(corpus=Files(paths=(str(tmp_path / "one.txt"),))), cache_dir=tmp_path / "c"
        )


def test_the_manifest_carries_the_licence_that_is_configured(texts, tmp_path):
    for name in ("MIT", "CC0-1.0"):
        cfg = texts.model_copy(update={"corpus": texts.corpus.model_copy(update={"license": name})})
        assert {
            row.get("license", name) for row in prepare(cfg, cache_dir=tmp_path / "c").inputs()
        } == {name}


@pytest.mark.parametrize("how", ["appended", "same size and time"])
def test_a_corpus_that_changes_while_it_is_read_is_refused(texts, tmp_path, monkeypatch, how):
    original, path = corpus.read_part, texts.corpus.paths[0]

    def meanwhile(cfg, part):
        yield from original(cfg, part)
        before = os.stat(path)
        with open(path, "a" if how == "appended" else "r+") as f:
            f.write("A line that came late.\n" if how == "appended" else "D")
        if how != "appended":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(corpus, "read_part", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(texts, cache_dir=tmp_path / "c")
    assert list((tmp_path / "c" / "data").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"move the file .* away, or set STACKPROOF_CACHE"):
        prepare(texts, cache_dir=tmp_path / "file")


def test_a_build_that_fails_leaves_nothing(texts, tmp_path, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.tensorfile, "write", full)
    with pytest.raises(DataError, match=r"No space left[\s\S]*next +free space"):
        prepare(texts, cache_dir=tmp_path / "c")
    assert list((tmp_path / "c" / "data").iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"schema": "other"}', b"[]"])
def test_a_damaged_manifest_is_refused_with_what_to_do(texts, tmp_path, content):
    path = prepare(texts, cache_dir=tmp_path / "c").directory / "manifest.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match="delete"):
        prepare(texts, cache_dir=tmp_path / "c")


def test_a_replaced_tokenizer_is_refused(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {n} of some text\n" for n in range(300)))
    cfg = DataConfig(corpus=Files(paths=(str(path),), documents="line"), tokenizer=CharTokenizer())
    data = prepare(cfg, cache_dir=tmp_path / "c")
    (data.directory / "tokenizer.json").write_bytes(
        Chars("".join(reversed(data.tokenizer.symbols))).to_bytes()
    )
    with pytest.raises(DataError, match="not the tokenizer of these shards"):
        prepare(cfg, cache_dir=tmp_path / "c")


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path):
    draw = np.random.default_rng(0)
    words = lambda letters, n: (  # noqa: E731
        " ".join("".join(draw.choice(list(letters), 7)) for _ in range(n)) + " "
    )
    text = words("abcdefghi", 100) + words("xyz", 25)
    (tmp_path / "p.txt").write_text(text)
    cfg = DataConfig(
        corpus=Files(paths=(str(tmp_path / "p.txt"),)),
        split=TailSplit(validation_frac=0.2),
        tokenizer=CharTokenizer(),
    )
    data = prepare(cfg, cache_dir=tmp_path / "c")
    held_out = data.manifest["splits"]["validation"]
    assert (
        len(text) == 1000
        and set(data.tokenizer.symbols) == set("abcdefghi ")
        and held_out["dropped_chars"] == 7 * 25
    )
    assert held_out["bytes"] + held_out["dropped_chars"] == round(1000 * 0.2)


def test_the_same_corpus_gives_the_same_shards_in_every_process(texts, tmp_path):
    code = (
        "import sys; from pathlib import Path; from stackproof.config import DataConfig; from "
        "stackproof.data.prepare import prepare\n"
        "d = prepare(DataConfig.model_validate_json(sys.argv[1]), cache_dir=Path(sys.argv[2])); "
        "print([r['sha256'] for r in d.inputs()])"
    )
    cfg = texts.model_copy(update={"tokenizer": BpeTokenizer(vocab_size=400)}).model_dump_json()
    runs = [[sys.executable, "-c", code, cfg, str(tmp_path / n)] for n in ("a", "b")]
    first, second = (
        subprocess.run(r, check=True, capture_output=True, text=True).stdout for r in runs
    )
    assert first == second and len(first) > 150

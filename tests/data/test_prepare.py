"""Corpora, splits, shards and the cache."""

import gzip
import json

import numpy as np
import pytest

from spec.canonical import sha256_file
from spec.errors import DataError
from stack.config import ByteTokenizer, CharTokenizer, DataConfig, Files, StdlibDocs, TailSplit
from stack.data import corpus, shards
from stack.data.prepare import prepare
from stack.data.shards import TokenStream, pack_ids, write_split

PANGRAM = "the quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"document number {n} says something of its own\n" for n in range(400)))
    return DataConfig(corpus=Files(paths=(str(path),), documents="line"), tokenizer=ByteTokenizer())


def test_pangram_is_cut_at_ninety_percent(tmp_path):
    (tmp_path / "p.txt").write_text(PANGRAM)
    cfg = DataConfig(corpus=Files(paths=(str(tmp_path / "p.txt"),)), split=TailSplit(validation_frac=0.1), tokenizer=CharTokenizer())
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


def test_equal_documents_stay_on_one_side(tmp_path):
    path = tmp_path / "twins.jsonl"
    path.write_text("".join(json.dumps({"text": f"{'A  B' if n % 2 else 'a b'} {n // 2}"}) + "\n" for n in range(200)))
    data = prepare(DataConfig(corpus=Files(paths=(str(path),)), tokenizer=ByteTokenizer()), cache_dir=tmp_path / "c")
    assert data.manifest["corpus"]["duplicates_dropped"] == 100


def test_second_preparation_is_the_cache_and_an_edit_is_not(texts, tmp_path):
    first, again = prepare(texts, cache_dir=tmp_path / "c"), prepare(texts, cache_dir=tmp_path / "c")
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


def test_gzipped_files_and_folders_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt.gz").write_bytes(gzip.compress(b"first\n\nsecond"))
    (tmp_path / "a" / "two.jsonl").write_text('{"body": "third"}\n\n{"body": "fourth"}\n')
    (tmp_path / "a" / "ignored.bin").write_bytes(b"\x00")
    cfg = Files(paths=(str(tmp_path / "a"),), documents="paragraph", text_field="body")
    assert [d.text for d in corpus.read_documents(cfg)] == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bad.jsonl", b'{"text": 1}\n', "line 1 has no text"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ("bad.txt", b"fine\n\xff\xfe", "line 2 is not UTF-8"),
        ("bad.txt.gz", b"not gzip", "cannot read"),
        ("empty.txt", b"  \n", "no document"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        prepare(DataConfig(corpus=Files(paths=(str(tmp_path / name),))), cache_dir=tmp_path / "c")


def test_a_path_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="names nothing"):
        prepare(DataConfig(corpus=Files(paths=(str(tmp_path / "absent*"),))), cache_dir=tmp_path / "c")


def test_one_document_gives_no_split_and_says_what_to_do(tmp_path):
    (tmp_path / "one.txt").write_text("only one document here " * 30)
    with pytest.raises(DataError, match=r"data\.split\.kind=tail"):
        prepare(DataConfig(corpus=Files(paths=(str(tmp_path / "one.txt"),))), cache_dir=tmp_path / "c")


class Wide:
    """A tokenizer of 70,000 ids, for the wide storage type."""

    vocab_size, eos_id, sha256 = 70_000, 69_999, "ab" * 32


def test_the_highest_id_survives_and_one_above_is_refused(tmp_path):
    entries = write_split(tmp_path, "train", [([0, 69_998, 65_536], 1)], Wide)
    stream = TokenStream(tmp_path, {"tokens": 5, "bytes": 3, "documents": 1, "shards": entries}, 70_000)
    assert stream.token_range(0, 5).tolist() == [69_999, 0, 69_998, 65_536, 69_999]
    with pytest.raises(DataError, match="outside the vocabulary"):
        pack_ids([70_000], 70_000)


def test_windows_tile_every_shard(tmp_path):
    documents = [(list(range(n, n + 10)), n) for n in range(0, 100, 10)]
    entries = write_split(tmp_path, "train", documents, Wide, max_tokens=40)
    assert len(entries) == 3 and all(sha256_file(tmp_path / e["path"]) == e["sha256"] for e in entries)
    stream = TokenStream(tmp_path, {"tokens": sum(e["tokens"] for e in entries), "bytes": 0, "documents": 10, "shards": entries}, 70_000)
    n = stream.n_windows(5)
    windows = stream.windows(np.arange(n), 5)
    assert windows.shape == (n, 6) and n == sum((e["tokens"] - 1) // 5 for e in entries)
    flat = stream.token_range(0, stream.n_tokens)
    first = entries[0]["tokens"]
    assert np.array_equal(windows[0], flat[:6]) and np.array_equal(windows[(first - 1) // 5], flat[first : first + 6])


def test_the_standard_library_is_a_corpus_everywhere(tmp_path):
    documents = list(corpus.read_documents(StdlibDocs()))
    text = sum(len(d.text) for d in documents)
    assert len(documents) > 3000 and text > 1_500_000
    assert corpus.corpus_sha256(StdlibDocs()) == corpus.corpus_sha256(StdlibDocs())
    assert shards.document_hash("A  b\n") == shards.document_hash("a B") != shards.document_hash("ab")

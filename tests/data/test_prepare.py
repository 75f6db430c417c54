"""Corpora, splits, shards and the cache."""

import gzip
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from contracts.conditions import ContractError
from spec.canonical import sha256_file
from spec.errors import DataError
from stack.config import BpeTokenizer, ByteTokenizer, CharTokenizer, DataConfig, Files, StdlibDocs, TailSplit
from stack.data import corpus, shards
from stack.data.prepare import prepare
from stack.data.shards import TokenStream, pack_ids, write_split
from stack.data.tokenizer import Chars

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
        ("cut.txt.gz", gzip.compress(b"some text " * 50, mtime=0)[:-12], "cannot read"),
        ("flipped.txt.gz", gzip.compress(b"some text", mtime=0)[:10] + b"\xff" * 20, "cannot read"),
        ("half.jsonl", b'{"text": "fine"}\n{"text": "half \\ud800 a pair"}\n', "line 2 has half of a surrogate pair"),
        ("list.jsonl", b"[1]\n", "line 1 has no text"),
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


def test_json_text_may_hold_line_separators(tmp_path):
    """U+2028 and U+0085 are allowed in JSON; they end no line of it."""
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", "utf-8")
    assert [d.text for d in corpus.read_documents(Files(paths=(str(tmp_path / "a.jsonl"),)))] == [text]


@pytest.mark.parametrize(("end", "blank"), [("\n", ""), ("\r\n", ""), ("\n", "  \t")])
def test_paragraphs_and_lines_of_any_platform(tmp_path, end, blank):
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{end}two{end}{blank}{end}{end}three".encode())
    read = lambda kind: [d.text for d in corpus.read_documents(Files(paths=(str(path),), documents=kind))]  # noqa: E731
    assert read("paragraph") == [f"one{end}two", "three"] and read("line") == ["one", "two", "three"]
    assert len(read("file")) == 1


def test_the_corpus_hash_is_of_the_text_not_of_its_place(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"text": "x"}\n')
    of = lambda name: corpus.corpus_sha256(Files(paths=(str(tmp_path / name),)))  # noqa: E731
    before = of("here")
    assert before == of("there")
    (tmp_path / "here" / "a.jsonl").rename(tmp_path / "here" / "a.txt")
    assert of("here") != before, "the suffix decides what a document is"


def test_the_manifest_carries_the_licence_that_is_configured(texts, tmp_path):
    for name in ("MIT", "CC0-1.0"):
        cfg = texts.model_copy(update={"corpus": texts.corpus.model_copy(update={"license": name})})
        assert {row.get("license", name) for row in prepare(cfg, cache_dir=tmp_path / "c").inputs()} == {name}


def test_a_corpus_that_changes_while_it_is_read_is_refused(texts, tmp_path, monkeypatch):
    original = corpus.read_documents

    def meanwhile(cfg):
        yield from original(cfg)
        with open(texts.corpus.paths[0], "a") as f:
            f.write("a line that came late\n")

    monkeypatch.setattr(corpus, "read_documents", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(texts, cache_dir=tmp_path / "c")
    assert list((tmp_path / "c" / "data").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="STACKPROOF_CACHE"):
        prepare(texts, cache_dir=tmp_path / "file")


def test_a_build_that_fails_leaves_nothing(texts, tmp_path, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.tensorfile, "write", full)
    with pytest.raises(DataError, match="No space left"):
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
    (data.directory / "tokenizer.json").write_bytes(Chars("".join(reversed(data.tokenizer.symbols))).to_bytes())
    with pytest.raises(DataError, match="not the tokenizer of these shards"):
        prepare(cfg, cache_dir=tmp_path / "c")


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path):
    (tmp_path / "p.txt").write_text("abc def " * 100 + "xyz " * 20)
    cfg = DataConfig(corpus=Files(paths=(str(tmp_path / "p.txt"),)), split=TailSplit(validation_frac=0.2), tokenizer=CharTokenizer())
    data = prepare(cfg, cache_dir=tmp_path / "c")
    held_out = data.manifest["splits"]["validation"]
    assert "x" not in data.tokenizer.symbols and held_out["dropped_chars"] == 60
    assert held_out["bytes"] + held_out["dropped_chars"] == round(880 * 0.2)


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


def test_shards_of_another_width_or_with_foreign_ids_are_refused(tmp_path):
    split = {"tokens": 5, "bytes": 3, "documents": 1, "shards": write_split(tmp_path, "train", [([0, 69_998, 65_536], 1)], Wide)}
    with pytest.raises(DataError, match="stores ids as uint32"):
        TokenStream(tmp_path, split, 300)
    narrower = TokenStream(tmp_path, split, 69_000)
    for read in (lambda: narrower.token_range(0, 5), lambda: narrower.window(0, 4)):
        with pytest.raises(DataError, match="token id 69999"):
            read()


def test_a_window_outside_the_stream_is_refused(tmp_path):
    entries = write_split(tmp_path, "train", [(list(range(20)), 1)], Wide)
    stream = TokenStream(tmp_path, {"tokens": 22, "bytes": 0, "documents": 1, "shards": entries}, 70_000)
    assert stream.n_windows(5) == 4 and stream.window(3, 5).tolist() == [14, 15, 16, 17, 18, 19]
    for number in (-1, 4):
        with pytest.raises(ContractError):
            stream.window(number, 5)


def test_document_starts_point_behind_an_end_of_text_in_every_shard(tmp_path):
    entries = write_split(tmp_path, "train", [([n] * (n + 1), n) for n in range(30)], Wide, max_tokens=60)
    n_tokens = sum(e["tokens"] for e in entries)
    stream = TokenStream(tmp_path, {"tokens": n_tokens, "bytes": 0, "documents": 30, "shards": entries}, 70_000)
    flat = stream.token_range(0, n_tokens)
    assert len(entries) > 3 and [int(flat[s]) for s in stream.document_starts] == list(range(30))
    assert all(flat[s - 1] == Wide.eos_id for s in stream.document_starts)


def test_the_standard_library_is_a_corpus_everywhere(tmp_path):
    documents = list(corpus.read_documents(StdlibDocs()))
    text = sum(len(d.text) for d in documents)
    assert len(documents) > 3000 and text > 1_500_000
    assert corpus.corpus_sha256(StdlibDocs()) == corpus.corpus_sha256(StdlibDocs())
    assert shards.document_hash("A  b\n") == shards.document_hash("a B") != shards.document_hash("ab")


def test_the_standard_library_is_the_same_whatever_was_imported():
    """The text of C modules is theirs alone: not what a process happened to import, print to, or hook itself into as Typer does."""
    code = (
        "import sys, hashlib{}\nfrom stack.data import corpus\nprint(hashlib.sha256(repr([*corpus._builtin_docs()]).encode()).hexdigest())"
    )
    hooked = "\nsys.excepthook = sys.displayhook = sys.unraisablehook = sys.breakpointhook = lambda *a: None\nsys.last_type = OSError"
    bare, crowded, hooks = (
        subprocess.run([sys.executable, "-c", code.format(extra)], check=True, capture_output=True, text=True).stdout
        for extra in ("", ", asyncio, faulthandler, multiprocessing, numpy, pytest", hooked)
    )
    own = hashlib.sha256(repr([*corpus._builtin_docs()]).encode()).hexdigest() + "\n"
    assert bare == crowded == hooks == own, "the last is this process, with pytest's own streams and hooks"


def test_the_same_corpus_gives_the_same_shards_in_every_process(texts, tmp_path):
    code = (
        "import sys; from pathlib import Path; from stack.config import DataConfig; from stack.data.prepare import prepare\n"
        "d = prepare(DataConfig.model_validate_json(sys.argv[1]), cache_dir=Path(sys.argv[2])); print([r['sha256'] for r in d.inputs()])"
    )
    cfg = texts.model_copy(update={"tokenizer": BpeTokenizer(vocab_size=400)}).model_dump_json()
    runs = [[sys.executable, "-c", code, cfg, str(tmp_path / n)] for n in ("a", "b")]
    first, second = (subprocess.run(r, check=True, capture_output=True, text=True).stdout for r in runs)
    assert first == second and len(first) > 150

"""Reading text: files of any platform, what is refused, what is dropped and counted,
and the embedded corpora.
"""

import gzip
import hashlib
import json
import subprocess
import sys

import pytest

from stackproof.config import ByteTokenizer, DataConfig, Files, StdlibDocs
from stackproof.data import account, corpus, files, shards, stdlib
from stackproof.data.prepare import prepare
from stackproof.spec.errors import DataError

GOOD = [
    f"Good document number {n} says something of its own, so that it stays." for n in range(100)
]


def as_lines(texts) -> bytes:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def read(path, **options) -> list[str]:
    return [d.text for d in corpus.read_documents(Files(paths=(str(path),), **options))]


def test_gzipped_files_and_folders_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt.gz").write_bytes(gzip.compress(b"first\n\nsecond"))
    (tmp_path / "a" / "two.jsonl").write_text('{"body": "third"}\n\n{"body": "fourth"}\n')
    (tmp_path / "a" / "ignored.bin").write_bytes(b"\x00")
    assert read(tmp_path / "a", documents="paragraph", text_field="body") == [
        "first",
        "second",
        "third",
        "fourth",
    ]


def test_files_of_another_kind_in_a_folder_are_counted_and_named(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "texts.jsonl").write_bytes(as_lines(GOOD))
    for name in ("scan.pdf", "table.csv.gz"):
        (folder / name).write_bytes(b"\x00")
    cfg = DataConfig(
        corpus=Files(paths=(str(folder), str(folder / "texts.jsonl"))), tokenizer=ByteTokenizer()
    )
    manifest = prepare(cfg, cache_dir=tmp_path / "c").manifest
    assert account.notices(manifest) == [
        f"files: 2 file(s) of another kind were not read, the first {folder}/scan.pdf"
    ]
    (folder / "scan.pdf").unlink()
    (folder / "table.csv.gz").unlink()
    again = prepare(cfg, cache_dir=tmp_path / "d").manifest
    assert account.notices(again) == [] and again["splits"] == manifest["splits"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bad.jsonl", b'{"text": 1}\n', "bad.jsonl line 1 has no text"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "bad.jsonl line 2 is not JSON"),
        ("bad.txt.gz", b"not gzip", "cannot read .*bad.txt.gz"),
        (
            "cut.txt.gz",
            gzip.compress(b"some text " * 50, mtime=0)[:-12],
            "cannot read .*cut.txt.gz",
        ),
        (
            "flipped.txt.gz",
            gzip.compress(b"some text", mtime=0)[:10] + b"\xff" * 20,
            "cannot read .*flipped.txt.gz",
        ),
        ("list.jsonl", b"[1]\n", "list.jsonl line 1 has no text"),
        ("empty.txt", b"  \n", "nothing is left of source files[\\s\\S]*empty.txt"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        prepare(DataConfig(corpus=Files(paths=(str(tmp_path / name),))), cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "bad", "n_bytes", "reason", "example"),
    [
        ("a.txt", b"not \xff\xfe text of any kind\n", 23, "not-utf8", "a.txt line 101, byte 0xff"),
        (
            "a.txt.gz",
            b"not \xff\xfe text of any kind\n",
            23,
            "not-utf8",
            "a.txt.gz line 101, byte 0xff",
        ),
        ("a.jsonl", b'{"text": "not \xff\xfe text"}\n', 23, "not-utf8", "a.jsonl line 101"),
        ("a.jsonl", b'{"text": "half \\ud800 a pair"}\n', 30, "half-surrogate", "a.jsonl line 101"),
        ("a.jsonl", b'{"text": "too short"}\n', 9, "too-short", "a.jsonl line 101"),
        ("a.jsonl", as_lines(["x" * 5000]), 5000, "long-paragraph", "a.jsonl line 101"),
        ("a.txt", b"x" * 5000 + b"\n", 5001, "too-long", "a.txt line 101"),
    ],
)
def test_unfit_text_is_dropped_and_counted_with_file_and_line(
    tmp_path, monkeypatch, name, bad, n_bytes, reason, example
):
    if reason == "too-long":
        monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 4000)
    good = as_lines(GOOD) if ".jsonl" in name else "".join(f"{t}\n" for t in GOOD).encode()
    content = good + bad
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    cfg = DataConfig(
        corpus=Files(paths=(str(tmp_path / name),), documents="line"), tokenizer=ByteTokenizer()
    )
    (source,) = prepare(cfg, cache_dir=tmp_path / "c").manifest["sources"]
    receipt = source["receipt"]
    assert receipt["dropped"] == {
        reason: {"documents": 1, "bytes": n_bytes, "example": f"{tmp_path}/{example}"}
    }
    assert (receipt["documents_in"], receipt["documents_out"]) == (101, 100)
    assert (
        receipt["bytes_out"] == sum(len(t.encode()) for t in GOOD) == receipt["bytes_in"] - n_bytes
    )


def test_a_source_that_lost_most_of_its_text_is_named(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(as_lines([*GOOD, " ".join(GOOD)]))
    manifest = prepare(
        DataConfig(corpus=Files(paths=(str(tmp_path / "texts.jsonl"),)), tokenizer=ByteTokenizer()),
        cache_dir=tmp_path / "c",
    ).manifest
    (line,) = account.notices(manifest)
    assert (
        line.startswith("files: 50% of its bytes were dropped: 1 of 101 dropped as long-paragraph")
        and "--documents paragraph" in line
    )


def test_suffixes_count_in_any_case_and_other_json_is_refused(tmp_path):
    (tmp_path / "A.TXT").write_text("first")
    (tmp_path / "b.NDJSON").write_bytes(as_lines(["second"]))
    assert (
        read(tmp_path)
        == ["first", "second"]
        == [*read(tmp_path / "A.TXT"), *read(tmp_path / "b.NDJSON")]
    )
    (tmp_path / "c.json").write_text('{"text": "third"}')
    with pytest.raises(DataError, match=r"c\.json is one JSON value"):
        read(tmp_path / "c.json")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n" * 50, b"short\n" * 50], ids=["not-utf8", "too-short"]
)
def test_a_corpus_of_which_nothing_is_left_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match="nothing is left of source files"):
        prepare(
            DataConfig(corpus=Files(paths=(str(tmp_path / "a.txt"),), documents="line")),
            cache_dir=tmp_path / "c",
        )


def test_a_path_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="names nothing"):
        prepare(
            DataConfig(corpus=Files(paths=(str(tmp_path / "absent*"),))), cache_dir=tmp_path / "c"
        )


def test_json_text_may_hold_line_separators(tmp_path):
    """U+2028 and U+0085 are allowed in JSON; they end no line of it."""
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\r\n", "utf-8"
    )
    assert read(tmp_path / "a.jsonl") == [text]


@pytest.mark.parametrize(("end", "blank"), [("\n", ""), ("\r\n", ""), ("\n", "  \t")])
def test_paragraphs_and_lines_of_any_platform(tmp_path, end, blank):
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{end}two{end}{blank}{end}{end}three".encode())
    assert read(path, documents="paragraph") == [f"one{end}two", "three"] and read(
        path, documents="line"
    ) == ["one", "two", "three"]
    assert len(read(path, documents="file")) == 1


def test_the_corpus_hash_is_of_the_text_not_of_its_place(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"text": "x"}\n')
    of = lambda name: corpus.corpus_sha256(Files(paths=(str(tmp_path / name),)))  # noqa: E731
    before = of("here")
    assert before == of("there")
    (tmp_path / "here" / "a.jsonl").rename(tmp_path / "here" / "a.txt")
    assert of("here") != before, "the suffix decides what a document is"


# --- embedded corpora -----------------------------------------------------------------------------


def test_the_standard_library_is_a_corpus_everywhere():
    documents = list(corpus.read_documents(StdlibDocs()))
    text = sum(len(d.text) for d in documents)
    assert len(documents) > 3000 and text > 1_500_000
    assert corpus.corpus_sha256(StdlibDocs()) == corpus.corpus_sha256(StdlibDocs())
    assert (
        shards.document_hash("A  b\n") == shards.document_hash("a B") != shards.document_hash("ab")
    )


def test_the_standard_library_is_the_same_whatever_was_imported():
    """The text of C modules is theirs alone: not what a process happened to import, print to, or
    hook itself into as Typer does.
    """
    code = "import sys, hashlib{}\nfrom stackproof.data import stdlib\n"
    code += "print(hashlib.sha256(repr([*stdlib._builtin_docs()]).encode()).hexdigest())"
    hooked = (
        "\nsys.excepthook = sys.displayhook = sys.unraisablehook = sys.breakpointhook = lambda "
        "*a: None\nsys.last_type = OSError"
    )
    bare, crowded, hooks = (
        subprocess.run(
            [sys.executable, "-c", code.format(extra)], check=True, capture_output=True, text=True
        ).stdout
        for extra in ("", ", asyncio, faulthandler, multiprocessing, numpy, pytest", hooked)
    )
    own = hashlib.sha256(repr([*stdlib._builtin_docs()]).encode()).hexdigest() + "\n"
    assert bare == crowded == hooks == own, (
        "the last is this process, with pytest's own streams and hooks"
    )

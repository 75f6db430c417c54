"""Files of every form become documents or a reason why not; nothing is lost,
cut in two or read whole without need.
"""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stackproof.config import Files
from stackproof.data import corpus, files
from stackproof.data.files import (
    Document,
    Slice,
    Unreadable,
    chat_text,
    evaluation_texts,
    read_slice,
)
from stackproof.spec.errors import DataError


def everything(*paths, **options):
    """What a source gives over all of its parts, in order."""
    cfg = Files(paths=tuple(map(str, paths)), **options)
    return [item for part in corpus.parts(cfg) for item in corpus.read_part(cfg, part)]


def texts(*paths, **options):
    items = [i for i in everything(*paths, **options) if getattr(i, "reason", "") != "empty"]
    assert all(isinstance(i, Document) for i in items), items
    return [i.text for i in items]


def lines(*values):
    return "".join(json.dumps(v) + "\n" for v in values).encode()


def zst(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def parquet(path, columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "md", "py", "rst"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_and_its_paragraphs_and_lines_are_more(
    tmp_path, suffix, packed
):
    data, path = "one\ntwo\n\nthree é\n".encode(), tmp_path / f"a.{suffix}{packed}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zst}[packed](data))
    assert texts(path) == [data.decode()]
    assert texts(path, documents="paragraph") == ["one\ntwo", "three é"]
    assert texts(path, documents="line") == ["one", "two", "three é"]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_json_lines_give_their_field_whatever_documents_says(tmp_path, packed):
    data, path = (
        lines({"text": "one\ntwo"}, {"text": " "}, {"text": "three"}),
        tmp_path / f"a.jsonl{packed}",
    )
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zst}[packed](data))
    for documents in ("file", "paragraph", "line"):
        assert texts(path, documents=documents) == ["one\ntwo", "three"], (
            "white space is no document"
        )


def test_zst_of_several_frames_is_read_to_its_end(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zst(b"first frame, ") + zst(b"second frame"))
    (tmp_path / "b.txt.gz").write_bytes(
        gzip.compress(b"first member, ") + gzip.compress(b"second member")
    )
    assert texts(tmp_path) == ["first frame, second frame", "first member, second member"]


def test_parquet_gives_its_column_row_by_row(tmp_path):
    parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": ["one", " ", "three"]})
    assert texts(tmp_path) == ["one", "three"]
    parquet(tmp_path / "b.parquet", {"meta": [{"body": "deep"}], "text": ["shallow"]})
    assert texts(tmp_path / "b.parquet", text_field="meta.body") == ["deep"]
    parquet(
        tmp_path / "c.parquet",
        {"text": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]},
    )
    assert texts(tmp_path / "c.parquet") == ["> hi / < ho"]
    turns = [{"from": who, "value": "hi", "tools": [["x"]]} for who in ("human", "gpt")]
    parquet(tmp_path / "d.parquet", {"a.b": ["flat"], "a": [{"c": turns}]})
    assert texts(tmp_path / "d.parquet", text_field="a.b") == ["flat"]
    assert texts(tmp_path / "d.parquet", text_field="a.c") == ["> hi / < hi"]


def test_parquet_without_the_column_or_the_text_or_its_end_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", {"body": ["one"]})
    with pytest.raises(DataError, match=r"a\.parquet has no text under 'text'[\s\S]*body"):
        texts(tmp_path / "a.parquet")
    parquet(tmp_path / "b.parquet", {"text": ["one", None]})
    with pytest.raises(DataError, match=r"b\.parquet row 2 has no text"):
        texts(tmp_path / "b.parquet")
    for name, data in (
        ("c.parquet", (tmp_path / "b.parquet").read_bytes()[:-20]),
        ("d.parquet", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            texts(tmp_path / name)


def test_parquet_columns_of_another_type_or_of_too_many_values_are_not_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    n, path = 200_000, tmp_path / "a.parquet"
    turn = pa.struct({"role": pa.string(), "content": pa.string()})
    for values, kind, why in (
        ([[None] * n] * 4, pa.list_(pa.null()), "has no text under 'text'"),
        ([[True] * n] * 4, pa.list_(pa.bool_()), "has no text under 'text'"),
        ([[["a"] * n]] * 4, pa.list_(pa.list_(pa.string())), "has no text under 'text'"),
        ([[None] * n] * 4, pa.list_(turn), "expands to more than 250 times its size"),
    ):
        parquet(path, {"text": pa.array(values, kind)})
        with pytest.raises(DataError, match=why):
            texts(path)


def test_a_parquet_column_is_refused_by_its_metadata_before_it_is_read(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    parquet(tmp_path / "a.parquet", {"text": ["x" * 10**6], "many": [[1] * 10**6]})
    monkeypatch.setattr(files, "FREE_BYTES", 10**6)
    assert len(texts(tmp_path / "a.parquet")[0]) == 10**6, "other columns do not count"
    monkeypatch.setattr(files, "FREE_BYTES", 0)
    monkeypatch.setattr(files, "MAX_RATIO", 1)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    with pytest.raises(DataError, match="expands to more than 1 times its size"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(("dense", "rows"), [(20, 4), (0, 1)])
def test_a_parquet_column_that_expands_is_read_row_by_row(tmp_path, monkeypatch, dense, rows):
    pq = pytest.importorskip("pyarrow.parquet")
    read, sizes = pq.ParquetFile.iter_batches, []
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, batch_size, **given: sizes.append(batch_size) or read(self, 4, **given),
    )
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(files, "DENSE", dense)
    monkeypatch.setattr(files, "ROWS_AT_ONCE", 4)
    parquet(tmp_path / "a.parquet", {"text": ["a" * 100, "b"] * 100})
    assert len(texts(tmp_path / "a.parquet")) == 200
    assert sizes == [rows]


def test_a_dotted_field_reaches_inside_and_a_key_with_a_dot_goes_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        lines({"a": {"b": "deep"}}, {"a.b": "flat", "a": {"b": "deep"}})
    )
    assert texts(tmp_path / "a.jsonl", text_field="a.b") == ["deep", "flat"]
    with pytest.raises(DataError, match=r"a\.jsonl line 1 has no text under 'a\.c'"):
        texts(tmp_path / "a.jsonl", text_field="a.c")


def test_folders_and_globs_are_read_in_order_each_file_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in (
        "b.txt",
        "a.md",
        "deep/c.txt",
        "deep/er/d.txt.gz",
        "deep/skipped.bin",
        "deep/skipped.json",
    ):
        text = name.encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert texts(tmp_path) == ["a.md", "b.txt", "deep/c.txt", "deep/er/d.txt.gz"]
    assert texts(tmp_path / "*.txt", tmp_path / "b.txt", tmp_path / "a.md") == ["b.txt", "a.md"]
    assert texts(tmp_path / "**" / "*.txt") == ["b.txt", "deep/c.txt"]
    with pytest.raises(DataError, match=r"names nothing readable: .*absent"):
        texts(tmp_path / "b.txt", tmp_path / "absent*")


# --- chats ----------------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "# You are\n# a secret"},
    {"role": "user", "content": " Where is a/b? "},
    {"role": "assistant", "content": "There."},
]


def test_a_chat_becomes_turns_and_the_system_none_of_them(tmp_path):
    shared = [{"from": "human", "value": "Where is a/b?"}, {"from": "gpt", "value": "There."}]
    (tmp_path / "a.jsonl").write_bytes(lines({"text": TURNS}, {"text": shared}))
    assert texts(tmp_path) == ["> Where is a/b? / < There."] * 2


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": ["x"]},
        "x",
        {},
    ],
)
def test_a_turn_that_nobody_can_place_is_named(turn):
    with pytest.raises(DataError, match="line 7 has a chat turn of an unknown role"):
        chat_text([*TURNS, turn], "line 7")


def test_chats_in_which_nobody_takes_turns_are_counted(tmp_path):
    """A lone user turn, two in a row, an assistant who speaks first: shapes in which a system
    prompt would pass for the user's.
    """
    _, user, assistant = TURNS
    chats = (
        [user],
        [user, user, assistant],
        [assistant, user, assistant],
        [user, {"role": "assistant", "content": " "}],
    )
    (tmp_path / "a.jsonl").write_bytes(
        lines({"text": TURNS}, *({"text": c} for c in chats), {"text": [*TURNS, user]})
    )
    first, *bad, last = everything(tmp_path)
    assert isinstance(first, Document) and isinstance(last, Document)
    assert [i.reason for i in bad] == ["chat-turns"] * 4 and all(i.n_bytes > 0 for i in bad)


# --- bytes ----------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "three"}))
    assert texts(tmp_path / "a.txt") == ["one\n\ntwo\ufeff"] and texts(tmp_path / "b.jsonl") == [
        "three"
    ]
    for documents in ("line", "paragraph"):
        assert texts(tmp_path / "a.txt", documents=documents) == ["one", "two\ufeff"]


def test_nul_bytes_arrive_for_the_filter_to_see(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\0two")
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "three\0"}))
    assert texts(tmp_path) == ["one\0two", "three\0"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1251"])
def test_another_encoding_is_set_aside_with_its_place_and_the_rest_is_read(tmp_path, encoding):
    foreign = "größer und später, Дорога"
    foreign = foreign.encode(encoding, "ignore").replace(b"\n", b"")
    (tmp_path / "a.txt").write_bytes(b"first line\n" + foreign + b"\nlast line\n")
    first, odd, last = everything(tmp_path, documents="line")
    assert (first.text, last.text) == ("first line", "last line")
    assert (
        isinstance(odd, Unreadable)
        and odd.reason == "not-utf8"
        and odd.n_bytes == len(foreign)
        and "line 2, byte 0x" in odd.id
    )
    (whole,) = everything(tmp_path)
    assert (
        whole.reason == "not-utf8" and whole.n_bytes == len(foreign) + 22 and "+1 lines" in whole.id
    )


def test_invalid_bytes_in_json_lines_cost_their_line_alone(tmp_path):
    half = b'{"text": "half \\ud800 a pair"}\n'
    (tmp_path / "a.jsonl").write_bytes(
        lines({"text": "one"}) + b'{"text": "\xff"}\n' + half + lines({"text": "four"})
    )
    one, bad, pair, four = everything(tmp_path)
    assert (one.text, four.text) == ("one", "four") and (bad.reason, pair.reason) == (
        "not-utf8",
        "half-surrogate",
    )
    assert bad.id.endswith("a.jsonl line 2") and (bad.n_bytes, pair.n_bytes) == (13, len(half) - 1)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_an_empty_source_has_no_document(tmp_path, name, content):
    """An empty file is counted as such where a file is a document; a blank line is nothing."""
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for documents in ("file", "paragraph", "line"):
        counted = documents == "file" and not name.endswith(".jsonl")
        assert [i.reason for i in everything(tmp_path, documents=documents)] == ["empty"] * counted


def test_a_record_without_text_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        lines(
            {"text": "one"}, {"text": " \n"}, {"text": [{"role": "system", "content": "be brief"}]}
        )
    )
    one, blank, silent = everything(tmp_path)
    assert (
        one.text == "one"
        and (blank.reason, silent.reason) == ("empty", "empty")
        and blank.id.endswith("line 2")
    )


def test_bytes_that_are_no_text_in_parquet_cost_their_row_alone(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    column = pyarrow.array([b"one", b"bad \xff", b"three"], pyarrow.binary()).view(pyarrow.string())
    pq.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    one, bad, three = everything(tmp_path)
    assert (one.text, three.text, bad.reason) == ("one", "three", "not-utf8") and "row 2" in bad.id


# --- huge lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "kept"), [(1000, True), (1001, False)])
def test_a_document_above_the_limit_is_set_aside_with_its_size(tmp_path, monkeypatch, n, kept):
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "whole.txt").write_bytes(b"x" * n)
    (item,) = everything(tmp_path / "whole.txt")
    assert isinstance(item, Document) == kept and (
        kept or (item.reason, item.n_bytes) == ("too-long", n)
    )
    (tmp_path / "parts.txt").write_bytes(
        b"first\n\n" + b"x" * (n - 500) + b"\n" + b"y" * 498 + b"\n\nlast"
    )
    first, middle, last = everything(tmp_path / "parts.txt", documents="paragraph")
    assert (first.text, last.text) == ("first", "last") and isinstance(middle, Document) == kept, (
        "n bytes with their line ends"
    )


def test_a_huge_line_is_passed_over_in_bounded_memory(tmp_path, monkeypatch):
    """64 MB in one line of a gzipped file: neither it nor the file is ever held whole, and the
    lines around it are read.
    """
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 100_000)
    for name, start, end in (("a.txt.gz", b"", b""), ("a.jsonl.gz", b'{"text": "', b'"}')):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as f:
            f.write(start + b"first" + end + b"\n" + start)
            for _ in range(64):
                f.write(b"x" * 1_000_000)
            f.write(end + b"\n" + start + b"last" + end + b"\n")
        tracemalloc.start()
        first, huge, last = everything(tmp_path / name, documents="line")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (first.text, last.text, huge.reason) == ("first", "last", "too-long")
        # measured 3.3 MB; blocks of 1 MiB
        assert huge.n_bytes == pytest.approx(64_000_000, abs=20) and peak < 8_000_000


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl",
            lines({"text": "a"}, {"body": "b"}),
            r"a\.jsonl line 2 has no text under 'text'[\s\S]*body",
        ),
        ("a.jsonl", lines({"text": "a"}, {"text": 3}), r"a\.jsonl line 2 has no text"),
        ("a.jsonl", lines([1]), r"a\.jsonl line 1 has no text[\s\S]*list"),
        ("a.jsonl", b'{"text": "a"}\n\n{oops\n', r"a\.jsonl line 3 is not JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl line 1 is not JSON"),
        (
            "a.txt.gz",
            gzip.compress(b"some text " * 5000, mtime=0)[:-12],
            r"cannot read .*a\.txt\.gz",
        ),
        ("a.txt.gz", b"not gzip", r"cannot read .*a\.txt\.gz"),
        (
            "a.txt.gz",
            gzip.compress(b"some text", mtime=0)[:10] + b"\xff" * 20,
            r"cannot read .*a\.txt\.gz",
        ),
        ("a.txt.zst", b"not zst", r"cannot read .*a\.txt\.zst"),
    ],
)
@pytest.mark.parametrize("documents", ["file", "line"])
def test_damage_is_named_with_file_and_line(tmp_path, name, content, says, documents):
    (tmp_path / name).write_bytes(content)
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    with pytest.raises(DataError, match=says):
        everything(tmp_path, documents=documents)


def test_a_truncated_zst_is_damage_and_no_shorter_text(tmp_path):
    whole = zst(b"".join(b"line %d of a text that must not end here\n" % n for n in range(5000)))
    (tmp_path / "a.txt.zst").write_bytes(whole[: len(whole) // 2])
    for documents in ("file", "paragraph", "line"):
        with pytest.raises(DataError, match="cannot read"):
            everything(tmp_path, documents=documents)


def test_a_file_that_vanishes_is_a_data_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    cfg = Files(paths=(str(path),))
    (part,) = corpus.parts(cfg)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt vanished while it was read"):
        list(corpus.read_part(cfg, part))
    with pytest.raises(DataError, match="names nothing"):
        corpus.parts(cfg)


# --- slices ---------------------------------------------------------------------------------------

LINE = st.one_of(
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=12),
    st.sampled_from(["", " ", "x" * 40, "\r", "é" * 7, "\ufeff"]),
)


def bodies(items):
    return [
        (type(i), i.text) if isinstance(i, Document) else (type(i), i.reason, i.n_bytes)
        for i in items
    ]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(LINE, max_size=20),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from(["a.txt", "a.jsonl"]),
    st.booleans(),
)
@example(["x" * 40, "after a line above the limit that slices begin in"], 7, True, "a.jsonl", False)
def test_the_parts_of_a_file_together_are_the_file(
    tmp_path_factory, monkeypatch, values, part_bytes, ends, name, broken
):
    """For every size of a part: the same documents, in the same order,
    none twice and none cut in two.
    """
    values = (
        [json.dumps({"text": v}, ensure_ascii=False) for v in values]
        if name == "a.jsonl"
        else values
    )
    data = "\n".join(values).encode() + (b"\n" if ends else b"")
    if broken:
        data = data.replace(
            b"x" * 40, b'{"text": "\xff"}' if name == "a.txt" else b"\xff" + b"x" * 39
        )
    path = tmp_path_factory.mktemp("parts") / name
    path.write_bytes(data)
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 50)
    cfg = Files(paths=(str(path),), documents="line")
    whole = list(read_slice(Slice(path), cfg))
    monkeypatch.setattr(corpus, "PART_BYTES", part_bytes)
    made = corpus.parts(cfg)
    assert sum(p.n_bytes for p in made) == len(data) and (len(made) > 1) == (len(data) > part_bytes)
    assert bodies(i for p in made for i in corpus.read_part(cfg, p)) == bodies(whole)


def test_a_slice_that_begins_in_the_middle_says_at_which_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree\n")
    cfg = Files(paths=(str(tmp_path / "a.txt"),), documents="line")
    of = (  # noqa: E731
        lambda start, stop: [
            (d.id.rsplit(" ", 2)[1:], d.text)
            for d in read_slice(Slice(tmp_path / "a.txt", start, stop), cfg)
        ]
    )
    assert of(0, 4) == [(["line", "1"], "one")] and of(4, 8) == [(["byte", "4"], "two")]
    assert of(5, 14) == [(["byte", "8"], "three")] and of(9, 14) == []


def test_small_files_share_a_part_and_what_cannot_be_cut_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 100)
    for n in range(5):
        (tmp_path / f"{n}.txt").write_bytes(b"x" * 40)
    cfg = Files(paths=(str(tmp_path),))
    assert [len(p.slices) for p in corpus.parts(cfg)] == [2, 2, 1]
    (tmp_path / "5.txt").write_bytes(b"y" * 1000)
    (tmp_path / "6.jsonl.gz").write_bytes(
        gzip.compress(lines(*({"text": str(n) * 50} for n in range(400))))
    )
    assert all(s.stop is None for p in corpus.parts(cfg) for s in p.slices)


# --- evaluation sets ------------------------------------------------------------------------------


def test_an_evaluation_set_gives_every_named_field_or_its_paragraphs(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"question": "q1", "text": "t1"}, {"question": "q2"}))
    assert list(evaluation_texts(tmp_path / "a.jsonl", ("text", "question"))) == [
        ["t1", "q1"],
        ["q2"],
    ]
    (tmp_path / "c.jsonl").write_bytes(
        lines({"n": 1, "answer": "a1", "question": "q1"}, {"other": "o2"})
    )
    assert list(evaluation_texts(tmp_path / "c.jsonl", ())) == [["a1", "q1"], ["o2"]]
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n\nthree")
    assert list(evaluation_texts(tmp_path / "b.txt", ("text",))) == [["one\ntwo"], ["three"]]
    with pytest.raises(DataError, match=r"a\.jsonl line 2 has no text under text"):
        list(evaluation_texts(tmp_path / "a.jsonl", ("text",)))


@pytest.mark.parametrize("content", [b'{"question": "\xff"}\n', b"{oops\n", b"[" * 100_000])
def test_a_damaged_evaluation_set_is_named_and_never_passed_over(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(lines({"question": "fine"}) + content)
    with pytest.raises(DataError, match=r"a\.jsonl line 2"):
        list(evaluation_texts(tmp_path / "a.jsonl", ("question",)))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"fine\n\n\xff\n", "not-utf8"), (b"a" * 51, "too-long")]
)
def test_a_text_that_cannot_be_read_as_evaluation_set_is_refused(
    tmp_path, monkeypatch, content, reason
):
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 50)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt .*cannot be read: {reason}") as error:
        list(evaluation_texts(tmp_path / "a.txt", ()))
    assert "at most 50 bytes" in error.value.allowed


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_an_evaluation_set_that_is_gone_or_cut_off_is_a_data_error(tmp_path, suffix):
    whole = gzip.compress(lines(*({"question": f"question {n}"} for n in range(500))), mtime=0)
    (tmp_path / f"cut.{suffix}.gz").write_bytes(whole[:-12])
    for name in (f"gone.{suffix}", f"cut.{suffix}.gz"):
        with pytest.raises(DataError, match=name):
            list(evaluation_texts(tmp_path / name, ("question",)))

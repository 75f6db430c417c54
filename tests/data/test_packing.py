"""Rows out of a token stream: every label exactly once, documents apart, and little padding."""

from bisect import insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import BestFit, Concatenated
from stackproof.contracts.conditions import ContractError
from stackproof.data import packing
from stackproof.data.packing import IGNORE_INDEX, PADDING, ConcatenatedStream, PackedStream, plan
from stackproof.data.shards import write_split
from stackproof.spec.errors import DataError

EOS, VOCAB = 69_999, 70_000
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=40)


class Wide:
    """A tokenizer of 70,000 ids, so that every token of a small stream can be its own number."""

    vocab_size, eos_id, sha256 = VOCAB, EOS, "ab" * 32


def numbered(folder, lengths, max_tokens=10**9):
    """A split whose tokens count upwards, so that a label says where it comes from;
    and its flat tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    firsts = np.cumsum([0, *lengths]).tolist()
    documents = [(list(range(first, first + n)), first) for first, n in zip(firsts, lengths)]
    entries = write_split(folder, "train", documents, Wide, max_tokens=max_tokens)
    split = {"tokens": sum(e["tokens"] for e in entries), "bytes": 0, "documents": len(lengths)}
    return split | {"shards": [e | {"source": "all"} for e in entries]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A fresh folder for every example."""
    return iter(lambda: tmp_path_factory.mktemp("split"), None)


def pieces_of(rows, r):
    """(inputs, labels) of the documents of one row, padding aside."""
    valid = rows.labels[r] != IGNORE_INDEX
    for document in np.unique(rows.document_ids[r][valid]):
        mine = (rows.document_ids[r] == document) & valid
        yield rows.input_ids[r][mine].tolist(), rows.labels[r][mine].tolist()


# --- best fit -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.sampled_from([30, 100, 10**9]))
def test_best_fit_emits_every_label_exactly_once(folders, lengths, seq_len, max_tokens):
    """Every token of every document, and every end of text but the leading one of a shard."""
    split = numbered(folder := next(folders), lengths, max_tokens)
    stream = PackedStream(folder, split, VOCAB)
    rows = stream.rows(np.arange(stream.n_windows(seq_len)), seq_len)
    labels = rows.labels[rows.labels != IGNORE_INDEX]
    assert np.array_equal(np.sort(labels), np.sort([*range(sum(lengths)), *[EOS] * len(lengths)]))
    assert stream.dropped_tokens(seq_len) == 0
    assert (
        len(labels) + len(split["shards"]) == stream.n_tokens
        and stream.padding(seq_len) == (rows.labels == IGNORE_INDEX).sum()
    )


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 50))
def test_best_fit_keeps_documents_apart(folders, lengths, seq_len):
    """A piece is neighbouring tokens of one document: inputs begin with the end of text or
    go on where a row was full.
    """
    split = numbered(folder := next(folders), lengths)
    stream, firsts = PackedStream(folder, split, VOCAB), np.cumsum([0, *lengths])
    rows = stream.rows(np.arange(stream.n_windows(seq_len)), seq_len)
    for r in range(len(rows.labels)):
        for inputs, labels in pieces_of(rows, r):
            assert inputs[1:] == labels[:-1] and EOS not in labels[:-1], (
                "the next token is the label, and no document goes on after its end"
            )
            content = [t for t in labels if t != EOS]
            assert (
                content == list(range(content[0], content[0] + len(content)))
                if content
                else labels == [EOS]
            )
            assert not content or np.searchsorted(firsts, content[0], "right") == np.searchsorted(
                firsts, content[-1], "right"
            )
            if inputs[0] != EOS and content:
                first = firsts[np.searchsorted(firsts, content[0], "right") - 1]
                assert (content[0] - first) % seq_len == 0, (
                    "a long document is cut every seq_len labels"
                )


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 50))
def test_padding_is_at_the_end_of_a_row_and_no_document(folders, lengths, seq_len):
    split = numbered(folder := next(folders), lengths)
    stream = PackedStream(folder, split, VOCAB)
    rows = stream.rows(np.arange(stream.n_windows(seq_len)), seq_len)
    valid = rows.labels != IGNORE_INDEX
    assert valid[:, 0].all() and (valid[:, 1:] <= valid[:, :-1]).all(), (
        "no label comes after padding"
    )
    assert (rows.document_ids[:, 0] == 0).all() and ((rows.document_ids == PADDING) == ~valid).all()
    for ids, real, inputs in zip(rows.document_ids, valid, rows.input_ids):
        assert set(np.diff(ids[real])) <= {0, 1} and not inputs[~real].any()


def first_fit_decreasing(lengths, capacity):
    """Rows that the plain textbook rule needs."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, room in enumerate(rooms) if room >= length), None)
        if at is None:
            rooms.append(capacity - length)
        else:
            rooms[at] -= length
    return len(rooms)


def best_fit_decreasing(lengths, capacity):
    """The fullest row that still holds it, by a sorted list instead of a table of bits;
    the room left in each row.
    """
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, room in enumerate(rooms) if room >= length), None)
        room = rooms.pop(at) if at is not None else capacity
        insort(rooms, room - length)
    return rooms


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=80), st.integers(1, 60))
def test_rows_are_as_few_as_the_plain_rules_need(n_labels, seq_len):
    """As many as best fit decreasing by the book; and so few that no two
    rows could be laid together.
    """
    starts = np.cumsum([1, *n_labels])
    made = plan(starts[:-1], int(starts[-1]), seq_len)
    whole = [min(seq_len, n - cut) for n in n_labels for cut in range(0, n, seq_len)]
    filled = [sum(length for _, length in made.pieces_of(r)) for r in range(made.n_rows)]
    assert sorted(seq_len - f for f in filled) == best_fit_decreasing(whole, seq_len)
    # Both rules need at most 11/9 of the best plus one; so does first fit,
    # which is the better known of the two.
    assert made.n_rows <= 11 / 9 * first_fit_decreasing(whole, seq_len) + 1
    assert sum(filled) == sum(n_labels) == made.n_labels and max(filled) <= seq_len
    assert made.n_rows == 1 or sum(sorted(filled)[:2]) > seq_len


def test_best_fit_wastes_little_on_many_documents():
    """10,000 documents of 1 to 400 tokens in rows of 512: less than a half percent of padding."""
    lengths = np.random.default_rng(1).integers(1, 400, 10_000)
    made = plan(np.cumsum([1, *lengths])[:-1], int(lengths.sum()) + 1, 512)
    assert 0 <= made.n_rows * 512 / lengths.sum() - 1 < 0.005  # measured 4.6e-4


def test_a_plan_of_no_document_has_no_row():
    assert plan(np.zeros(0, np.int64), 1, 8).n_rows == 0


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 30), st.data())
def test_rows_are_the_same_in_whatever_company_they_are_asked_for(folders, lengths, seq_len, data):
    split = numbered(folder := next(folders), lengths, max_tokens=60)
    for kind in (PackedStream, ConcatenatedStream):
        stream = kind(folder, split, VOCAB)
        if not (n := stream.n_windows(seq_len)):
            continue
        chosen = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6)))
        whole, few = (
            stream.rows(np.arange(n), seq_len),
            kind(folder, split, VOCAB).rows(chosen, seq_len),
        )
        assert np.array_equal(few.input_ids, whole.input_ids[chosen]) and np.array_equal(
            few.labels, whole.labels[chosen]
        )
        assert few.document_ids is None or np.array_equal(
            few.document_ids, whole.document_ids[chosen]
        )


def test_rows_never_mix_sources(tmp_path):
    """Two shards of two sources: a row holds tokens of one, and the spans say which."""
    split = numbered(tmp_path, [7, 3, 9, 30, 2, 8], max_tokens=40)
    assert len(split["shards"]) == 2
    split["shards"][1]["source"] = "other"
    stream, border = PackedStream(tmp_path, split, VOCAB), split["shards"][0]["tokens"]
    (first, n), (second, m) = stream.spans(16)["all"], stream.spans(16)["other"]
    assert (first, second) == (0, n) and n + m == stream.n_windows(16)
    rows = stream.rows(np.arange(n + m), 16)
    content = np.where((rows.labels == IGNORE_INDEX) | (rows.labels == EOS), -1, rows.labels)
    last_of_first = stream.token_range(0, border - 1).tolist()[-1]
    assert (
        content[:n].max() == last_of_first and (content[n:][content[n:] >= 0] > last_of_first).all()
    )


# --- concatenated ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.sampled_from([30, 100, 10**9]))
def test_concatenation_emits_drops_and_leads_every_token(folders, lengths, seq_len, max_tokens):
    """Emitted, dropped and leading tokens add up to all; labels are the next tokens in order, and
    no label is missing before the last.
    """
    split = numbered(folder := next(folders), lengths, max_tokens)
    stream = ConcatenatedStream(folder, split, VOCAB)
    n = stream.n_windows(seq_len)
    rows = stream.rows(np.arange(n), seq_len)
    assert (
        rows.labels.size + stream.dropped_tokens(seq_len) + len(split["shards"]) == stream.n_tokens
    )
    assert (
        stream.dropped_tokens(seq_len) < seq_len * len(split["shards"])
        and rows.document_ids is None
        and stream.padding(seq_len) == 0
    )
    kept, first = [], 0
    for entry in split["shards"]:
        tokens = stream.token_range(first, first + entry["tokens"])
        kept.append(tokens[1 : 1 + (len(tokens) - 1) // seq_len * seq_len])
        first += entry["tokens"]
    assert np.array_equal(rows.labels.ravel(), np.concatenate(kept))
    assert np.array_equal(rows.input_ids[:, 1:], rows.labels[:, :-1])


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Concatenated(), BestFit()], ids=lambda how: how.kind)
def test_rows_outside_the_stream_and_foreign_ids_are_refused(tmp_path, how):
    split = numbered(tmp_path, [5, 9, 20])
    stream = packing.stream(tmp_path, split, VOCAB, how)
    for number in (-1, stream.n_windows(8)):
        with pytest.raises(ContractError):
            stream.rows(np.array([number]), 8)
    narrow = packing.stream(tmp_path, split, VOCAB - 1, how)
    with pytest.raises(DataError, match="token id 69999"):
        narrow.rows(np.arange(narrow.n_windows(8)), 8)


@pytest.mark.parametrize(
    ("how", "kind"), [(Concatenated(), ConcatenatedStream), (BestFit(), PackedStream)]
)
def test_the_declared_packing_is_the_one_that_packs(tmp_path, how, kind):
    assert type(packing.stream(tmp_path, numbered(tmp_path, [5, 9]), VOCAB, how)) is kind

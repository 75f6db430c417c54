"""Tokenizers: nothing is lost, nothing is invented."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackproof.config import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer
from stackproof.data.tokenizer import END_OF_TEXT, load_tokenizer, make_tokenizer, train_bpe
from stackproof.spec.errors import DataError

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 20, "naïve café 漢字 " * 10]
BPE = make_tokenizer(BpeTokenizer(vocab_size=300), TEXTS)
BYTES = make_tokenizer(ByteTokenizer(), TEXTS)
CHARS = make_tokenizer(CharTokenizer(), TEXTS)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "byte"])
@given(text=st.text())
def test_any_text_survives(tokenizer, text):
    encoding = tokenizer.encode(text)
    assert encoding.dropped_chars == 0 and tokenizer.decode(encoding.ids) == text
    assert int(tokenizer.token_bytes[encoding.ids].sum() if encoding.ids else 0) == len(
        text.encode()
    )


@given(text=st.text())
def test_char_tokenizer_counts_what_it_drops(text):
    known = [c for c in text if c in CHARS.symbols]
    encoding = CHARS.encode(text)
    assert CHARS.decode(encoding.ids) == "".join(known)
    assert encoding.dropped_chars == len(text) - len(known)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "byte"])
def test_a_literal_end_of_text_is_text(tokenizer):
    text = f"before {END_OF_TEXT} after"
    encoding = tokenizer.encode(text)
    assert tokenizer.eos_id not in encoding.ids and tokenizer.decode(encoding.ids) == text
    assert tokenizer.eos_id not in tokenizer.encode_batch([text])[0].ids


@pytest.mark.parametrize("tokenizer", [BPE, BYTES, CHARS], ids=["bpe", "byte", "char"])
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (
        loaded.sha256 == tokenizer.sha256
        and loaded.vocab_size == tokenizer.vocab_size
        and loaded.eos_id == tokenizer.eos_id
    )
    assert loaded.encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1]).ids


def test_training_twice_gives_the_same_bytes():
    assert make_tokenizer(BpeTokenizer(vocab_size=300), TEXTS).to_bytes() == BPE.to_bytes()
    assert BPE.vocab_size == 300 and max(BPE.encode(TEXTS[0]).ids) < 300


def test_batch_and_single_encoding_agree():
    assert [e.ids for e in BPE.encode_batch(TEXTS)] == [BPE.encode(t).ids for t in TEXTS]


@given(text=st.text())
def test_tiktoken_gives_the_ids_of_the_library_it_stands_in_for(text):
    pytest.importorskip("tiktoken")
    assert BPE.encoder == "tiktoken" and BPE.encode_batch([text])[0].ids == BPE.encode(text).ids


def test_a_million_blank_lines_are_encoded_in_a_batch_as_alone():
    """Such a document passes every filter."""
    text = "A sentence before the gap." + "\n" * 1_000_000 + "Another one after it."
    assert BPE.encode_batch([text])[0].ids == BPE.encode(text).ids


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\x80\x04",
        b'{"stackproof_tokenizer": "char"}',
        b'{"model": 1}',
        b"[]",
        b'{"stackproof_tokenizer": "char", "symbols": "aa"}',
        b'{"stackproof_tokenizer": "words", "symbols": "ab"}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(path)


def test_a_foreign_bpe_without_an_end_of_text_is_refused_unless_one_is_named(tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(BPE.to_bytes().replace(END_OF_TEXT.encode(), b"<|other|>"))
    with pytest.raises(DataError, match=r"has no token .* that could end a text"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"has no token <\|absent\|>"):
        load_tokenizer(path, eos_token="<|absent|>")
    named = make_tokenizer(FileTokenizer(path=str(path), eos_token="<|other|>"), [])
    assert named.literal(named.eos_id) == "<|other|>" and named.decode([named.eos_id]) == ""
    named.save(path)
    assert (
        load_tokenizer(path).eos_id == named.eos_id and load_tokenizer(path).sha256 == named.sha256
    )


def test_a_foreign_bpe_with_a_normaliser_is_never_taken_for_one_without(tmp_path):
    """It is read, by the library alone, and is not the plain one;
    that its text does not survive is for the gate to say.
    """
    saved = json.loads(BPE.to_bytes()) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "t.json").write_text(json.dumps(saved))
    lower = load_tokenizer(tmp_path / "t.json")
    assert lower.encoder == "tokenizers" and lower.sha256 != BPE.sha256
    assert (
        lower.encode("The FOX").ids
        == lower.encode_batch(["The FOX"])[0].ids
        == BPE.encode("the fox").ids
        != BPE.encode("The FOX").ids
    )


@given(ids=st.lists(st.integers(0, 299)))
def test_any_ids_decode_and_their_bytes_add_up(ids):
    """Also ids that end within a character; bytes are counted before what
    cannot be shown is replaced.
    """
    assert isinstance(BPE.decode(ids), str)
    assert int(BPE.token_bytes[ids].sum() if ids else 0) == len(
        b"".join(BPE._pieces[i] for i in ids)
    )


def test_every_byte_is_in_the_bpe_alphabet():
    assert {p for p in BPE._pieces if len(p) == 1} == {bytes([b]) for b in range(256)}
    assert int(BPE.token_bytes[BPE.eos_id]) == 0


def test_lengths_that_a_file_prescribes_cut_and_fill_nothing(tmp_path):
    saved = json.loads(BPE.to_bytes())
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    saved["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (tmp_path / "t.json").write_text(json.dumps(saved))
    loaded = load_tokenizer(tmp_path / "t.json")
    for text in ("A sentence of more than four tokens, and of less than sixty-four.", "x"):
        assert loaded.encode(text).ids == BPE.encode(text).ids == loaded.encode_batch([text])[0].ids
        assert [e.ids for e in loaded.inner.encode_batch_fast([text, text + text])] == [
            BPE.encode(text).ids,
            BPE.encode(text + text).ids,
        ]


@pytest.mark.parametrize("special", ["the", "a", "Ġthe"])
def test_a_special_token_that_texts_are_made_of_is_refused(special):
    with pytest.raises(DataError, match="is a piece of the texts too"):
        train_bpe(300, ["the cat and the dog and the bird"] * 50, ("<|user|>", special))

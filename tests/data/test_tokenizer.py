"""Tokenizers: nothing is lost, nothing is invented."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.errors import DataError
from stack.config import BpeTokenizer, ByteTokenizer, CharTokenizer
from stack.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 20, "naïve café 漢字 " * 10]
BPE = train_tokenizer(BpeTokenizer(vocab_size=300), TEXTS)
BYTES = train_tokenizer(ByteTokenizer(), TEXTS)
CHARS = train_tokenizer(CharTokenizer(), TEXTS)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "byte"])
@given(text=st.text())
def test_any_text_survives(tokenizer, text):
    encoding = tokenizer.encode(text)
    assert encoding.dropped_chars == 0 and tokenizer.decode(encoding.ids) == text
    assert int(tokenizer.token_bytes[encoding.ids].sum() if encoding.ids else 0) == len(text.encode())


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
    assert loaded.sha256 == tokenizer.sha256 and loaded.vocab_size == tokenizer.vocab_size and loaded.eos_id == tokenizer.eos_id
    assert loaded.encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1]).ids


def test_training_twice_gives_the_same_bytes():
    assert train_tokenizer(BpeTokenizer(vocab_size=300), TEXTS).to_bytes() == BPE.to_bytes()
    assert BPE.vocab_size == 300 and max(BPE.encode(TEXTS[0]).ids) < 300


def test_batch_and_single_encoding_agree():
    assert [e.ids for e in BPE.encode_batch(TEXTS)] == [BPE.encode(t).ids for t in TEXTS]


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


def test_a_foreign_bpe_without_an_end_of_text_or_with_a_normaliser_is_refused(tmp_path):
    document = json.loads(BPE.to_bytes())
    without_end = json.dumps(document).replace(END_OF_TEXT, "<|other|>")
    lowercase = json.dumps(document | {"normalizer": {"type": "Lowercase"}})
    for content, says in ((without_end, "has no"), (lowercase, "normaliser")):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(DataError, match=says):
            load_tokenizer(tmp_path / "t.json")


@given(ids=st.lists(st.integers(0, 299)))
def test_any_ids_decode_and_their_bytes_add_up(ids):
    """Also ids that end within a character; bytes are counted before what cannot be shown is replaced."""
    assert isinstance(BPE.decode(ids), str)
    assert int(BPE.token_bytes[ids].sum() if ids else 0) == len(b"".join(BPE._pieces[i] for i in ids))


def test_every_byte_is_in_the_bpe_alphabet():
    assert {p for p in BPE._pieces if len(p) == 1} == {bytes([b]) for b in range(256)}
    assert int(BPE.token_bytes[BPE.eos_id]) == 0

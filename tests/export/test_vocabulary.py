"""Tokenizers out and in: the same ids there, and every row of the embedding
stands for something here.
"""

import json

import pytest

from stackproof.contracts.tokenizer import HARD_TEXTS
from stackproof.data.tokenizer import Bpe, Bytes, Chars, load_tokenizer, train_bpe
from stackproof.export import vocabulary
from stackproof.model import hugging_face
from stackproof.spec.errors import DataError


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(
        300, ["the quick brown fox jumps over the lazy dog and it's 3.14 again"] * 40, ("<|user|>",)
    )


@pytest.fixture
def saved(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def changed(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return path


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_the_exported_file_gives_the_same_ids(kind, bpe):
    tokenizer = {"bpe": bpe, "byte": Bytes(), "char": Chars(" abcdefghijklmnopqrstuvwxyzäé漢")}[
        kind
    ]
    made = vocabulary.to_library(tokenizer)
    for text in HARD_TEXTS:
        assert made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).ids
        if kind != "char":
            assert made.decode(
                tokenizer.encode(text).ids, skip_special_tokens=False
            ) == tokenizer.decode(tokenizer.encode(text).ids)
    assert made.get_vocab_size() == tokenizer.vocab_size
    assert made.token_to_id(vocabulary.eos_token(tokenizer)) == tokenizer.eos_id


def test_a_tokenizer_that_answers_otherwise_over_there_is_refused(bpe, monkeypatch):
    monkeypatch.setattr(Bpe, "encode", lambda self, text: Bytes().encode(text))
    with pytest.raises(DataError, match="different ids"):
        vocabulary.to_library(bpe)


def test_transformers_reads_the_exported_tokenizer(tmp_path, bpe):
    transformers = pytest.importorskip("transformers", reason="in the extras hf and dev")
    from stackproof.config import ModelConfig
    from tests.export.models import BASE

    (tmp_path / "tokenizer.json").write_text(vocabulary.to_library(bpe).to_str())
    settings = hugging_face.tokenizer_document(ModelConfig(**BASE), vocabulary.eos_token(bpe))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (
        bpe.eos_id,
        bpe.eos_id,
        40,
    )
    for text in HARD_TEXTS[:2]:
        assert (
            theirs(text)["input_ids"] == bpe.encode(text).ids
            and theirs.decode(theirs(text)["input_ids"]) == text
        )


def test_ids_of_the_model_that_the_file_lacks_become_reserved(saved, bpe):
    made, said = vocabulary.from_file(saved, bpe.vocab_size + 20, None)
    assert made.vocab_size == bpe.vocab_size + 20 and said == [
        "20 reserved ids added to the vocabulary"
    ]
    for text in HARD_TEXTS:
        assert made.encode(text).ids == bpe.encode(text).ids
    assert set(range(bpe.vocab_size, made.vocab_size)) <= made.control_ids and made.encode(
        "<|reserved_301|>"
    ).ids != [301]
    made.save(saved)
    assert load_tokenizer(saved).sha256 == made.sha256


def test_the_end_of_text_is_taken_by_writing_or_by_id(saved, bpe):
    user = bpe.inner.token_to_id("<|user|>")
    assert vocabulary.from_file(saved, bpe.vocab_size, "<|user|>")[0].eos_id == user
    assert vocabulary.from_file(saved, bpe.vocab_size, user)[0].eos_id == user
    assert vocabulary.from_file(saved, bpe.vocab_size, None)[0].eos_id == bpe.eos_id
    with pytest.raises(DataError, match=r"<\|absent\|>"):
        vocabulary.from_file(saved, bpe.vocab_size, "<|absent|>")
    with pytest.raises(DataError, match="id 9999"):
        vocabulary.from_file(saved, bpe.vocab_size, 9999)
    Bytes().save(saved)
    assert vocabulary.from_file(saved, 257, 256)[0].eos_id == 256
    with pytest.raises(DataError, match=r"ends texts with id 256, config\.json with 3"):
        vocabulary.from_file(saved, 257, 3)


@pytest.mark.parametrize(
    ("config", "settings", "end"),
    [
        ({"eos_token_id": 3}, {}, 3),
        ({"eos_token_id": 3}, {"eos_token": "</s>"}, "</s>"),
        ({"eos_token_id": [1, 2]}, {"eos_token": {"content": "<|im_end|>"}}, "<|im_end|>"),
        ({"eos_token_id": [1, 2]}, {}, None),
        ({}, {"eos_token": None}, None),
    ],
)
def test_where_the_end_of_text_is_looked_for(config, settings, end):
    assert hugging_face.end_of_text(config, settings) == end


def test_too_many_ids_are_refused(saved, bpe):
    with pytest.raises(DataError, match="more ids than the model"):
        vocabulary.from_file(saved, bpe.vocab_size - 1, None)


def test_a_tokenizer_that_loses_text_is_refused_by_name(saved, bpe):
    changed(saved, normalizer={"type": "Lowercase"})
    with pytest.raises(DataError, match="loses text") as refused:
        vocabulary.from_file(saved, bpe.vocab_size, None)
    assert str(saved) in str(refused.value) and "--tokenizer FILE" in str(refused.value)


def test_unicode_normalisation_is_said(saved, bpe):
    changed(saved, normalizer={"type": "NFC"})
    assert vocabulary.from_file(saved, bpe.vocab_size, None)[1] == [
        f"the tokenizer does not decode 1 of {len(HARD_TEXTS)} hard texts exactly"
    ]


def test_pieces_with_a_marked_space_and_bytes_as_last_resort_are_read(tmp_path):
    """The form of Llama 2: a space in front of every text, `▁` for spaces,
    bytes for what has no piece.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        "th",
        "the",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    inner = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    after = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    inner.decoder = decoders.Sequence(after)
    inner.add_special_tokens([AddedToken(s, special=True) for s in pieces[:3]])
    inner.save(str(tmp_path / "tokenizer.json"))
    made, said = vocabulary.from_file(tmp_path / "tokenizer.json", len(pieces), 2)
    assert (
        made.eos_id == 2
        and said == []
        and made.decode(made.encode("the naïve cat").ids) == "the naïve cat"
    )
    assert (
        vocabulary.to_library(made).encode("the cat", add_special_tokens=False).ids
        == made.encode("the cat").ids
    )


def test_files_that_are_no_tokenizer_are_refused(tmp_path, saved, bpe):
    with pytest.raises(DataError, match=r"absent\.json does not exist"):
        vocabulary.from_file(tmp_path / "absent.json", 300, None)
    Bytes().save(saved)
    with pytest.raises(DataError, match="fewer ids"):
        vocabulary.from_file(saved, 300, None)
    saved.write_text('{"model": 1}')
    for end in (None, 3):
        with pytest.raises(DataError, match="not a tokenizer"):
            vocabulary.from_file(saved, 300, end)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config"):
        vocabulary.settings(tmp_path)

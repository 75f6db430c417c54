"""What the steps of a foreign tokenizer.json may do to a text, and the published ones that pass."""

import base64
import itertools
import json
import random
import struct

import pytest

from stackproof.data.tokenizer_file import library_tokenizer
from stackproof.data.tokenizer_steps import _growth_of_replaced
from stackproof.spec.errors import DataError

A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
EIGHT = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def charsmap(text):
    """A table of replacements, of which `text` is the only one; no character has it."""
    packed = struct.pack("<I", 1024) + bytes(1024) + text.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(packed).decode()}


def replacements(*pairs):
    return [
        {"type": "Replace", "pattern": {"String": text}, "content": content}
        for text, content in (pair.split(" ") for pair in pairs)
    ]


def normalizers(*steps):
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def special(name="[S]", n_ids=1):
    return {name: {"id": name, "ids": [1] * n_ids, "tokens": ["</s>"] * n_ids}}


def template(single, tokens):
    made = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [A, B],
        "special_tokens": tokens,
    }
    return {"post_processor": made}


def piece(name="[S]"):
    return {"SpecialToken": {"id": name, "type_id": 0}}


def unigram(piece):
    return {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], [piece, -1.0], ["a", -2.0]]}


def read(folder, model=None, **parts):
    made = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []} | (model or {})
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": made} | parts))
    return library_tokenizer(path)


PUBLISHED = {
    "byte-level, by two patterns": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated"}
                | {"invert": False},
                BYTE_LEVEL | {"use_regex": False},
            ],
        },
        "post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL]},
        "decoder": BYTE_LEVEL,
    },
    "SentencePiece with bytes": normalizers(
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    )
    | {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    },
    "SentencePiece with a table": normalizers(charsmap("a" * 18), SPACES, SPACES)
    | {"pre_tokenizer": METASPACE, "decoder": METASPACE | {"add_prefix_space": True}},
    "WordPiece": {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True}
        | {"handle_chinese_chars": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    },
    "German letters": normalizers(
        *replacements("ä ae", "ö oe", "ü ue", "Ä Ae", "Ö Oe", "Ü Ue", "ß ss", "ẞ SS")
    ),
    "ligatures": normalizers(
        {"type": "Lowercase"},
        *replacements("ﬀ ff", "ﬁ fi", "ﬂ fl", "ﬃ ffi", "ﬄ ffl", "ﬅ st", "æ ae", "œ oe"),
        {"type": "NFC"},
    ),
    "a template of three": template([piece(), A, piece(), piece()], special()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_steps_of_published_tokenizers_are_taken(name, tmp_path):
    text = read(tmp_path, **PUBLISHED[name]).encode("a a")
    assert text.ids.count(1) == (3 if name == "a template of three" else 0)


HOSTILE = {
    "a step without a type": (
        normalizers(*[{k: v for k, v in EIGHT.items() if k != "type"}] * 4),
        "unknown type: None",
    ),
    "a step as a list": ({"normalizer": ["NFC"]}, "unknown type"),
    "a step of another part": ({"pre_tokenizer": EIGHT}, "unknown type: Replace"),
    "a sequence with other keys": (
        {"normalizer": {"type": "Sequence", "normalizers": [], "content": ""}},
        "unknown key content",
    ),
    "a key that hides another": (
        normalizers({"type": "Prepend", "prepend": "a" * 10**4, "content": ""}),
        "unknown key content",
    ),
    "a long prefix": (normalizers({"type": "Prepend", "prepend": "a" * 64}), "64 times as long"),
    "a match between any two": (
        normalizers(*[SPACES | {"pattern": {"Regex": "(?=.)"}}] * 7),
        "64 times as long",
    ),
    "an empty text": (
        normalizers(*[SPACES | {"pattern": {"String": ""}}] * 7),
        "64 times as long",
    ),
    "replacements of replacements": (
        normalizers(*replacements("a bb", "b cc", "c dd", "d ee", "e ff", "f gg", "g hh")),
        "64 times as long",
    ),
    "a decoder of replacements of replacements": (
        {"decoder": {"type": "Sequence", "decoders": replacements("a bbbbbbbb", "b aaaaaaaaa")}},
        "64 times as long",
    ),
    "a long Unicode form": (
        normalizers(*[SPACES | {"content": "ﷺ"}, {"type": "NFKC"}] * 2),
        "64 times as long",
    ),
    "a table of long replacements": (normalizers(charsmap("a" * 65)), "64 times as long"),
    "bytes of bytes": (normalizers(*[{"type": "ByteLevel"}] * 4), "64 times as long"),
    "a decoder that multiplies": (
        {"decoder": {"type": "Sequence", "decoders": [EIGHT] * 3}},
        "64 times as long",
    ),
    "many steps": (normalizers(*[{"type": "NFC"}] * 65), "65 steps; at most 64"),
    "a slow pattern": (normalizers(SPACES | {"pattern": {"Regex": "(a+)+$"}}), "for ever"),
    "a token of many ids": (
        template([piece(), A], special(n_ids=1025)),
        "1025 ids to a text; at most 1024",
    ),
    "a token many times": (template([piece()] * 1025 + [A], special()), "1025 ids to a text"),
    "a text many times": (template([A, A], special()), "repeats its text"),
    "many templates": (
        {
            "post_processor": {
                "type": "Sequence",
                "processors": [template([piece(), A], special(n_ids=600))["post_processor"]] * 2,
            }
        },
        "1200 ids to a text",
    ),
    "a long mark of a model": (
        {"model": {"continuing_subword_prefix": "a" * 65}},
        "continuing_subword_prefix of its model has more than 64",
    ),
    "long pieces of a model": (
        {"model": unigram("a" * 129)},
        "a piece of its model has 129 characters; at most 128",
    ),
    "long pieces of a model without a type": (
        {"model": unigram("a" * 129) | {"type": None}},
        "a piece of its model has 129 characters",
    ),
    "long words of a model": (
        {"model": {"type": "WordPiece", "unk_token": "a", "max_input_chars_per_word": 10**9}},
        "max_input_chars_per_word of its model is above 1000",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_steps_that_exceed_a_bound_are_refused_by_it(name, tmp_path):
    parts, why = HOSTILE[name]
    with pytest.raises(DataError, match=why):
        read(tmp_path, **parts)


@pytest.mark.parametrize("piece", ["▁" * 64, "a" * 128])
def test_the_pieces_of_published_unigram_models_are_taken(piece, tmp_path):
    assert read(tmp_path, unigram(piece)).encode(piece).tokens == [piece]


def test_a_run_of_replacements_makes_no_text_longer_than_its_bound():
    """All texts of at most five of three characters, by generated runs."""
    texts = ["".join(t) for n in range(1, 6) for t in itertools.product("abc", repeat=n)]
    draw = random.Random(1)
    some = lambda least, most: "".join(draw.choices("abc", k=draw.randint(least, most)))  # noqa: E731
    n_exact = 0
    for _ in range(200):
        pairs = [(some(1, 2), some(0, 3)) for _ in range(draw.randint(1, 4))]
        most = 1.0
        for text in texts:
            made = text
            for pattern, content in pairs:
                made = made.replace(pattern, content)
            most = max(most, len(made) / len(text))
        bound = _growth_of_replaced(replacements(*(f"{p} {c}" for p, c in pairs)))
        assert most <= bound + 1e-9, pairs
        n_exact += bound <= most + 1e-9
    assert n_exact > 50


def test_long_added_tokens_that_a_step_makes_longer_are_refused(tmp_path):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    token = {"id": 2, "content": "a" * 2**21, "normalized": True} | flags
    with pytest.raises(DataError, match="67108864 once normalised"):
        read(tmp_path, added_tokens=[token], **normalizers(EIGHT, EIGHT))
    assert read(tmp_path, added_tokens=[token | {"content": "aa"}], **normalizers(EIGHT, EIGHT))

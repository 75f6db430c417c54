"""Checks the steps of a foreign tokenizer.json before the library runs them: their kinds, how much
longer they make a text, the ids that they add to it.

Only kinds and keys that are listed here are taken, so that what is measured is what the library
reads: there a step without a type is valid too, and an unlisted key has no effect.
"""

import base64
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any
from unicodedata import normalize

from stackproof.patterns import slow

# The key of a sequence, and the other kinds with their keys, by part of the document.
BYTE_LEVEL = "add_prefix_space trim_offsets use_regex"
METASPACE = "replacement prepend_scheme split add_prefix_space str_rep"
PARTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "normalizer": (
        "normalizers",
        dict.fromkeys(
            ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "StripAccents", "ByteLevel"), ""
        )
        | {
            "BertNormalizer": "clean_text handle_chinese_chars strip_accents lowercase",
            "Strip": "strip_left strip_right",
            "Replace": "pattern content",
            "Prepend": "prepend",
            "Precompiled": "precompiled_charsmap",
        },
    ),
    "pre_tokenizer": (
        "pretokenizers",
        dict.fromkeys(("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts"), "")
        | {
            "ByteLevel": BYTE_LEVEL,
            "Metaspace": METASPACE,
            "CharDelimiterSplit": "delimiter",
            "Split": "pattern behavior invert",
            "Punctuation": "behavior",
            "Digits": "individual_digits",
            "FixedLength": "length",
        },
    ),
    "post_processor": (
        "processors",
        {
            "ByteLevel": BYTE_LEVEL,
            "BertProcessing": "sep cls",
            "RobertaProcessing": "sep cls trim_offsets add_prefix_space",
            "TemplateProcessing": "single pair special_tokens",
        },
    ),
    "decoder": (
        "decoders",
        {
            "ByteLevel": BYTE_LEVEL,
            "Metaspace": METASPACE,
            "ByteFallback": "",
            "Fuse": "",
            "BPEDecoder": "suffix",
            "WordPiece": "prefix cleanup",
            "CTC": "pad_token word_delimiter_token cleanup",
            "Replace": "pattern content",
            "Strip": "content start stop",
        },
    ),
}
MAX_STEPS = 64
# How much longer all steps together may make a text. The published ones reach 36: a compatibility
# form of 18 characters, and a mark before each word.
MAX_GROWTH = 64
# Steps that write several characters for one, or put one before each piece.
GROWTH = {"ByteLevel": 3, "BertNormalizer": 3, "Metaspace": 2}
GROWTH |= dict.fromkeys(("BPEDecoder", "CTC", "WordPiece"), 2)
# A pattern that matches one character at least; others may match between any two characters.
CONSUMES = re.compile(
    r"(\\[dDsSwWnrt]|[^\\()\[\]{}|*+?^$]|\[\^?[\w \\]+\])(\+|\{[1-9]\d*(,\d*)?\})?"
)
MAX_CHARSMAP = 2**22  # characters of a table of replacements; the published ones have 0.4 million
MAX_TEMPLATE_IDS = 1024
MAX_ADDED_CHARS = 2**26  # of all added tokens, normalised


def require_bounded(document: Mapping[str, Any]) -> None:
    """Raises ValueError for steps that exceed a bound; TypeError, KeyError or AttributeError for
    some that are malformed.
    """
    steps = {p: list(_steps(p, document[p])) for p in PARTS if document.get(p) is not None}
    if (n_steps := sum(map(len, steps.values()))) > MAX_STEPS:
        raise ValueError(f"it has {n_steps} steps; at most {MAX_STEPS} are run")
    growth = {p: _growth_of_all(steps.get(p, ())) for p in PARTS}
    if max(growth["normalizer"] * growth["pre_tokenizer"], growth["decoder"]) > MAX_GROWTH:
        raise ValueError(f"its steps make a text more than {MAX_GROWTH} times as long")
    if (n_ids := sum(map(_ids, steps.get("post_processor", ())))) > MAX_TEMPLATE_IDS:
        raise ValueError(f"its templates add {n_ids} ids to a text; at most {MAX_TEMPLATE_IDS}")
    n_chars = sum(len(t["content"]) for t in document.get("added_tokens") or ())
    if n_chars * growth["normalizer"] > MAX_ADDED_CHARS:
        raise ValueError(
            f"its added tokens have {n_chars} characters; at most {MAX_ADDED_CHARS} once normalised"
        )


def _steps(part: str, step: Any) -> Iterator[dict[str, Any]]:
    """A step, or those of a sequence. Raises ValueError for one of another kind."""
    inner, kinds = PARTS[part]
    kind = step.get("type") if isinstance(step, dict) else None
    known = kinds | {"Sequence": inner}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"its {part} holds a step of unknown type: {str(kind)[:80]}")
    if unknown := step.keys() - {"type", *known[kind].split()}:
        raise ValueError(f"a step {kind} of its {part} has the unknown key {min(unknown)[:80]}")
    if kind == "Sequence":
        for each in step[inner]:
            yield from _steps(part, each)
        return
    if "pattern" in step:
        _require_pattern(step["pattern"])
    yield step


def _require_pattern(pattern: Mapping[str, str]) -> None:
    [(kind, text)] = pattern.items()
    if kind == "Regex" and (why := slow(text)):
        raise ValueError(f"the pattern {text[:80]!r} could take for ever: {why}")


def _growth_of_all(steps: Sequence[Mapping[str, Any]]) -> float:
    """How much longer steps make a text, at most: the product over single steps and over runs of
    replaced texts.
    """
    runs = groupby(steps, _replaces_text)
    return math.prod(
        _growth_of_replaced(list(run)) if replaces else math.prod(map(_growth, run))
        for replaces, run in runs
    )


def _replaces_text(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Replace" and bool(step["pattern"].get("String"))


def _growth_of_replaced(steps: Sequence[Mapping[str, Any]]) -> float:
    """How much longer a run of replaced texts makes a text, at most.

    `becomes` holds the most characters that a character may become by the steps that follow, where
    each one of a replaced text has an equal share of its content. A step cannot add to the sum over
    a text, so this holds for matches over borders of contents too.
    """
    becomes: dict[str, float] = {}
    growth = 1.0
    for step in reversed(steps):
        text, content = step["pattern"]["String"], step["content"]
        share = sum(n * becomes.get(c, _chars(c)) for c, n in Counter(content).items()) / len(text)
        becomes |= {c: max(share, becomes.get(c, _chars(c))) for c in set(text)}
        growth = max(growth, share)
    return growth


def _growth(step: Mapping[str, Any]) -> float:
    """How much longer a step makes a text, at most."""
    match step:
        case {"type": "Replace", "pattern": pattern, "content": str(content)}:
            regex = pattern.get("Regex")
            consumes = regex and CONSUMES.fullmatch(regex)
            return max(1.0, _chars(content)) if consumes else 1.0 + _chars(content)
        case {"type": "Prepend", "prepend": str(text)}:
            return 1.0 + _chars(text)
        case {"type": "Precompiled", "precompiled_charsmap": str(packed)}:
            if len(packed) > MAX_CHARSMAP:
                raise ValueError(f"its table of replacements has over {MAX_CHARSMAP} characters")
            data = base64.b64decode(packed, validate=True)
            replacements = data[4 + int.from_bytes(data[:4], "little") :].decode("utf-8")
            return max(1.0, *map(_chars, replacements.split("\0")))
    return GROWTH.get(step["type"], 1.0)


def _chars(text: str) -> int:
    """Characters of a text in its longest Unicode form, to which a later step may bring it."""
    return len(text) if len(text) > MAX_GROWTH else len(normalize("NFKD", text))


def _ids(step: Mapping[str, Any]) -> int:
    """The ids that a step adds to a text. Raises ValueError for one that repeats the text."""
    if step["type"] != "TemplateProcessing":
        return 0
    n_ids, added = 0, {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
    for template in (step["single"], step["pair"]):
        pieces = [(kind, at["id"]) for piece in template for kind, at in piece.items()]
        texts = [name for kind, name in pieces if kind == "Sequence"]
        if len(texts) > len(set(texts)):
            raise ValueError("a template repeats its text")
        n_ids += sum(added.get(name, 0) for kind, name in pieces if kind == "SpecialToken")
    return n_ids

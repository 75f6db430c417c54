"""Reads a tokenizer.json of other people with limits: on its bytes, on its entries, on the steps
that run on every text.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stackproof.data import tokenizer_steps
from stackproof.spec.errors import DataError
from stackproof.spec.files import read_bytes

# The largest published vocabulary, of 262,144 tokens, has 34 MB, 2.7 million quotation marks and
# 0.5 million lists.
MAX_BYTES, MAX_QUOTES, MAX_BRACKETS = 64 * 2**20, 8_000_000, 2_000_000
MAX_SPARSE = 100  # largest id of a vocabulary as a multiple of its size
# Marks that a model adds to the characters of a word, and words that it takes apart; pieces of a
# Unigram model, which compares each place of a text with the longest. The published ones have 16,
# and runs of spaces up to 64.
MAX_MARK, MAX_WORD, MAX_PIECE = 64, 1000, 128
PROBE = "A plain text, for a start."
SHOWN_CHARS = 300


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Convert what the library raises to DataError: bare Exception, and for a panic of its own a
    BaseException.
    """
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:
        raise DataError(
            f"{path} is not a tokenizer: {str(e)[:SHOWN_CHARS]}",
            allowed="the tokenizer.json of a run, of prepared data, or of the Hugging Face format",
            next_step="restore it, or name its end of text with data.tokenizer.eos_token",
        ) from e


def read(path: Path) -> tuple[bytes, Any]:
    """The bytes of a tokenizer.json and their document.
    Raises OSError, and ValueError for one that exceeds a limit.
    """
    data = read_bytes(path, MAX_BYTES)
    for what, number, most in (
        ("texts", data.count(b'"') // 2, MAX_QUOTES // 2),
        ("lists and tables", data.count(b"[") + data.count(b"{"), MAX_BRACKETS),
    ):
        if number > most:
            raise ValueError(f"it holds {number} {what}; at most {most} are read")
    try:
        return data, json.loads(data)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def library(saved: str, document: Any) -> Any:
    """A saved tokenizer as the library reads it. `document` is the parsed form of `saved`.

    Raises ValueError for a step or model that exceeds a limit, any exception of the library if it
    cannot be read or used.
    """
    from tokenizers import Tokenizer

    tokenizer_steps.require_bounded(document)
    _require_bounded_model(document["model"])
    _require_dense_ids(document)
    inner = Tokenizer.from_str(saved)
    # A file may declare them; a fixed padding alone may fill the memory.
    inner.no_padding()
    inner.no_truncation()
    inner.encode(PROBE, add_special_tokens=False)
    return inner


def library_tokenizer(path: Path) -> Any:
    """Any tokenizer.json of the Hugging Face format, as the library reads it. Raises DataError."""
    with refusals(path):
        data, document = read(path)
        if not isinstance(document, dict):
            raise ValueError("it is of no known kind")
        return library(data.decode("utf-8"), document)


def _require_dense_ids(document: dict) -> None:
    """Raises ValueError for ids far beyond the number of tokens: the library goes through all
    numbers between them.
    """
    vocab = document["model"].get("vocab")
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    added = document.get("added_tokens")
    ids += [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    largest = max((i for i in ids if isinstance(i, int)), default=0)
    if largest > MAX_SPARSE * max(1000, len(ids)):
        raise ValueError(f"it has {len(ids)} tokens and the id {largest}")


def _require_bounded_model(model: Any) -> None:
    """Raises ValueError for a model that is not a table, or one of unbounded time for a word."""
    if not isinstance(model, dict):
        raise ValueError("its model is not a table")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(model.get(key) or "") > MAX_MARK:
            raise ValueError(f"{key} of its model has more than {MAX_MARK} characters")
    if (model.get("max_input_chars_per_word") or 0) > MAX_WORD:
        raise ValueError(f"max_input_chars_per_word of its model is above {MAX_WORD}")
    pieces = model["vocab"] if isinstance(model.get("vocab"), list) else []  # of a Unigram model
    if (longest := max((len(piece) for piece, _ in pieces), default=0)) > MAX_PIECE:
        raise ValueError(
            f"a piece of its model has {longest} characters; at most {MAX_PIECE} are taken"
        )

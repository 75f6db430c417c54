"""Reads a tokenizer.json of other people with limits: on its bytes, on its entries, on the patterns
and replacements that run on every text.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stackproof.patterns import slow
from stackproof.spec.errors import DataError
from stackproof.spec.files import read_bytes

# The largest published vocabulary, of 262,144 tokens, has 34 MB, 2.7 million quotation marks and
# 0.5 million lists.
MAX_BYTES, MAX_QUOTES, MAX_BRACKETS = 64 * 2**20, 8_000_000, 2_000_000
# How much longer all replacements together may make a text.
MAX_SPARSE = 100  # largest id of a vocabulary as a multiple of its size
MAX_GROWTH = 64
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

    Raises ValueError for a pattern or replacement that exceeds a limit, any exception of the
    library if it cannot be read or used.
    """
    from tokenizers import Tokenizer

    growth = 1.0
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for step in _steps(document.get(part)):
            pattern = step.get("Regex")
            if isinstance(pattern, str) and (why := slow(pattern)):
                raise ValueError(f"the pattern {pattern[:80]!r} could take for ever: {why}")
            growth *= _growth(step)
    if growth > MAX_GROWTH:
        raise ValueError(f"its steps make a text more than {MAX_GROWTH} times as long")
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
    vocab = document["model"].get("vocab") if isinstance(document["model"], dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    added = document.get("added_tokens")
    ids += [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    largest = max((i for i in ids if isinstance(i, int)), default=0)
    if largest > MAX_SPARSE * max(1000, len(ids)):
        raise ValueError(f"it has {len(ids)} tokens and the id {largest}")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The tables of a part, those inside of it too."""
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    for inner in part if isinstance(part, list) else ():
        yield from _steps(inner)


def _growth(step: dict[str, Any]) -> float:
    """How much longer a step makes a text, at most."""
    if step.get("type") not in ("Replace", "Prepend"):
        return 1.0
    added, pattern = step.get("content", step.get("prepend")), step.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(str(added)) / max(1, len(str(replaced or ""))))

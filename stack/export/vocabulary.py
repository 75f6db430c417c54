"""Export and import of tokenizers: both libraries must give the same ids, and every id of a model
needs a token.
"""

import json
from pathlib import Path
from typing import Any, assert_never

from stackproof.contracts.tokenizer import HARD_TEXTS
from stackproof.data.tokenizer import (
    END_OF_TEXT,
    Bpe,
    Bytes,
    Chars,
    Tokenizer,
    _byte_alphabet,
    load_tokenizer,
)
from stackproof.spec.errors import DataError
from stackproof.spec.files import read_bytes

RESERVED = "<|reserved_{}|>"
PLAIN_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Two  spaces, a\ttab,\nand 3.14 (of 42) lines: isn't it?",
)


def eos_token(tokenizer: Tokenizer) -> str:
    """The text of the end-of-text token in the exported file."""
    return tokenizer.literal(tokenizer.eos_id) or END_OF_TEXT


def to_library(tokenizer: Tokenizer) -> Any:
    """The tokenizer in the form of the `tokenizers` library.

    Raises DataError if its ids differ from ours on a test text.
    """
    match tokenizer:
        case Bpe():
            made = _copy(tokenizer.inner)
        case Bytes():
            made = _of_pieces(
                {c: b for b, c in _byte_alphabet().items()}, tokenizer.eos_id, by_bytes=True
            )
        case Chars():
            made = _of_pieces(dict(tokenizer.ids), tokenizer.eos_id, by_bytes=False)
        case other:
            assert_never(other)
    for text in HARD_TEXTS:
        if made.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).ids:
            raise DataError(
                f"a {tokenizer.kind} tokenizer gives different ids in the format of the tokenizers "
                "library",
                value=repr(text[:40]),
            )
    return made


def _copy(inner: Any) -> Any:
    from tokenizers import Tokenizer as Inner

    made = Inner.from_str(inner.to_str())
    made.encode_special_tokens = True
    return made


def _of_pieces(vocabulary: dict[str, int], eos_id: int, *, by_bytes: bool) -> Any:
    """A vocabulary without merges: each byte, or each known character, is its own id;
    unknown characters are dropped.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    made = Inner(models.BPE(vocab=vocabulary | {END_OF_TEXT: eos_id}, merges=[]))
    if by_bytes:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel() if by_bytes else decoders.Fuse()
    made.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    made.encode_special_tokens = True
    return made


def from_file(file: Path, vocab_size: int, end: str | int | None) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a model with `vocab_size` ids, and notes for the record.

    Ids beyond those of the file become reserved control tokens, so that each row of the embedding
    keeps its index. `end` is the end-of-text token as text or id; None: the first known one. Raises
    DataError for a tokenizer that is missing, unreadable, lossy, or does not match the model.
    """
    if not file.is_file():
        raise DataError(
            f"{file} does not exist",
            allowed="a tokenizer.json",
            next_step="give --tokenizer FILE; other formats are not supported",
        )
    token = _written(file, end) if isinstance(end, int) else end or ""
    tokenizer, said = load_tokenizer(file, eos_token=token), []
    if isinstance(end, int) and tokenizer.eos_id != end:
        raise DataError(
            f"{file} ends texts with id {tokenizer.eos_id}, config.json with {end}",
            next_step="give --tokenizer FILE",
        )
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{file} has more ids than the model",
            value=f"{tokenizer.vocab_size} ids",
            allowed=f"at most {vocab_size}, the rows of the embedding",
            next_step="give --tokenizer FILE, the one the model was trained with",
        )
    if tokenizer.vocab_size < vocab_size:
        tokenizer, said = (
            _padded(file, tokenizer, vocab_size),
            [f"{vocab_size - tokenizer.vocab_size} reserved ids added to the vocabulary"],
        )
    return tokenizer, said + _refuse_lossy(file, tokenizer)


def _written(file: Path, token_id: int) -> str:
    """The text of the token with an id; empty for a file of ours, which declares its end-of-text
    token.
    """
    from tokenizers import Tokenizer as Inner

    try:
        if "model" not in json.loads(saved := file.read_bytes()):
            return ""
        token = Inner.from_buffer(saved).id_to_token(token_id)
    except Exception as e:  # the tokenizers library raises bare Exception
        raise DataError(f"{file} is not a tokenizer: {e}", next_step="give --tokenizer FILE") from e
    if token is None:
        raise DataError(
            f"config.json ends texts with id {token_id}, which {file} does not have",
            next_step="give --tokenizer FILE",
        )
    return token


def _padded(file: Path, tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    from tokenizers import AddedToken

    if not isinstance(tokenizer, Bpe):
        raise DataError(
            f"{file} has fewer ids than the model",
            value=f"{tokenizer.vocab_size} ids",
            allowed=f"{vocab_size}",
        )
    inner = _copy(tokenizer.inner)
    inner.add_special_tokens(
        [
            AddedToken(RESERVED.format(i), special=True)
            for i in range(tokenizer.vocab_size, vocab_size)
        ]
    )
    padded = Bpe(inner, tokenizer.eos_token)
    if padded.vocab_size != vocab_size or any(
        inner.id_to_token(i) is None for i in range(vocab_size)
    ):
        raise DataError(
            f"{file} has gaps in its ids, so rows of the embedding have no token",
            value=f"{tokenizer.vocab_size} ids",
        )
    return padded


def _refuse_lossy(file: Path, tokenizer: Tokenizer) -> list[str]:
    """Raise DataError for a tokenizer that loses plain text; return a note if it changes a hard
    text.
    """
    for text in PLAIN_TEXTS:
        if (back := tokenizer.decode(tokenizer.encode(text).ids)) != text:
            raise DataError(
                f"{file} loses text: decoding its ids gives another text",
                value=f"{text!r} becomes {back!r}",
                allowed="a tokenizer that decodes every plain text exactly",
                next_step="give --tokenizer FILE; otherwise scores per byte refer to another text",
            )
    changed = [t for t in HARD_TEXTS if tokenizer.decode(tokenizer.encode(t).ids) != t]
    return (
        [f"the tokenizer does not decode {len(changed)} of {len(HARD_TEXTS)} hard texts exactly"]
        if changed
        else []
    )


def settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty if the file is missing."""
    path = folder / "tokenizer_config.json"
    try:
        found = json.loads(read_bytes(path)) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object")
    return found

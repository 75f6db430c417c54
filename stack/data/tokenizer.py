"""Byte-level BPE, byte and character tokenizers behind one interface. Text never becomes a control id."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import assert_never

import numpy as np

from spec.canonical import canonical_json, sha256_bytes
from spec.errors import DataError
from stack.config import BpeTokenizer, ByteTokenizer, CharTokenizer

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Encoding:
    """Token ids of a text and how many of its characters the tokenizer could not spell."""

    ids: list[int]
    dropped_chars: int = 0


class Tokenizer:
    """What all tokenizers can do. `sha256` pins the saved form; shards, checkpoints and evaluations compare it."""

    kind: str
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> Encoding:
        """Ids of a text; a literal end-of-text marker in it is spelled out like any other text."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        return [self.encode(t) for t in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ids that cut a character in two give U+FFFD, the end of text gives nothing."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The saved form; what `sha256` pins."""
        raise NotImplementedError

    @cached_property
    def sha256(self) -> str:
        return sha256_bytes(self.to_bytes())

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 (vocab_size,); the end of text stands for none."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())


class Bpe(Tokenizer):
    """Byte-level BPE of the `tokenizers` library, no normaliser, no added space; saved in that library's own format."""

    kind = "bpe"

    def __init__(self, inner):
        self.inner = inner
        # A literal "<|endoftext|>" in a document is text and must not end it.
        self.inner.encode_special_tokens = True
        self.vocab_size = inner.get_vocab_size()
        self.eos_id = inner.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> Encoding:
        return Encoding(self.inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        return [Encoding(e.ids) for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        pieces = [self._pieces[i] for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The exact bytes of every id; the end of text decodes to nothing."""
        alphabet = {c: b for b, c in _byte_alphabet().items()}
        pieces = [self.inner.id_to_token(i) for i in range(self.vocab_size)]
        if None in pieces:
            raise ValueError(f"id {pieces.index(None)} of {self.vocab_size} stands for nothing")
        return [b"" if i == self.eos_id else bytes(alphabet[c] for c in p) for i, p in enumerate(pieces)]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(p) for p in self._pieces], np.int32)

    def to_bytes(self) -> bytes:
        return self.inner.to_str(pretty=False).encode()


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in character of each byte in byte-level BPE files (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {b: chr(b) for b in printable}
    others = [b for b in range(256) if b not in table]
    return table | {b: chr(256 + i) for i, b in enumerate(others)}


class Bytes(Tokenizer):
    """Each UTF-8 byte is its own id; 256 ends a text."""

    kind, vocab_size, eos_id = "byte", 257, 256

    def encode(self, text: str) -> Encoding:
        return Encoding(list(text.encode("utf-8")))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.eos_id).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def to_bytes(self) -> bytes:
        return canonical_json({"stackproof_tokenizer": "byte"})


class Chars(Tokenizer):
    """One id per known character; unknown ones are dropped and counted."""

    kind = "char"

    def __init__(self, symbols: str):
        self.symbols = symbols
        self.ids = {c: i for i, c in enumerate(symbols)}
        self.eos_id = len(symbols)
        self.vocab_size = len(symbols) + 1

    def encode(self, text: str) -> Encoding:
        ids = [self.ids[c] for c in text if c in self.ids]
        return Encoding(ids, len(text) - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.symbols[i] for i in ids if i != self.eos_id)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([*(len(c.encode("utf-8")) for c in self.symbols), 0], np.int32)

    def to_bytes(self) -> bytes:
        return canonical_json({"stackproof_tokenizer": "char", "symbols": self.symbols})


def train_tokenizer(cfg: BpeTokenizer | ByteTokenizer | CharTokenizer, texts: Iterable[str]) -> Tokenizer:
    """Build the declared tokenizer from texts; the same texts in the same order give the same bytes."""
    match cfg:
        case BpeTokenizer():
            return _train_bpe(cfg.vocab_size, texts)
        case ByteTokenizer():
            return Bytes()
        case CharTokenizer():
            return Chars("".join(sorted(set().union(*texts))))
    assert_never(cfg)


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Bpe:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return Bpe(inner)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a saved tokenizer. Raises DataError naming the file if it is damaged or of an unknown kind."""
    try:
        return _parse(path.read_bytes())
    except Exception as e:  # the tokenizers library raises bare Exception
        raise DataError(
            f"{path} is not a tokenizer: {e}",
            allowed="the tokenizer.json of a run or prepared corpus",
            next_step="restore it from the run directory",
        ) from e


def _parse(data: bytes) -> Tokenizer:
    """The tokenizer that bytes describe. Raises ValueError or whatever the library raises if they describe none we can trust."""
    match json.loads(data):
        case {"model": _}:
            from tokenizers import Tokenizer as Inner

            inner = Inner.from_str(data.decode("utf-8"))
            if inner.token_to_id(END_OF_TEXT) is None:
                raise ValueError(f"it has no {END_OF_TEXT} token")
            if inner.normalizer is not None:
                raise ValueError("it has a normaliser, so text would not survive it")
            loaded = Bpe(inner)
            _ = loaded.token_bytes  # every id must stand for bytes
            return loaded
        case {"stackproof_tokenizer": "byte"}:
            return Bytes()
        case {"stackproof_tokenizer": "char", "symbols": str(symbols)} if symbols and len(set(symbols)) == len(symbols):
            return Chars(symbols)
    raise ValueError("it is of no known kind")

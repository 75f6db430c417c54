"""Byte-level BPE, byte and character tokenizers, and any of the Hugging Face format, behind one
interface.

Text is never encoded as a control id.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import assert_never

import numpy as np

from stackproof.config import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer
from stackproof.contracts.tokenizer import HARD_TEXTS
from stackproof.spec.canonical import canonical_json, sha256_bytes
from stackproof.spec.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# End-of-text tokens of published tokenizers, the most specific first.
MAX_SPARSE = 100  # largest id of a vocabulary as a multiple of its size
KNOWN_ENDS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<|im_end|>",
    "<eos>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
# tiktoken's pattern engine crashes the process at about a million consecutive white-space
# characters.
FAST_CHARS_MAX = 500_000
# GPT-2's pattern for splitting a text into words, also that of the byte-level pre-tokenizer.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True)
class Encoding:
    """Token ids of a text, and the number of its characters outside the vocabulary."""

    ids: list[int]
    dropped_chars: int = 0


class Tokenizer:
    """Interface of all tokenizers. `sha256` is the hash of the saved form, compared by shards,
    checkpoints and evaluations.
    """

    kind: str
    vocab_size: int
    eos_id: int

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that text is never encoded as: the end-of-text token and declared special tokens.
        They have 0 bytes.
        """
        return frozenset((self.eos_id,))

    def literal(self, control_id: int) -> str:
        """The literal form of a control id, which is encoded as plain text; empty if it has
        none.
        """
        return ""

    def encode(self, text: str) -> Encoding:
        """Ids of a text. A literal end-of-text marker is encoded as plain text."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        return [self.encode(t) for t in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Incomplete characters give U+FFFD, end-of-text tokens give nothing."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The saved form, of which `sha256` is the hash."""
        raise NotImplementedError

    @cached_property
    def sha256(self) -> str:
        return sha256_bytes(self.to_bytes())

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of bytes of each id, int32 (vocab_size,); 0 for the end-of-text token."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())


class Bpe(Tokenizer):
    """A tokenizer of the `tokenizers` library, saved in that library's own format; ours is
    byte-level BPE without a normaliser.

    `eos_token` ends a document. Batches are encoded by tiktoken if it is installed and supports the
    merges: the ids are equal.
    """

    kind = "bpe"

    def __init__(self, inner, eos_token: str = END_OF_TEXT):
        self.inner = inner
        # A literal "<|endoftext|>" in a document is text and must not end it.
        self.inner.encode_special_tokens = True
        # A file may declare truncation or padding; neither applies to a corpus.
        self.inner.no_truncation()
        self.inner.no_padding()
        self.vocab_size = inner.get_vocab_size()
        self.eos_id = inner.token_to_id(eos_token)
        # Appended to the saved file, because the format has no field for it.
        self.eos_token = eos_token

    @cached_property
    def control_ids(self) -> frozenset[int]:
        added = self.inner.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special) | {self.eos_id}

    def literal(self, control_id: int) -> str:
        return self.inner.id_to_token(control_id)

    def encode(self, text: str) -> Encoding:
        return Encoding(self.inner.encode(text, add_special_tokens=False).ids)

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merges in the order they are applied, as bytes.
        Raises KeyError for a vocabulary that is not byte-level.
        """
        alphabet = {c: b for b, c in _byte_alphabet().items()}
        return [
            tuple(bytes(alphabet[c] for c in side) for side in pair)
            for pair in _saved_merges(json.loads(self.inner.to_str()))
        ]

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        if self._fast is not None:
            return [
                self.encode(t)
                if len(t) > FAST_CHARS_MAX
                else Encoding(self._fast.encode_ordinary(t))
                for t in texts
            ]
        return [
            Encoding(e.ids) for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)
        ]

    @property
    def encoder(self) -> str:
        """The library that encodes batches."""
        return "tokenizers" if self._fast is None else "tiktoken"

    @cached_property
    def _fast(self):
        """The same merges in tiktoken; None if it is not installed, does not support them, or gives
        other ids on a test text.
        """
        ranks = _tiktoken_ranks(self.inner, self._pieces, self.control_ids)
        try:
            import tiktoken
        except ImportError:
            return None
        if ranks is None:
            return None
        fast = tiktoken.Encoding(
            "stackproof", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={}
        )
        same = all(fast.encode_ordinary(t) == self.encode(t).ids for t in HARD_TEXTS)
        return fast if same else None

    def decode(self, ids: Iterable[int]) -> str:
        if self._pieces is None:
            return self.inner.decode(
                [i for i in ids if i not in self.control_ids], skip_special_tokens=False
            )
        pieces = [self._pieces[i] for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    @cached_property
    def _pieces(self) -> list[bytes] | None:
        """The exact bytes of every id, empty for control ids; None for a vocabulary that is not
        byte-level.
        """
        if not _is_byte_level(self.inner):
            return None
        alphabet = {c: b for b, c in _byte_alphabet().items()}
        pieces = [self.inner.id_to_token(i) for i in range(self.vocab_size)]
        if None in pieces:
            raise ValueError(f"id {pieces.index(None)} of {self.vocab_size} stands for nothing")
        added = self.inner.get_added_tokens_decoder()
        return [
            b""
            if i in self.control_ids
            else p.encode()
            if i in added
            else bytes(alphabet[c] for c in p)
            for i, p in enumerate(pieces)
        ]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        if self._pieces is not None:
            return np.array([len(p) for p in self._pieces], np.int32)
        return np.array(
            [
                0 if i in self.control_ids else _written_bytes(self.inner.id_to_token(i))
                for i in range(self.vocab_size)
            ],
            np.int32,
        )

    def to_bytes(self) -> bytes:
        saved = self.inner.to_str(pretty=False)
        if self.eos_token == _known_end(self.inner):
            return saved.encode()
        # The format of the library has no field for another end-of-text token.
        return canonical_json(
            {"stackproof_tokenizer": "hf", "eos_token": self.eos_token, "tokenizer": saved}
        )


def _known_end(inner) -> str | None:
    """The first token of KNOWN_ENDS that a vocabulary has."""
    return next((t for t in KNOWN_ENDS if inner.token_to_id(t) is not None), None)


def _is_byte_level(inner) -> bool:
    """Whether the vocabulary spells bytes by GPT-2's table."""
    decoder = json.loads(inner.to_str()).get("decoder") or {}
    kinds = {decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", ()))}
    return "ByteLevel" in kinds


def _written_bytes(piece: str) -> int:
    """Bytes of text behind a piece of a SentencePiece or WordPiece vocabulary."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.removeprefix("##").replace("▁", " ").encode())


def _saved_merges(saved: dict) -> list[list[str]]:
    """Merges of a saved tokenizer; older files hold each merge as one string."""
    return [m if isinstance(m, list) else m.split(" ") for m in saved["model"]["merges"]]


def _tiktoken_ranks(
    inner, pieces: list[bytes] | None, control_ids: frozenset[int]
) -> dict[bytes, int] | None:
    """Bytes to rank for tiktoken; None if it does not support the tokenizer: another word pattern,
    a normaliser, ids out of order.
    """
    saved = json.loads(inner.to_str())
    cut = saved.get("pre_tokenizer") or {}
    plain = (
        cut.get("type") == "ByteLevel"
        and not cut.get("add_prefix_space")
        and cut.get("use_regex", True)
    )
    if (
        pieces is None
        or not plain
        or saved.get("normalizer")
        or len(saved["added_tokens"]) != len(control_ids)
    ):
        return None
    made = [saved["model"]["vocab"]["".join(m)] for m in _saved_merges(saved)]
    if any(a >= b for a, b in zip(made, made[1:])) or saved["model"].get("ignore_merges"):
        return None
    ranks = {p: i for i, p in enumerate(pieces) if i not in control_ids}
    return ranks if len(ranks) == len(pieces) - len(control_ids) else None


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in character of each byte in byte-level BPE files (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
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


def make_tokenizer(
    cfg: BpeTokenizer | ByteTokenizer | CharTokenizer | FileTokenizer, texts: Iterable[str]
) -> Tokenizer:
    """Train the declared tokenizer on texts, or load it; the same texts in the same order give the
    same bytes.

    Raises DataError for a file that is not a tokenizer, or texts too short for the vocabulary.
    """
    match cfg:
        case BpeTokenizer():
            return train_bpe(cfg.vocab_size, texts, cfg.special_tokens)
        case ByteTokenizer():
            return Bytes()
        case CharTokenizer():
            return Chars("".join(sorted(set().union(*texts))))
        case FileTokenizer():
            return load_tokenizer(Path(cfg.path), eos_token=cfg.eos_token)
    assert_never(cfg)


def train_bpe(vocab_size: int, texts: Iterable[str], special_tokens: Iterable[str] = ()) -> Bpe:
    """Byte-level BPE by the `tokenizers` library.
    Ids: control tokens, 256 bytes, then merges in the order they were made.

    Raises DataError for a special token that is a word of the texts, because both would have one
    id.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys((END_OF_TEXT, *special_tokens))),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    made = {
        *_byte_alphabet().values(),
        *("".join(m) for m in _saved_merges(json.loads(inner.to_str()))),
    }
    if words := [s for s in special_tokens if s in made]:
        raise DataError(
            f"the special token {words[0]!r} is a piece of the texts too, so text would become a "
            "control token",
            allowed="tokens that no text is made of, such as <|user|>",
            next_step="give it another name",
        )
    return Bpe(inner)


def load_tokenizer(path: Path, *, eos_token: str = "") -> Tokenizer:
    """Read a saved tokenizer, ours or any tokenizer.json of the Hugging Face format.

    `eos_token` names the token that ends a document; empty takes the first known one.
    Raises DataError with the file if it is damaged, of an unknown kind, or lacks the token.
    """
    try:
        return _parse(path.read_bytes(), eos_token)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The tokenizers library raises bare Exception, and its panic is a BaseException.
    except BaseException as e:
        raise DataError(
            f"{path} is not a tokenizer: {e}",
            allowed="the tokenizer.json of a run, of prepared data, or of the Hugging Face format",
            next_step="restore it, or name its end of text with data.tokenizer.eos_token",
        ) from e


def _parse(data: bytes, eos_token: str) -> Tokenizer:
    """The tokenizer in the saved form `bytes`.
    Raises ValueError, or any exception of the library, if they are not a valid tokenizer.
    """
    match json.loads(data):
        case {"model": _} as document:
            _require_dense_ids(document)
            return _from_library(data.decode("utf-8"), eos_token)
        case {"stackproof_tokenizer": "hf", "eos_token": str(saved_eos), "tokenizer": str(saved)}:
            return _from_library(saved, eos_token or saved_eos)
        case {"stackproof_tokenizer": "byte"}:
            return Bytes()
        case {"stackproof_tokenizer": "char", "symbols": str(symbols)} if symbols and len(
            set(symbols)
        ) == len(symbols):
            return Chars(symbols)
    raise ValueError("it is of no known kind")


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


def _from_library(saved: str, eos_token: str) -> Bpe:
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_str(saved)
    end = eos_token or _known_end(inner)
    if end is None or inner.token_to_id(end) is None:
        raise ValueError(
            f"it has no token {eos_token or ' or '.join(KNOWN_ENDS)} that could end a text"
        )
    loaded = Bpe(inner, end)
    _ = loaded.token_bytes  # raises if an id has no bytes
    return loaded

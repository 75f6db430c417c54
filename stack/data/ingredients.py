"""What the gates of data and tokenizer get to see."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from stack.config import RunConfig
from stack.data import reader
from stack.data.prepare import Dataset

HARD_TEXTS = (
    "hello ! how are you ?  two  spaces, a\ttab, a\r\nline end and \u00a0 no-break space",
    "naïve café — “quotes”, 漢字, עברית, emoji 👩‍👩‍👧 and a combining e\u0301",
    "<|endoftext|> is text here, and so is <|endoftext|><|endoftext|>",
    "def f(x):\n    return x**2  # 1e-5, 0x1F, ::, ->, ...\n",
    "",
    " ",
    "\x00\x01\x7f",
)
HELD_OUT_TEXTS, HELD_OUT_TOKENS = 64, 4096  # documents of the round trip, and tokens of each, so that one huge document costs no time


class Cut:
    """The first windows of a stream, for judging order and coverage of a corpus of any size in bounded time."""

    def __init__(self, stream, n_windows: int):
        self.stream, self._n = stream, n_windows
        self.n_tokens, self.vocab_size = stream.n_tokens, stream.vocab_size

    def n_windows(self, seq_len: int) -> int:
        return min(self._n, self.stream.n_windows(seq_len))

    def windows(self, numbers: np.ndarray, seq_len: int) -> np.ndarray:
        return self.stream.windows(numbers, seq_len)


def data_ingredients(cfg: RunConfig, dataset: Dataset, *, n_params: int, planned_tokens: int) -> dict[str, Any]:
    """Ingredients by name, as the checks in `contracts.data` and `contracts.tokenizer` ask for them.

    `n_params` counts the model's parameters; `planned_tokens` is what the run will read. Raises DataError if a shard cannot be read.
    """
    tokenizer, seq_len = dataset.tokenizer, cfg.model.max_seq_len

    def make_reader(*, n_windows: int | None = None, seed: int = cfg.seed, **options: Any):
        stream = Cut(dataset.train, n_windows) if n_windows else dataset.train
        return reader.Reader(stream, seq_len=seq_len, seed=seed, **options)

    return {
        "make_reader": make_reader,
        "splits": {"train": dataset.train, "validation": dataset.validation},
        "manifest": dataset.manifest,
        "tokenizer": tokenizer,
        "seq_len": seq_len,
        "hard_texts": HARD_TEXTS,
        "held_out_texts": _first(dataset.validation_texts(HELD_OUT_TOKENS), HELD_OUT_TEXTS),
        "n_params": n_params,
        "planned_tokens": planned_tokens,
    }


def _first(texts: Iterable[str], n: int) -> list[str]:
    return [t for _, t in zip(range(n), texts)]

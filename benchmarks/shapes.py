"""The model sizes that are compared, ours by configuration,
and a corpus of random tokens for them.
"""

import json
import string
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path

import numpy as np

END = "<|endoftext|>"
BLANK = "Ġ"  # how byte-level vocabularies write it
SEED = 20240607
WORDS_PER_LINE = 200
LINES_PER_DOCUMENT = 10


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and of one optimizer step on it.
    `fresh`: a new process for every round, as memory is short.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    seq_len: int
    vocab_size: int
    rows: int
    fresh: bool
    dtype: str = "float32"
    tied_head: bool = True

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.seq_len

    def flops_per_step(self, matrix_parameters: int) -> int:
        """Of forward and backward: 6 per matrix parameter and token, and causal attention (half of
        all pairs) as 6·layers·d·T per token.

        `matrix_parameters` count the head once and no table that is only looked up.
        The same formula for every contestant.
        """
        return self.tokens_per_step * (
            6 * matrix_parameters + 6 * self.n_layers * self.d_model * self.seq_len
        )

    def sets(self) -> tuple[str, ...]:
        """This shape as `--set` values of the recipe tiny."""
        return (
            f"model.n_layers={self.n_layers}",
            f"model.d_model={self.d_model}",
            f"model.n_heads={self.n_heads}",
            f"model.n_kv_heads={self.n_kv_heads}",
            f"model.head_dim={self.d_model // self.n_heads}",
            f"model.d_ff={self.d_ff}",
            f"model.max_seq_len={self.seq_len}",
            f"train.tokens_per_step={self.tokens_per_step}",
            f"train.micro_batch_size={self.rows}",
            f"train.dtype={self.dtype}",
            f"model.tied_head={str(self.tied_head).lower()}",
        )


SHAPES = {
    "a": Shape(4, 128, 4, 4, 384, 256, 512, 16, fresh=False),
    "b": Shape(6, 256, 8, 2, 768, 512, 32_000, 8, fresh=True),
    "llama-370m": Shape(
        24, 1024, 16, 4, 2816, 2048, 49_152, 16, fresh=True, dtype="bfloat16", tied_head=False
    ),
}


def words_of(n: int) -> list[str]:
    """The first `n` of all words over a to z, shorter ones first,
    so that a word's beginnings are all there too.
    """
    every = chain.from_iterable(product(string.ascii_lowercase, repeat=k) for k in range(1, 6))
    return ["".join(letters) for letters in islice(every, n)]


def write_corpus(folder: Path, vocab_size: int, n_tokens: int) -> tuple[str, ...]:
    """Text of uniformly random words, one token each, and a byte-level tokenizer that reads it so;
    both as `--set` values.

    Each word with the blank before it is one merge: that of the word without its
    last letter and that letter.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = words_of(vocab_size - len(alphabet) - 1)
    pieces = [*alphabet, *(BLANK + w for w in words)]
    merges = [(BLANK + w[:-1], w[-1]) for w in words]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    n_documents = max(50, n_tokens // (WORDS_PER_LINE * LINES_PER_DOCUMENT))
    drawn = np.random.default_rng(SEED).choice(
        words, (n_documents, LINES_PER_DOCUMENT, WORDS_PER_LINE)
    )
    texts = ["\n".join(" " + " ".join(line) for line in document) for document in drawn]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return corpus_sets(folder)


def corpus_sets(folder: Path) -> tuple[str, ...]:
    """The corpus that was written to a folder, as `--set` values."""
    return (
        "data.corpus.kind=files",
        f"data.corpus.paths={json.dumps([str(folder / 'texts.jsonl')])}",
        'data.corpus.languages=["code", "en"]',
        "data.tokenizer.kind=file",
        f"data.tokenizer.path={json.dumps(str(folder / 'tokenizer.json'))}",
    )

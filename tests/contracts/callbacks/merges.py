"""Two tokenizers of one size with other merges, and rows of text."""

import random

import tokenizers
from transformers import PreTrainedTokenizerFast

from tests.contracts.callbacks import stock

LETTERS = "abcdefgh"
WORDS = ["".join(random.Random(i).choices(LETTERS, k=2 + i % 6)) for i in range(60)]


def bpe(seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the size of the models, trained on text of its own."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(2, 7))) for _ in range(60)]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=stock.VOCAB, special_tokens=special, show_progress=False
    )
    inner.train_from_iterator([" ".join(draw.choices(words, k=20)) for _ in range(80)], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


OWN, OTHER = bpe(1), bpe(2)


def encoded(tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> list[dict]:
    draw, rows = random.Random(seed), []
    for _ in range(n):
        ids = tokenizer.encode(" ".join(draw.choices(WORDS, k=12)), add_special_tokens=False)
        rows.append({"input_ids": [stock.BOS, *ids[:40], stock.EOS]})
    return rows

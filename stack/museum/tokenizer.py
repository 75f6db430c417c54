"""Plants in tokenizers."""

import json
from collections import Counter

from stackproof.contracts.tokenizer import WORDS
from stackproof.data import prepare
from stackproof.data import tokenizer as tokenizers
from stackproof.museum.plant import swap


def lossy_decode():
    original = tokenizers.Bpe.decode

    def tidied(self, ids):
        return original(self, ids).replace(" !", "!").replace(" ?", "?")

    with swap(tokenizers.Bpe, "decode", tidied):
        yield


def special_from_text():
    original = tokenizers.Bpe.encode

    def taking_it_seriously(self, text):
        self.inner.encode_special_tokens = False
        try:
            return original(self, text)
        finally:
            self.inner.encode_special_tokens = True

    with swap(tokenizers.Bpe, "encode", taking_it_seriously):
        yield


def special_from_corpus():
    original = tokenizers.Bpe.encode_batch

    def unguarded(self, texts):
        self.inner.encode_special_tokens, self._fast = False, None
        try:
            return original(self, texts)
        finally:
            self.inner.encode_special_tokens = True

    with swap(tokenizers.Bpe, "encode_batch", unguarded):
        yield


def other_merges():
    original = prepare.open_folder

    def with_another(folder, cfg):
        dataset = original(folder, cfg)
        texts = ["other words give other merges, and every id is still valid "] * 50 + [
            str(n) for n in range(5000)
        ]
        dataset.tokenizer = tokenizers.train_bpe(dataset.tokenizer.vocab_size, texts)
        return dataset

    with swap(prepare, "open_folder", with_another):
        yield


def pair_counter_overflows():
    original = tokenizers.train_bpe

    def in_sixteen_bits(vocab_size, texts, special_tokens=()):
        words = Counter(w for text in texts for w in WORDS.findall(text))
        return original(
            vocab_size,
            [w * max(0, (n + 2**15) % 2**16 - 2**15) for w, n in words.items()],
            special_tokens,
        )

    with swap(tokenizers, "train_bpe", in_sixteen_bits):
        yield


def merges_out_of_order():
    original = tokenizers.train_bpe

    def shuffled(vocab_size, texts, special_tokens=()):
        trained = original(vocab_size, texts, special_tokens)
        saved = json.loads(trained.inner.to_str())
        saved["model"]["merges"][:2] = reversed(saved["model"]["merges"][:2])
        return tokenizers.Bpe(type(trained.inner).from_str(json.dumps(saved)))

    with swap(tokenizers, "train_bpe", shuffled):
        yield

"""Plants in tokenizers."""

import json
from collections import Counter

from stackproof.contracts.tokenizer import WORDS
from stackproof.data import prepare
from stackproof.data import tokenizer as tokenizers
from stackproof.museum.plant import plant, swap


@plant(
    "tokenizer.lossy-decode",
    gate="tokenizer.round-trip",
    title="Decoding tidies the text",
    story=(
        "A clean-up in decode removes the space before punctuation. Training is not affected, so "
        "no curve shows it; code, tables and quotations come back subtly wrong, and scores that "
        "count characters are off."
    ),
    sources=(
        "https://github.com/huggingface/tokenizers/issues/1543",
        "https://github.com/huggingface/transformers/issues/36325",
    ),
)
def lossy_decode():
    original = tokenizers.Bpe.decode

    def tidied(self, ids):
        return original(self, ids).replace(" !", "!").replace(" ?", "?")

    with swap(tokenizers.Bpe, "decode", tidied):
        yield


@plant(
    "tokenizer.special-from-text",
    gate="tokenizer.round-trip",
    title="A literal in the text becomes a control id",
    story=(
        "A document that explains the end-of-text marker contains it, and the tokenizer takes it "
        "for the real thing. The document is cut in two, and anyone who can write into the corpus "
        "can end a context."
    ),
    sources=("https://github.com/hiyouga/LlamaFactory/issues/9600",),
)
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


@plant(
    "tokenizer.special-from-corpus",
    gate="tokenizer.round-trip",
    title="A literal becomes a control id, but only while shards are written",
    story=(
        "The guard against literals is set where prompts are read and forgotten on the batch "
        "path, which writes the shards. Every test of the encoder is green. A document that "
        "quotes the marker is cut in two, and the model learns that text may end anywhere."
    ),
    sources=("https://github.com/hiyouga/LlamaFactory/issues/9600",),
)
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


@plant(
    "tokenizer.other-merges",
    gate="tokenizer.pinning",
    title="Another tokenizer of the same size",
    story=(
        "The tokenizer of another run is loaded. Its vocabulary has the same size, so every id is "
        "valid and every shape fits. Training is fine; whatever is evaluated or sampled with it "
        "is garbled."
    ),
    sources=(
        "https://github.com/Lightning-AI/litgpt/issues/1734",
        "https://github.com/Lightning-AI/litgpt/issues/1772",
    ),
)
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


@plant(
    "tokenizer.pair-counter-overflows",
    gate="tokenizer.merges",
    title="The pair counter overflows",
    story=(
        "Pairs are counted in an integer that is too short for the corpus. The most frequent pair "
        "of all wraps around, looks rare, and is never merged: on the largest corpora the "
        "commonest word stays in letters."
    ),
    sources=(
        "https://github.com/huggingface/tokenizers/issues/437",
        "https://github.com/huggingface/tokenizers/issues/2057",
    ),
)
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


@plant(
    "tokenizer.merges-out-of-order",
    gate="tokenizer.merges",
    title="Merges are saved in another order",
    story=(
        "The merges go through a set on their way into the file and come out in another order. "
        "The vocabulary is the same, every text survives, and every text is cut in other places "
        "than in training."
    ),
    sources=("https://github.com/huggingface/transformers/issues/36325",),
)
def merges_out_of_order():
    original = tokenizers.train_bpe

    def shuffled(vocab_size, texts, special_tokens=()):
        trained = original(vocab_size, texts, special_tokens)
        saved = json.loads(trained.inner.to_str())
        saved["model"]["merges"][:2] = reversed(saved["model"]["merges"][:2])
        return tokenizers.Bpe(type(trained.inner).from_str(json.dumps(saved)))

    with swap(tokenizers, "train_bpe", shuffled):
        yield

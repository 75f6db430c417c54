"""Plants in tokenizers."""

from stack.data import prepare
from stack.data import tokenizer as tokenizers
from stack.museum.plant import plant, swap


@plant(
    "tokenizer.lossy-decode",
    gate="tokenizer.round-trip",
    title="Decoding tidies the text",
    story="A clean-up in decode removes the space before punctuation. Training is not affected, so no curve shows it; code, tables and "
    "quotations come back subtly wrong, and scores that count characters are off.",
    sources=("https://github.com/huggingface/tokenizers/issues/1543", "https://github.com/huggingface/transformers/issues/36325"),
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
    story="A document that explains the end-of-text marker contains it, and the tokenizer takes it for the real thing. The document is cut "
    "in two, and anyone who can write into the corpus can end a context.",
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
    story="The guard against literals is set where prompts are read and forgotten on the batch path, which writes the shards. Every test "
    "of the encoder is green. A document that quotes the marker is cut in two, and the model learns that text may end anywhere.",
    sources=("https://github.com/hiyouga/LlamaFactory/issues/9600",),
)
def special_from_corpus():
    original = tokenizers.Bpe.encode_batch

    def unguarded(self, texts):
        self.inner.encode_special_tokens = False
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
    story="The tokenizer of another run is loaded. Its vocabulary has the same size, so every id is valid and every shape fits. Training "
    "is fine; whatever is evaluated or sampled with it is garbled.",
    sources=("https://github.com/Lightning-AI/litgpt/issues/1734", "https://github.com/Lightning-AI/litgpt/issues/1772"),
)
def other_merges():
    original = prepare._open

    def with_another(folder, verify):
        dataset = original(folder, verify)
        cfg = tokenizers.BpeTokenizer(vocab_size=dataset.tokenizer.vocab_size)
        dataset.tokenizer = tokenizers.train_tokenizer(
            cfg, ["other words give other merges, and every id is still valid "] * 50 + [str(n) for n in range(5000)]
        )
        return dataset

    with swap(prepare, "_open", with_another):
        yield

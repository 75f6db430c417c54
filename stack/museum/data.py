"""Plants in corpora, shards and the reader."""

from dataclasses import replace

import numpy as np

from stackproof.contracts import data as checks
from stackproof.data import permutation, reader, shards, stages
from stackproof.museum.plant import plant, swap
from stackproof.train import loop


@plant(
    "data.epoch-order-constant",
    gate="data.order",
    title="Every epoch in the same order",
    story=(
        "The epoch number never reaches the shuffle, so each epoch repeats the first one's order. "
        "Batches always meet in the same company. Generalisation suffers a little and nothing in "
        "the log says why."
    ),
    sources=(
        "https://github.com/pytorch/pytorch/issues/31771",
        "https://github.com/pytorch/pytorch/issues/11324",
    ),
)
def epoch_order_constant():
    original = permutation.order_key

    with swap(permutation, "order_key", lambda seed, epoch, source="": original(seed, 0, source)):
        yield


@plant(
    "data.sequential-order",
    gate="data.order",
    title="Shuffling is switched off",
    story=(
        "A refactoring replaces the shuffled order by the order of the files. Every batch is one "
        "topic, gradients wander with the file names, and only the shape of the noise in the loss "
        "has changed."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/316",),
)
def sequential_order():
    with swap(permutation, "permute", lambda positions, n, key: positions):
        yield


@plant(
    "data.rank-shards-overlap",
    gate="data.coverage",
    title="Ranks read the same windows",
    story=(
        "The slice by rank is lost in a wrapper, so every rank walks the whole list. The "
        "effective batch is full of duplicates and an epoch is over after a fraction of the text. "
        "With one process all is well."
    ),
    sources=(
        "https://github.com/huggingface/datasets/issues/5360",
        "https://github.com/huggingface/datasets/issues/3423",
    ),
)
def rank_shards_overlap():
    original = reader.Reader.draw

    def as_rank_zero(self):
        rank, self.rank = self.rank, 0
        try:
            return original(self)
        finally:
            self.rank = rank

    with swap(reader.Reader, "draw", as_rank_zero):
        yield


@plant(
    "data.rank-stride-one",
    gate="data.coverage",
    title="Ranks start one row apart, not one batch",
    story=(
        "The offset of a rank is its number, where it should be its number times the rows of a "
        "batch. Neighbouring ranks share all rows but one. A test with one row per rank is green, "
        "because there the two are the same."
    ),
    sources=(
        "https://github.com/huggingface/datasets/issues/7868",
        "https://github.com/pytorch/torchtitan/issues/3131",
    ),
)
def rank_stride_one():
    original = reader.Reader.draw

    def one_row_apart(self):
        rank, before = self.rank, self.cursor
        self.rank, self.cursor = 0, before + rank
        try:
            b = original(self)
        finally:
            self.rank, self.cursor = rank, before
        self.cursor = before + self.rows * self.world_size
        return reader.Batch(b.input_ids, b.labels, b.sample_ids, b.epoch, before, self.cursor)

    with swap(reader.Reader, "draw", one_row_apart):
        yield


@plant(
    "data.split-then-mix",
    gate="data.coverage",
    title="The split by rank is lost when sources are mixed",
    story=(
        "Each source is split by rank, then a wrapper that mixes them rebuilds the list from the "
        "whole. Every rank walks its own copy from the start, so all deliver the same rows in the "
        "same order. The test of the splitter itself stays green."
    ),
    sources=(
        "https://github.com/huggingface/datasets/issues/7868",
        "https://github.com/pytorch/torchtitan/issues/3131",
    ),
)
def split_then_mix():
    original = reader.Reader.draw

    def own_copy(self):
        rank, world_size, before = self.rank, self.world_size, self.cursor
        self.rank, self.world_size, self.cursor = 0, 1, before // world_size
        try:
            b = original(self)
        finally:
            self.rank, self.world_size, self.cursor = (
                rank,
                world_size,
                before + self.rows * world_size,
            )
        return replace(b, cursor_before=before, cursor_after=self.cursor)

    with swap(reader.Reader, "draw", own_copy):
        yield


@plant(
    "data.workers-share-generator",
    gate="data.coverage",
    title="Every worker draws the same random rows",
    story=(
        "The random generator is made when the data set is, and copied into every worker with its "
        "state. Half of the draws are duplicates. Seeding the global generator per worker does "
        "not help, because this one is the data set's own."
    ),
    sources=(
        "https://github.com/pytorch/pytorch/issues/5059",
        "https://github.com/facebookresearch/fairseq/issues/1383",
    ),
)
def workers_share_generator():
    original = reader.Reader.draw

    def copied(self):
        b = original(self)
        self.copied = getattr(self, "copied", None) or np.random.default_rng(self.seed)
        windows = self.copied.integers(0, self.n_windows, self.rows)
        rows = self.stream.rows(windows, self.seq_len)
        tokens = {
            "input_ids": reader.torch.from_numpy(rows.input_ids),
            "labels": reader.torch.from_numpy(rows.labels),
        }
        return replace(b, **tokens, sample_ids=tuple(windows.tolist()))

    with swap(reader.Reader, "draw", copied):
        yield


@plant(
    "data.head-only",
    gate="data.coverage",
    title="Only the head of the corpus is read",
    story=(
        "A source is truncated instead of sampled: an index is taken modulo a smaller number. The "
        "first part of the corpus is seen twice as often, the last part never, and the token "
        "count is exactly as planned."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/147",),
)
def head_only():
    original = permutation.permute

    def truncated(positions, n, key):
        return original(positions, n, key) % max(1, n // 2)

    with swap(permutation, "permute", truncated):
        yield


@plant(
    "data.labels-unshifted",
    gate="data.coverage",
    title="Labels are the inputs themselves",
    story=(
        "The shift by one is lost when batches are assembled. The model learns to copy the token "
        "it is looking at. The loss falls to almost nothing, which is celebrated until somebody "
        "samples."
    ),
    sources=("https://github.com/huggingface/transformers/issues/36928",),
)
def labels_unshifted():
    original = reader.Reader.draw

    def unshifted(self):
        b = original(self)
        return replace(b, labels=b.input_ids.clone())

    with swap(reader.Reader, "draw", unshifted):
        yield


@plant(
    "data.placeholder-on-exhaustion",
    gate="data.exhaustion",
    title="A placeholder at the end of the corpus",
    story=(
        "When the corpus ends, the reader hands out an empty batch so that the loop can finish "
        "its epoch. Thousands of steps train on nothing. Loss and speed both look remarkable."
    ),
    sources=("founding note: ship-two-001",),
)
def placeholder_on_exhaustion():
    original = reader.Reader.draw

    def placeholder(self):
        try:
            return original(self)
        except reader.StreamExhausted:
            zeros = reader.torch.zeros(self.rows, self.seq_len, dtype=reader.torch.int64)
            return reader.Batch(
                zeros,
                zeros,
                (0,) * self.rows,
                0,
                self.cursor,
                self.cursor,
                None,
                (0,) * self.rows,
                (0,) * self.rows,
            )

    with swap(reader.Reader, "draw", placeholder):
        yield


@plant(
    "data.silent-wrap",
    gate="data.exhaustion",
    title="The corpus wraps although it must not",
    story=(
        "A run was planned as a single pass, and its reader starts again without a word. The last "
        "quarter of the run sees text for the second time, and the improving loss is memory, not "
        "learning."
    ),
    sources=("https://github.com/paiml/entrenar/issues/294",),
)
def silent_wrap():
    original = reader.Reader.draw

    def wrapping(self):
        self.on_exhausted = "wrap"
        return original(self)

    with swap(reader.Reader, "draw", wrapping):
        yield


@plant(
    "data.id-overflow",
    gate="data.integrity",
    title="Token ids overflow their storage type",
    story=(
        "Ids are stored in a type too small for the vocabulary and wrap around. A rare token "
        "turns into a common one. Nothing crashes, because every wrapped id is a valid one."
    ),
    sources=(
        "https://github.com/huggingface/transformers/issues/2825",
        "https://github.com/huggingface/datatrove/issues/118",
    ),
)
def id_overflow():
    def wrapped(ids, vocab_size):
        return np.asarray(ids, np.int64).astype(np.uint8).astype(shards.token_dtype(vocab_size))

    with swap(shards, "pack_ids", wrapped):
        yield


@plant(
    "data.eos-missing",
    gate="data.integrity",
    title="Documents do not end",
    story=(
        "The end-of-text id is left out when documents are joined. The model never sees an "
        "ending, so it never writes one, and one document runs into the next in every sample."
    ),
    sources=("https://github.com/huggingface/transformers/issues/23530",),
)
def eos_missing():
    original = shards.pack_ids

    def without_end(ids, vocab_size):
        packed = original(ids, vocab_size)
        return packed[:0] if len(packed) == 1 else packed

    with swap(shards, "pack_ids", without_end):
        yield


@plant(
    "data.split-overlap",
    gate="data.leakage",
    title="Held-out documents are also trained on",
    story=(
        "An index is off when the splits are cut, and most held-out documents are in the training "
        "split as well. Validation looks splendid, and stays splendid until the model meets text "
        "of tomorrow."
    ),
    sources=(
        "https://github.com/openai/parameter-golf/issues/2127",
        "https://github.com/huggingface/datasets/issues/4261",
    ),
)
def split_overlap():
    original = stages.sides

    def overlapping(cfg, texts, hashes):
        for n, (split, text, digest) in enumerate(original(cfg, texts, hashes)):
            yield split, text, digest
            if split == "validation" and n % 10 < 8:
                yield "train", text, digest

    with swap(stages, "sides", overlapping):
        yield


@plant(
    "data.blind-scanner",
    gate="data.leakage",
    title="The contamination scan scans nothing",
    story=(
        "The scanner's tokens and the shards' tokens are hashed in different ways, so nothing "
        "ever matches. It reports zero overlap on every corpus, and a clean report is what "
        "everybody hoped for."
    ),
    sources=("https://github.com/marin-community/marin/issues/6742",),
)
def blind_scanner():
    original = checks.span_hashes
    calls = [0]

    def differently_salted(tokens, span):
        calls[0] += 1
        return original(tokens, span) ^ np.uint64(calls[0])

    with swap(checks, "span_hashes", differently_salted):
        yield


@plant(
    "data.tiny-corpus",
    gate="data.corpus-budget",
    title="A corpus far too small for the model",
    story=(
        "Eighteen million tokens for 370 million parameters: the training loss falls as it "
        "should, and from the third round on the held-out loss rises. Nothing is broken, except "
        "the plan."
    ),
    sources=("founding note: ship-two-001",),
)
def tiny_corpus():
    original = stages.sides

    def tiny(cfg, texts, hashes):
        for split, text, digest in original(cfg, texts, hashes):
            yield split, text if split == "validation" else text[:60], digest

    with swap(stages, "sides", tiny):
        yield


@plant(
    "data.window-drawn-twice",
    gate="data.consumption",
    title="The same windows are drawn again",
    story=(
        "A prefetching wrapper hands out its last batch a second time whenever it is late. The "
        "number of steps is right, the number of different texts is not."
    ),
    sources=("https://github.com/pytorch/pytorch/issues/5059",),
)
def window_drawn_twice():
    original = reader.Reader.draw

    def stale(self):
        b = original(self)
        last = getattr(self, "_last", b)
        self._last = b
        return replace(
            last, epoch=b.epoch, cursor_before=b.cursor_before, cursor_after=b.cursor_after
        )

    with swap(reader.Reader, "draw", stale):
        yield


@plant(
    "data.position-skips",
    gate="data.consumption",
    title="The position jumps ahead",
    story=(
        "The position is advanced twice per draw, once by the reader and once by a wrapper. Half "
        "of the corpus is never seen, and since epochs are counted by position, two epochs pass "
        "in the time of one."
    ),
    sources=("https://github.com/huggingface/datasets/issues/8308",),
)
def position_skips():
    original = reader.Reader.draw

    def skipping(self):
        b = original(self)
        self.cursor += self.rows
        return b

    with swap(reader.Reader, "draw", skipping):
        yield


@plant(
    "data.batch-held-back",
    gate="data.consumption",
    title="The step learns from the batch before",
    story=(
        "A wrapper that fetches ahead hands the step what it held back the last time. Every batch "
        "is drawn, counted and logged once, and the first is learned from twice. Whatever is "
        "logged beside a step, its rows, sources or epoch, is that of another one."
    ),
    sources=("https://github.com/dscripka/openWakeWord/pull/202",),
)
def batch_held_back():
    original, held = loop.draw, []

    def late(run):
        held.append(original(run))
        return held[-2:][0]

    with swap(loop, "draw", late):
        yield

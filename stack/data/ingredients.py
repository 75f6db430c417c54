"""What the gates of corpus, data, tokenizer and curriculum get to see.
Functions are looked up when called, not when gathered.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from stackproof.config import BanditCurriculum, Mixture, RunConfig
from stackproof.contracts.data import PIECE_TOKENS, span_hashes, span_of
from stackproof.data import curriculum, dedup, files, filters, reader
from stackproof.data import tokenizer as tokenizers
from stackproof.data.order import Source
from stackproof.data.prepare import Dataset
from stackproof.data.shards import TokenStream

# documents of the round trip, and tokens of each, so that one huge document costs no time
HELD_OUT_TEXTS, HELD_OUT_TOKENS = 64, 4096
# of documents longer than this only a few of a source are looked at again
SAMPLED_TOKENS, LONG_DOCUMENTS = 65536, 2


class Cut:
    """The first windows of a stream, for judging order and coverage of a corpus of
    any size in bounded time.
    """

    def __init__(self, stream, n_windows: int):
        self.stream, self._n = stream, n_windows
        self.n_tokens, self.vocab_size = stream.n_tokens, stream.vocab_size

    def n_windows(self, seq_len: int) -> int:
        return min(self._n, self.stream.n_windows(seq_len))

    def rows(self, numbers: np.ndarray, seq_len: int):
        return self.stream.rows(numbers, seq_len)


def data_ingredients(
    cfg: RunConfig, dataset: Dataset, *, n_params: int, planned_tokens: int, order_seed: int
) -> dict[str, Any]:
    """Ingredients by name, as the checks in
    `contracts.{corpus,data,tokenizer,curriculum}` ask for them.

    `n_params` counts the model's parameters; `planned_tokens` is what the run will read;
    `order_seed` is that of the run's order. Raises DataError if a shard cannot be read.
    """
    seq_len = cfg.model.max_seq_len

    def make_reader(*, n_windows: int | None = None, seed: int = cfg.seed, **options: Any):
        stream = Cut(dataset.train, n_windows) if n_windows else dataset.train
        return reader.Reader(stream, seq_len=seq_len, seed=seed, **options)

    return {
        "make_reader": make_reader,
        "n_params": n_params,
        "planned_tokens": planned_tokens,
        **folder_ingredients(dataset, seq_len),
        **_curriculum_ingredients(cfg, dataset, order_seed),
    }


def folder_ingredients(dataset: Dataset, seq_len: int) -> dict[str, Any]:
    """What can be judged of a data set without a run: rows are those of `seq_len` tokens."""
    return {
        "splits": {"train": dataset.train, "validation": dataset.validation},
        "manifest": dataset.manifest,
        "tokenizer": dataset.tokenizer,
        "seq_len": seq_len,
        "hard_texts": tokenizers.HARD_TEXTS,
        "held_out_texts": _first(dataset.validation_texts(HELD_OUT_TOKENS), HELD_OUT_TEXTS),
        "reject": lambda text, languages: filters.rejection(text, languages),
        "sample_documents": lambda frac, minimum: sampled_documents(dataset, frac, minimum),
        "chat_text": lambda turns: files.chat_text(turns, "planted"),
        "near_repeats": lambda texts: _near_repeats(texts, dataset.manifest["config"]["dedup"]),
        "gram_set": lambda texts: dedup.gram_set(texts),
        "shares_gram": lambda text, grams: dedup.shares_gram(text, grams),
        "evaluation_grams": dataset.evaluation_grams(),
        "row_stream": dataset.train,
        "trained_merges": lambda texts, n: tokenizers.train_bpe(257 + n, texts).merges(),
    }


def _near_repeats(texts: list[str], how: dict[str, Any]) -> list[bool]:
    signatures = dedup.signatures(texts, how["shingle_words"])
    return dedup.near_repeats([signatures], [np.ones(len(texts), bool)], how["similarity_min"])[
        0
    ].tolist()


def sampled_documents(dataset: Dataset, frac: float, minimum: int) -> Iterator[tuple[str, str]]:
    """(source, text) of a share of the training documents of every source, spread evenly, decoded
    from the shards; at least `minimum`.
    """
    stream: TokenStream = dataset.train
    bounds = np.append(stream.document_starts, stream.n_tokens)
    source_of = np.repeat(
        np.array(stream.shard_sources), [len(s) for s in stream.shard_document_starts()]
    )
    for source in dict.fromkeys(stream.shard_sources):
        mine = np.flatnonzero(source_of == source)
        n_long = 0
        wanted = min(len(mine), max(minimum, round(frac * len(mine))))
        for i in mine[(np.arange(wanted) * len(mine)) // wanted].tolist():
            start, stop = int(bounds[i]), int(bounds[i + 1])
            n_long += stop - start > SAMPLED_TOKENS
            if stop - start <= SAMPLED_TOKENS or n_long <= LONG_DOCUMENTS:
                yield source, dataset.text(stream, start, stop)


def found_in(ids: Sequence[int], stream: TokenStream, max_tokens: int) -> float:
    """Share of a text's runs of about 60 bytes that occur in the first `max_tokens` of a stream; 0
    for a text shorter than a run.
    """
    span = span_of(stream.n_bytes / stream.n_tokens)
    own = (
        np.unique(span_hashes(np.asarray(ids, np.int64), span))
        if len(ids) >= span
        else np.zeros(0, np.uint64)
    )
    found = np.zeros(len(own), bool)
    for start in range(0, min(stream.n_tokens, max_tokens) if len(own) else 0, PIECE_TOKENS):
        tokens = stream.token_range(start, min(start + PIECE_TOKENS + span, stream.n_tokens))
        found |= np.isin(own, span_hashes(tokens, span)) if len(tokens) >= span else False
    return float(found.mean()) if len(own) else 0.0


def passages_found(rows: Sequence[Sequence[int]], stream: TokenStream, max_tokens: int) -> float:
    """Share of passages of about 60 bytes, four from every row, that occur in the first
    `max_tokens` of a stream.
    """
    span = span_of(stream.n_bytes / stream.n_tokens)
    cuts = [
        row[start : start + span]
        for row in rows
        for start in (0, len(row) // 4, len(row) // 2, 3 * len(row) // 4)
    ]
    wanted = [np.asarray(c, "<u4").tobytes() for c in cuts if len(c) == span]
    found = [False] * len(wanted)
    for start in range(0, min(stream.n_tokens, max_tokens), PIECE_TOKENS):
        piece = (
            stream.token_range(start, min(start + PIECE_TOKENS + span, stream.n_tokens))
            .astype("<u4")
            .tobytes()
        )
        found = [was or passage in piece for was, passage in zip(found, wanted)]
    return sum(found) / len(found) if found else 0.0


def _curriculum_ingredients(cfg: RunConfig, dataset: Dataset, order_seed: int) -> dict[str, Any]:
    rows_per_step = cfg.train.tokens_per_step // cfg.model.max_seq_len

    def make_bandit(capped: str = ""):
        arms = [
            Source(n, 1000 * i, 1000, 1.0, 0.0 if n == capped else 1.0, 0.0)
            for i, n in enumerate(("useful", "list", "other"))
        ]
        return curriculum.make_order(
            BanditCurriculum(), arms, seed=cfg.seed, rows_per_step=rows_per_step
        )

    return {
        "make_run_order": lambda: curriculum.run_order(cfg, dataset, seed=order_seed),
        "make_bandit": make_bandit,
        "warmup_rows": cfg.curriculum.warmup_steps * rows_per_step,
        "warmup_sources": cfg.curriculum.warmup_sources,
        "declared_shares": declared_shares(cfg, dataset),
    }


def declared_shares(cfg: RunConfig, dataset: Dataset) -> dict[str, tuple[float, float, float]]:
    """(weight, cap, floor) of every source: the curriculum's, else the mixture's own; a built
    corpus brings its manifest's.
    """
    tables = {
        "weight": cfg.curriculum.weights,
        "cap": cfg.curriculum.caps,
        "floor": cfg.curriculum.floors,
    }
    if isinstance(cfg.data.corpus, Mixture):
        own = {s.name: {k: getattr(s, k) for k in tables} for s in cfg.data.corpus.sources}
    else:
        own = {name: {k: entry[k] for k in tables} for name, entry in dataset.sources.items()}
    return {
        name: tuple(float(table.get(name, shares[k])) for k, table in tables.items())
        for name, shares in own.items()
    }


def _first(texts: Iterable[str], n: int) -> list[str]:
    return [t for _, t in zip(range(n), texts)]

"""What the gates of corpus, data, tokenizer and curriculum judge of a data set and of a run.

Functions of the stack are looked up in their modules at each call, so that plants reach them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from stackproof.config import BanditCurriculum, Mixture, RunConfig
from stackproof.contracts.subject import (
    Corpus,
    Curriculum,
    DataLoader,
    Manifest,
    NotOffered,
    Subject,
    Tokenizer,
)
from stackproof.data import curriculum, data_loader, dedup, files, filters
from stackproof.data import tokenizer as tokenizers
from stackproof.data.packing import Rows
from stackproof.data.prepare import Dataset
from stackproof.data.sampler import Sampler, Source
from stackproof.data.shards import TokenStream

# Documents that gates read of the validation split, and tokens of each, so that one huge document
# costs no time.
HELD_OUT_TEXTS, HELD_OUT_TOKENS = 64, 4096


def data_set_subject(dataset: Dataset, seq_len: int) -> Subject:
    """What can be judged of a data set without a run, in rows of `seq_len` tokens."""
    return Subject(
        corpus=BuiltCorpus(dataset),
        data_loader=RunDataLoader(dataset.train, seq_len, seed=0),
        tokenizer=RunTokenizer(dataset.tokenizer),
    )


@dataclass(frozen=True)
class BuiltCorpus(Corpus):
    """A data set that `stack data build` or a run has built."""

    dataset: Dataset

    @property
    def splits(self) -> Mapping[str, TokenStream]:
        return self.dataset.judged

    @property
    def manifest(self) -> Manifest:
        return self.dataset.manifest

    def sample_documents(self, frac: float, minimum: int) -> Iterator[tuple[str, str]]:
        return self.dataset.sample_documents(frac, minimum)

    @cached_property
    def held_out_texts(self) -> Sequence[str]:
        return list(islice(self.dataset.validation_texts(HELD_OUT_TOKENS), HELD_OUT_TEXTS))

    def rejection(self, text: str, languages: Sequence[str]) -> str | None:
        return filters.rejection(text, languages)

    def chat_text(self, turns: list[dict[str, str]]) -> str | None:
        return files.chat_text(turns, "planted")

    def near_repeats(self, texts: list[str]) -> list[bool]:
        how = self.manifest["config"]["dedup"]
        signatures, keep = dedup.signatures(texts, how["shingle_words"]), np.ones(len(texts), bool)
        return dedup.near_repeats([signatures], [keep], how["similarity_min"])[0].tolist()

    def contamination_scanner(self, texts: Iterable[str] | None) -> "GramScanner":
        stored = texts is None
        return GramScanner(self.dataset.evaluation_grams() if stored else dedup.gram_set(texts))


@dataclass(frozen=True)
class GramScanner:
    """Finds word n-grams, by their hashes."""

    grams: np.ndarray

    @property
    def n_grams(self) -> int:
        return len(self.grams)

    def finds(self, text: str) -> bool:
        return dedup.shares_gram(text, self.grams)


class FirstRows:
    """The first rows of a stream, so that order and coverage of a corpus of any size are judged in
    bounded time.
    """

    def __init__(self, stream: TokenStream, n: int):
        self.stream, self._n = stream, n
        self.n_tokens, self.vocab_size = stream.n_tokens, stream.vocab_size

    def n_windows(self, seq_len: int) -> int:
        return min(self._n, self.stream.n_windows(seq_len))

    def rows(self, numbers: np.ndarray, seq_len: int) -> Rows:
        return self.stream.rows(numbers, seq_len)


class RunDataLoader(DataLoader):
    """The data loader of `stack train` over a whole stream, without a mixture. `of_run` makes that
    of a run; None: there is no run.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        seed: int,
        of_run: Callable[[], data_loader.DataLoader] | None = None,
    ):
        self.stream, self.seq_len, self.seed, self._of_run = stream, seq_len, seed, of_run

    @property
    def n_rows(self) -> int:
        return self.stream.n_windows(self.seq_len)

    def fresh(
        self, *, n_rows: int | None = None, seed: int | None = None, **options: int | str
    ) -> data_loader.DataLoader:
        stream = FirstRows(self.stream, n_rows) if n_rows else self.stream
        seed = self.seed if seed is None else seed
        return data_loader.DataLoader(stream, seq_len=self.seq_len, seed=seed, **options)

    def of_run(self) -> data_loader.DataLoader:
        if self._of_run is None:
            raise NotOffered("DataLoader.of_run: a corpus without a run")
        return self._of_run()


@dataclass(frozen=True)
class RunCurriculum(Curriculum):
    """The mixture of a run; `order_seed` is that of its sampler order."""

    cfg: RunConfig
    dataset: Dataset
    order_seed: int

    def sampler_order(self) -> Sampler:
        return curriculum.run_sampler(self.cfg, self.dataset, seed=self.order_seed)

    def bandit(self, caps: Mapping[str, float]) -> Sampler:
        sources = [
            Source(name, 1000 * i, 1000, 1.0, cap, 0.0)
            for i, (name, cap) in enumerate(caps.items())
        ]
        return curriculum.make_sampler(
            BanditCurriculum(), sources, seed=self.cfg.seed, rows_per_step=self._rows_per_step
        )

    @property
    def _rows_per_step(self) -> int:
        return self.cfg.train.tokens_per_step // self.cfg.model.max_seq_len

    @property
    def n_windows(self) -> int:
        return self.dataset.train.n_windows(self.cfg.model.max_seq_len)

    @property
    def warmup_rows(self) -> int:
        return self.cfg.curriculum.warmup_steps * self._rows_per_step

    @property
    def warmup_sources(self) -> Sequence[str]:
        return self.cfg.curriculum.warmup_sources

    @property
    def declared_shares(self) -> Mapping[str, tuple[float, float, float]]:
        """The curriculum's shares, else the mixture's own; a built corpus has its manifest's."""
        cfg, corpus = self.cfg.curriculum, self.cfg.data.corpus
        tables = {"weight": cfg.weights, "cap": cfg.caps, "floor": cfg.floors}
        if isinstance(corpus, Mixture):
            own = {s.name: s.model_dump(include=set(tables)) for s in corpus.sources}
        else:
            own = self.dataset.sources
        return {
            name: tuple(float(table.get(name, shares[k])) for k, table in tables.items())
            for name, shares in own.items()
        }


class RunTokenizer(Tokenizer):
    """A tokenizer of the stack."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer

    @property
    def sha256(self) -> str:
        return self.tokenizer.sha256

    @property
    def n_ids(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def special_ids(self) -> Mapping[str, tuple[int, None]]:
        """The model holds no id of its own."""
        return {"eos_token_id": (self.tokenizer.eos_id, None)}

    def trained_merges(self, texts: Sequence[str], n: int) -> list[tuple[bytes, bytes]]:
        return tokenizers.train_bpe(257 + n, texts).merges()

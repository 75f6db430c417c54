"""The data of a run: corpus, data loader, curriculum, tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from stackproof.contracts.subject.capability import capability, value

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    import numpy as np
    from torch import Tensor


class Rows(Protocol):
    """Packed rows (R, T) int64; a label of −100 does not count."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray | None


class TokenStream(Protocol):
    """The tokens of a split in its shards, and the rows that are cut from them."""

    n_tokens: int
    n_bytes: int
    n_documents: int
    paths: Sequence[Path]
    tokenizer_sha256: Sequence[str]
    document_hashes: np.ndarray
    document_starts: np.ndarray

    def token_range(self, start: int, stop: int) -> np.ndarray: ...
    def rows(self, numbers: np.ndarray, seq_len: int) -> Rows: ...
    def n_windows(self, seq_len: int) -> int: ...
    def shard_tokens(self) -> Sequence[int]: ...
    def shard_windows(self, seq_len: int) -> Sequence[int]: ...
    def dropped_tokens(self, seq_len: int) -> int: ...
    def padding(self, seq_len: int) -> int: ...


class Manifest(TypedDict):
    """What a build of a data set wrote down. `decontamination` is None without evaluation sets."""

    config: Mapping[str, object]
    filters: Mapping[str, object]
    sources: Sequence[Mapping[str, object]]
    splits: Mapping[str, Mapping[str, object]]
    tokenizer: Mapping[str, object]
    decontamination: Mapping[str, object] | None


class ContaminationScanner(Protocol):
    """Finds passages of evaluation texts in other texts."""

    n_grams: int

    def finds(self, text: str) -> bool: ...


class Corpus:
    """A data set that has been built: its splits, its manifest and the functions that made it."""

    @value
    def splits(self) -> Mapping[str, TokenStream]:
        """Token streams by name: train, validation. Of some shards alone, where a run may not read
        all.
        """

    @value
    def manifest(self) -> Manifest:
        """What the build wrote down."""

    @capability
    def sample_documents(self, frac: float, minimum: int) -> Iterator[tuple[str, str]]:
        """(source, text) of a share (0-1) of each source's training documents, at least
        `minimum`, decoded from the shards.
        """

    @value
    def held_out_texts(self) -> Sequence[str]:
        """The beginnings of some documents of the validation split."""

    @capability
    def rejection(self, text: str, languages: Sequence[str]) -> str | None:
        """The filter rule that rejects a text; None where all keep it."""

    @capability
    def chat_text(self, turns: list[dict[str, str]]) -> str | None:
        """A chat, given as turns with role and content, as the text that is tokenized; None where
        the chat is not used.
        """

    @capability
    def near_repeats(self, texts: list[str]) -> list[bool]:
        """Which of the texts deduplication drops as near repeats of an earlier one."""

    @capability
    def contamination_scanner(self, texts: Iterable[str] | None) -> ContaminationScanner:
        """The scanner of decontamination for these texts; None: as it was stored for the declared
        evaluation sets.
        """


class DrawnBatch(Protocol):
    """A micro-batch as MicroBatch has it; `epoch` is that of its last row. `sources` and `epochs`
    have one entry per row.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None
    sample_ids: Sequence[int]
    epoch: int
    sources: Sequence[int]
    epochs: Sequence[int]


class RowLoader(Protocol):
    """A data loader at a position: `cursor` counts the rows of all ranks that were drawn."""

    cursor: int
    stream: TokenStream

    def next_batch(self) -> DrawnBatch: ...


class DataLoader:
    """Rows of the training split as a run reads them."""

    @value
    def seq_len(self) -> int:
        """Tokens of a row."""

    @value
    def n_rows(self) -> int:
        """Rows of one epoch."""

    @capability
    def fresh(
        self,
        *,
        rows: int,
        n_rows: int | None = None,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        cursor: int = 0,
        on_exhausted: str = "wrap",
    ) -> RowLoader:
        """A data loader over the first `n_rows` rows (None: all) with batches of `rows` rows, at a
        position; `seed` is None for the run's own. `on_exhausted` is wrap or error.
        """

    @capability
    def of_run(self) -> RowLoader:
        """The data loader of the run at its first row, with its mixture."""


class Source(Protocol):
    """A source of the mixture: its windows in the training split, its weight and bounds (0-1)."""

    name: str
    first: int
    n_windows: int
    weight: float
    cap: float
    floor: float


class Draws(Protocol):
    """Source, window and epoch of samples, int64 (n,)."""

    sources: np.ndarray
    windows: np.ndarray
    epochs: np.ndarray


class SamplerOrder(Protocol):
    """Which window each sample of a run is. Samples are decided in order, then read."""

    sources: Sequence[Source]

    def decide(self, before: int, after: int) -> None: ...
    def at(self, numbers: np.ndarray) -> Draws: ...
    def counts(self, after: int) -> np.ndarray: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: Mapping) -> list[str]: ...


class BanditOrder(SamplerOrder, Protocol):
    """An order that learns from the held-out loss of each source; `focus` is the source of the
    turn.
    """

    focus: int

    def reward(self, losses_nats: Mapping[str, float]) -> None: ...


class Curriculum:
    """The order in which sources are mixed."""

    @capability
    def sampler_order(self) -> SamplerOrder:
        """The sampler order of this run, at its beginning."""

    @capability
    def bandit(self, caps: Mapping[str, float]) -> BanditOrder:
        """A bandit order over sources of these names and caps, of equal size and weight, without
        floors.
        """

    @value
    def n_windows(self) -> int:
        """Windows of the training split."""

    @value
    def warmup_rows(self) -> int:
        """Rows before the bandit chooses."""

    @value
    def warmup_sources(self) -> Sequence[str]:
        """Sources drawn in that time."""

    @value
    def declared_shares(self) -> Mapping[str, tuple[float, float, float]]:
        """(weight, cap, floor) by source, as the configuration has them."""


class Encoding(Protocol):
    """Ids of a text, and the number of characters that have none."""

    ids: Sequence[int]
    dropped_chars: int


class TextEncoder(Protocol):
    """What encodes. `token_bytes` is the number of UTF-8 bytes of each id."""

    eos_id: int
    token_bytes: np.ndarray

    def encode(self, text: str) -> Encoding: ...


class TextTokenizer(TextEncoder, Protocol):
    """What encodes and decodes."""

    vocab_size: int
    control_ids: frozenset[int]

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def literal(self, token_id: int) -> str: ...


class Tokenizer:
    """The tokenizer of a run."""

    @value
    def tokenizer(self) -> TextTokenizer:
        """The object that encodes and decodes."""

    @value
    def sha256(self) -> str:
        """Hash of its saved form, which manifest and shards name."""

    @value
    def n_ids(self) -> int:
        """Number of ids that it may give."""

    @value
    def special_ids(self) -> Mapping[str, tuple[int | None, int | Sequence[int] | None]]:
        """(tokenizer's id, model's id or ids) by name; None where one of them has none."""

    @capability
    def trained_merges(self, texts: Sequence[str], n: int) -> list[tuple[bytes, bytes]]:
        """The first `n` merges that training a BPE tokenizer on texts gives."""

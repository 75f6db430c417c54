"""How a run evaluates, stops, generates and exports.

B batch, T tokens, V vocab
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from stackproof.contracts.subject.capability import capability, value

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    import torch
    from torch import Tensor, nn

    from stackproof.contracts.subject.data import TextEncoder, TextTokenizer
    from stackproof.contracts.subject.declared import Architecture
    from stackproof.contracts.subject.training import MicroBatch


class Spread(Protocol):
    """How far the losses of held-out batches differ between two evaluations; see
    `contracts.stopping.PairedSpread`.
    """

    @property
    def std_nats(self) -> float: ...


class TextScore(Protocol):
    """The score of a text. A dropped character is one without an id."""

    bits_per_byte: float
    bits_per_char: float
    total_nats: float
    bytes: int
    chars: int
    dropped_chars: int
    dropped_bytes: int


class BatchScore(Protocol):
    """The score of batches: `batch_nats` has the mean of each, `stderr_nats` is the standard error
    of their mean.
    """

    loss_nats: float
    total_nats: float
    n_bytes: int
    bits_per_byte: float
    batch_nats: Sequence[float]
    stderr_nats: float


class TokenRange(Protocol):
    """A split of a data set, as ids in order."""

    n_tokens: int

    def token_range(self, first: int, stop: int) -> Sequence[int]: ...


class Evaluation:
    """How held-out text is scored."""

    @capability
    def score_text(self, model: nn.Module, tokenizer: TextEncoder, text: str) -> TextScore:
        """Score of a text longer than one window. The model gives logits (B, T, V) from ids
        (B, T).
        """

    @capability
    def score_batches(self, model: nn.Module, batches: Sequence[MicroBatch]) -> BatchScore:
        """Score of batches under the run's tokenizer."""

    @capability
    def score_in_precision(self, model: nn.Module, batches: Sequence[MicroBatch]) -> BatchScore:
        """As `score_batches`, in the run's own compute precision."""

    @capability
    def baselines(
        self, train: TokenRange, validation: TokenRange, tokenizer
    ) -> Mapping[str, float]:
        """Held-out bits per byte of each baseline, fitted on training tokens, by metric. Of the
        tokenizer `vocab_size` and `token_bytes` are read.
        """

    @capability
    def held_out_batches(self, n_rows: int, n_max: int) -> Sequence[MicroBatch]:
        """At most `n_max` batches of `n_rows` rows each, spread over the held-out split."""


class StopDeclaration(TypedDict):
    """The configuration of a stop rule: patience, with what follows, or never."""

    kind: str
    patience: int
    min_evaluations: int
    z: float
    min_delta_nats: float
    expected_gain_nats: float


class StopDecision(Protocol):
    """Whether a run stops, and how many evaluations it has waited for a gain."""

    stop: bool
    wait: int


class StopRule(Protocol):
    """A stop rule with its memory."""

    def update(self, batch_nats: Sequence[float], /) -> StopDecision: ...


class Stopping:
    """The rule that ends a run early."""

    @capability
    def rule(self) -> StopRule:
        """A fresh stop rule of the run."""

    @value
    def declared(self) -> StopDeclaration:
        """Its configuration."""

    @value
    def n_eval_batches(self) -> int:
        """Held-out batches of each evaluation."""

    @value
    def spread(self) -> Spread:
        """That of the run's training and evaluation, for its held-out batches."""


class Sampling:
    """How text is generated."""

    @capability
    def logits(self, model: nn.Module, ids_BT: Tensor, cache: object | None = None) -> Tensor:
        """Logits (B, T, V) in evaluation mode of rows, or of the new tokens of rows whose earlier
        keys and values are in `cache`.
        """

    @capability
    def cache(self) -> object:
        """An empty key-value cache of the run's model."""

    @capability
    def token_probs(
        self,
        logits_V: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seen: Sequence[int] = (),
    ) -> Tensor:
        """Probabilities (V,) of the next token after the tokens `seen`; top_k 0 and top_p 1 keep
        all.
        """

    @capability
    def pick(self, probs_V: Tensor, uniforms_R: Tensor) -> Tensor:
        """The token of each uniform number."""

    @capability
    def generate(
        self,
        model: nn.Module,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        eos_id: int | None = None,
        use_cache: bool = True,
    ) -> list[int]:
        """New tokens after `ids`, one uniform float64 of `generator` for each."""


class LanguageModel(Protocol):
    """A model as one side of a comparison."""

    def logits(self, ids_BT: Tensor, last: int) -> Tensor:
        """Logits of the last positions, (B, ≤ last, V) float32."""

    def continuation(self, ids: Sequence[int], n_new: int) -> list[int]:
        """The next tokens, the most likely one each time."""


class Exported:
    """A folder that was exported or imported, and both sides of its comparison."""

    @value
    def folder(self) -> Path: ...

    @value
    def live_shapes(self) -> Sequence[tuple[int, ...]]:
        """Shapes of the model's tensors in memory."""

    @value
    def dtype(self) -> str:
        """Declared dtype of the stored tensors, as safetensors names it."""

    @value
    def ours(self) -> LanguageModel:
        """The model in memory."""

    @value
    def theirs(self) -> LanguageModel:
        """What the other library has read from the folder."""

    @value
    def their_complaints(self) -> str:
        """What the other library reports while loading: missing or unexpected keys."""

    @value
    def compared_sha256(self) -> Mapping[str, str]:
        """Hash of each weight file when the other library read it for the comparison."""

    @value
    def max_length(self) -> int:
        """Longest row, tokens."""

    @value
    def vocab_size(self) -> int: ...

    @value
    def eos_id(self) -> int:
        """Id of the token that ends a text, of the tokenizer that the folder was written with."""

    @value
    def architecture(self) -> Architecture:
        """The resolved `model` section of the model in memory."""

    @value
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that the folder was written with."""

    @value
    def pieces(self) -> Mapping[str, int]:
        """The id of each token of that tokenizer, control tokens included, under the text that
        stands for it in a file of the tokenizers library.
        """

    @value
    def tokenizer_document(self) -> Mapping[str, object] | None:
        """That tokenizer as the document of the tokenizers library; None if it is of another
        format.
        """

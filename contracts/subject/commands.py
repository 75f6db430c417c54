"""What the commands that read a checkpoint use and report.

B batch, T tokens, V vocab
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stackproof.contracts.subject.capability import capability, value

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    from torch import Tensor, nn

    from stackproof.contracts.subject.data import TextTokenizer
    from stackproof.contracts.subject.declared import Architecture


class OpenedCheckpoint:
    """A checkpoint that a command has opened, and what it states of it."""

    @value
    def asked(self) -> Path:
        """The path that the command was given: a run directory or a step folder."""

    @value
    def folder(self) -> Path:
        """The step folder that was opened."""

    @value
    def stated_step(self) -> int:
        """The step in the output of the command."""

    @value
    def model(self) -> nn.Module:
        """The model that the command computes with."""

    @value
    def architecture(self) -> Architecture:
        """What the configuration in the checkpoint promises of the model."""

    @value
    def rotary_tables(self) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine (T, J) of the model, as `Model.rotary_tables`; no checkpoint has them."""

    @value
    def tokenizer_sha256(self) -> str: ...

    @value
    def assembled(self) -> Mapping[str, Tensor]:
        """The weights of a checkpoint whose tensors are divided among files."""


class WindowScore(Protocol):
    """The score of a text; `window_nats` has the mean of each window."""

    window_nats: Sequence[float]
    dropped_bytes: int


class ScoredText:
    """A text that was scored under a model, and the score."""

    @value
    def texts(self) -> Sequence[str]:
        """The declared documents, read again."""

    @value
    def declared_bytes(self) -> int:
        """Size of the file, or bytes of the split in the manifest."""

    @value
    def tokenizer(self) -> TextTokenizer: ...

    @value
    def seq_len(self) -> int:
        """Length of a window, tokens."""

    @value
    def stride(self) -> int:
        """From one window to the next, tokens."""

    @value
    def score(self) -> WindowScore: ...

    @value
    def metrics(self) -> Mapping[str, float]:
        """The numbers of the record by name."""

    @capability
    def last_logits(self, ids: list[int], last: int) -> Tensor:
        """Logits (last, V) of the last positions of a row, by the full forward."""


class SuiteAnswer(Protocol):
    """An answer to a question of a suite: the prompt that was given, the drawn tokens, their text
    as it was judged, and the verdict. Of the prompt it counts the tokens that are outside of the
    context at first, and the characters that the tokenizer dropped.
    """

    step: int
    domain: str
    prompt: str
    asked: str
    ids: Sequence[int]
    text: str
    passed: bool
    faults: Sequence[str]
    lost_prompt_tokens: int
    dropped_prompt_chars: int


class AnsweredSuite:
    """A suite of prompts and the answers of one checkpoint."""

    @value
    def suite_file(self) -> Path: ...

    @value
    def answers(self) -> Sequence[SuiteAnswer]: ...

    @value
    def rows(self) -> Sequence[Sequence[int]]:
        """Every row of more than one token that the model read for these answers, in order."""

    @value
    def tokenizer(self) -> TextTokenizer: ...

    @value
    def max_length(self) -> int:
        """Longest context, tokens."""

    @value
    def metrics(self) -> Mapping[str, float]:
        """The numbers of the record by name, where they are those of this checkpoint."""

    @value
    def rounds(self) -> Mapping[int, Mapping[str, int]]:
        """Passes by domain by step, as the record's output has them."""

    @value
    def every_answer(self) -> Sequence[SuiteAnswer]:
        """The answers of all checkpoints of the command."""

    @capability
    def last_logits(self, ids: list[int], last: int) -> Tensor:
        """Logits (last, V) of the last positions of a row, by the full forward."""

    @capability
    def faults(self, prompt: str, text: str) -> Sequence[str]:
        """Why a text fails the checks of a prompt, by its id; empty if it passes."""


class TracedForward:
    """A forward that was traced."""

    @value
    def model(self) -> nn.Module: ...

    @value
    def input_ids(self) -> Sequence[int]: ...

    @value
    def declared_ids(self) -> Sequence[int]:
        """The ids that the command was given, or those of its text behind an end-of-text token."""

    @value
    def traced_logits(self) -> Tensor:
        """Logits (1, T, V) of the traced forward."""

    @value
    def points(self) -> Mapping[str, tuple[float, float]]:
        """Root mean square and largest magnitude by point."""

    @capability
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Logits of a forward without tracing."""

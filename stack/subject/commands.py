"""What a command that reads a checkpoint shows to the gates.

B batch, T tokens, V vocab
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.drawn import DrawOptions, follow
from stackproof.contracts.events import TextDrawn
from stackproof.contracts.subject import (
    AnsweredSuite,
    Architecture,
    NotOffered,
    OpenedCheckpoint,
    ScoredText,
    SuiteAnswer,
    TracedForward,
)
from stackproof.distributed.tensors import inference
from stackproof.evaluate.bits_per_byte import TextEvaluation, evaluating
from stackproof.evaluate.suite import Suite
from stackproof.model.transformer import Transformer
from stackproof.train import checkpoint


def last_logits(model: Transformer, ids: list[int], last: int) -> Tensor:
    """Logits (last, V) of the last positions of a row by one full forward, in host memory."""
    with evaluating(model), inference(model):
        x_BTD, _ = model.hidden_states(torch.tensor([ids], device=model.embed.weight.device))
        return model.logits(x_BTD[:, -last:])[0].float().cpu()


def drawn(
    model: Transformer,
    tokenizer: Any,
    prompt: str,
    ids: Sequence[int],
    text: str,
    options: DrawOptions,
    chance: torch.Generator | None,
    step: int = 0,
) -> TextDrawn:
    """A drawn text, followed by the model's full forward; see `contracts.drawn.follow`."""
    logits = lambda row, last: last_logits(model, row, last)  # noqa: E731
    n = model.cfg.max_seq_len
    return follow(logits, tokenizer, prompt, ids, text, options, chance, n, step)


@dataclass(frozen=True, kw_only=True)
class Opened(OpenedCheckpoint):
    """A checkpoint as a command has opened it."""

    asked: Path
    folder: Path
    stated_step: int
    model: Transformer
    architecture: Architecture
    tokenizer_sha256: str

    @property
    def rotary_tables(self) -> tuple[Tensor, Tensor] | None:
        return self.model.positions.tables(0, self.model.cfg.max_seq_len)

    @property
    def assembled(self) -> Mapping[str, Tensor]:
        if checkpoint.layout_in(self.folder) == "single":
            raise NotOffered("OpenedCheckpoint.assembled")
        return checkpoint.load(self.folder).model


@dataclass(frozen=True, kw_only=True)
class Scored(ScoredText):
    """A text and its score."""

    reader: Transformer
    tokenizer: Any
    texts: Sequence[str]
    declared_bytes: int
    seq_len: int
    stride: int
    score: TextEvaluation
    metrics: Mapping[str, float]

    def last_logits(self, ids: list[int], last: int) -> Tensor:
        return last_logits(self.reader, ids, last)


@contextmanager
def rows_read(model: Transformer) -> Iterator[list[list[int]]]:
    """While it lasts, collects the rows of more than one token that the model, or a copy of it,
    reads.
    """
    rows: list[list[int]] = []

    def note(module: nn.Module, inputs: tuple) -> None:
        rows.extend(row for row in inputs[0].tolist() if len(row) > 1)

    handle = model.embed.register_forward_pre_hook(note)
    try:
        yield rows
    finally:
        handle.remove()


class Answered(AnsweredSuite):
    """The answers of one checkpoint; with `metrics` and what follows where the record is about
    them.
    """

    def __init__(
        self,
        reader: Transformer,
        tokenizer: Any,
        suite: Suite,
        suite_file: Path,
        *,
        answers: Sequence[SuiteAnswer],
        rows: Sequence[Sequence[int]],
        metrics: Mapping[str, float] | None = None,
        rounds: Mapping[int, Mapping[str, int]] | None = None,
        every_answer: Sequence[SuiteAnswer] = (),
    ):
        self.reader, self.tokenizer, self.suite_file = reader, tokenizer, suite_file
        self.answers, self.rows, self.max_length = answers, rows, reader.cfg.max_seq_len
        self._prompts = {p.id: p for d in suite.domain for p in d.prompts}
        if metrics is not None:
            self.metrics, self.rounds, self.every_answer = metrics, rounds, every_answer

    def last_logits(self, ids: list[int], last: int) -> Tensor:
        return last_logits(self.reader, ids, last)

    def faults(self, prompt: str, text: str) -> Sequence[str]:
        return self._prompts[prompt].faults(text)


@dataclass(frozen=True, kw_only=True)
class Traced(TracedForward):
    """A traced forward; `run` is the same without tracing."""

    model: nn.Module
    input_ids: Sequence[int]
    declared_ids: Sequence[int]
    traced_logits: Tensor
    points: Mapping[str, tuple[float, float]]
    run: Callable[[Tensor], Tensor]

    def logits(self, ids_BT: Tensor) -> Tensor:
        return self.run(ids_BT)

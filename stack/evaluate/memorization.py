"""Memorization: whether the model continues passages of its training data word for word.
N passages, W tokens each, T tokens of a row, V vocab.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.distributed.tensors import inference
from stackproof.evaluate.bits_per_byte import evaluating

PASSAGES, PASSAGE_TOKENS = 32, 64  # the first half of a passage is the prompt
ROWS_AT_ONCE = 8  # bounds the memory of logits over a large vocabulary


def matched(
    model: nn.Module,
    ids_NW: Tensor,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[int]:
    """Number of tokens of each passage's second half that greedy decoding repeats before the first
    difference.

    Greedy decoding repeats the passage exactly as long as the most likely token is the next token
    of the passage, so one forward over the passage is sufficient.
    """
    given, found = ids_NW.shape[1] // 2, []
    with evaluating(model), inference(model):
        for rows in ids_NW.split(ROWS_AT_ONCE):
            with autocast():
                x_RWD, _ = model.hidden_states(rows[:, :-1].to(device))
                best_RC = model.logits(x_RWD[:, given - 1 :]).argmax(-1)
            found += (best_RC.cpu() == rows[:, given:]).cumprod(1).sum(1).tolist()
    return found


def passages(batches: Sequence[Any]) -> Tensor:
    """Up to PASSAGES passages (N, W) int64 from the rows of some batches, each within one document.
    W is at most the length of a row.
    """
    width = min(PASSAGE_TOKENS, batches[0].input_ids.shape[1])
    chosen = [p for _, p in zip(range(PASSAGES), _of_rows(batches, width))]
    return torch.stack(chosen) if chosen else torch.zeros(0, width, dtype=torch.int64)


def _of_rows(batches: Sequence[Any], width: int) -> Iterator[Tensor]:
    """Passages that do not overlap, the first of every row before the second of any."""
    rows = [(b, r) for b in batches for r in range(len(b.input_ids))]
    for start in range(0, batches[0].input_ids.shape[1] - width + 1, width):
        for batch, row in rows:
            place = slice(start, start + width)
            documents = batch.document_ids
            if documents is None or bool(
                (documents[row, place] == documents[row, start]).all()
                & (batch.labels[row, place][:-1] >= 0).all()
            ):
                yield batch.input_ids[row, place]


@dataclass(frozen=True)
class Memorization:
    """Number of passages (N, W) that a model continues word for word from their first
    `prefix_tokens` tokens.

    `matched_tokens` is the mean number of repeated tokens. `held_out()` counts the same over
    `n_held_out` passages outside of the training data.
    """

    n_passages: int
    n_recited: int
    prefix_tokens: int
    matched_tokens: float
    n_held_out: int
    held_out: Callable[[], int]


def memorization(
    model: nn.Module, read: Sequence[Any], unread: Sequence[Any], **options: Any
) -> Memorization:
    """Memorization of the training batches `read`, with held-out batches for comparison.
    `options` are those of `matched`.
    """
    read_NW, unread_NW = passages(read), passages(unread)
    prefix = read_NW.shape[1] // 2
    asked = read_NW.shape[1] - prefix
    tokens = matched(model, read_NW, **options)
    return Memorization(
        n_passages=len(tokens),
        n_recited=tokens.count(asked),
        prefix_tokens=prefix,
        matched_tokens=sum(tokens) / max(1, len(tokens)),
        n_held_out=len(unread_NW),
        held_out=lambda: matched(model, unread_NW, **options).count(asked),
    )

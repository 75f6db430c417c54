"""Held-out loss in nats per token and bits per byte.

B batch, T tokens, V vocab. Sums and counts are kept, and each mean is divided once. Bits per byte
are comparable between tokenizers, loss per token is not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.contracts.conditions import ensure, require
from stackproof.data.data_loader import model_inputs
from stackproof.data.packing import IGNORE_INDEX
from stackproof.distributed.ranks import ONE_PROCESS, Ranks
from stackproof.distributed.tensors import reshard
from stackproof.spec.errors import DataError
from stackproof.spec.formulas import bits_per_byte

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss over batches. `n_bytes` counts the bytes of the scored labels; an end-of-text
    token has 0 bytes. `training_modules` names modules that were in training
    mode.
    """

    loss_nats: float
    total_nats: float
    n_tokens: int
    n_bytes: int
    bits_per_byte: float
    batch_nats: tuple[float, ...]
    stderr_nats: float
    training_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextEvaluation:
    """Held-out loss over texts. Nats, bytes and characters cover the same symbols: those kept by
    the tokenizer. `window_nats` has the mean of each window.
    """

    bits_per_byte: float
    bits_per_char: float
    loss_nats: float
    total_nats: float
    bytes: int
    chars: int
    tokens: int
    dropped_chars: int
    dropped_bytes: int
    windows: int
    seq_len: int
    stride: int
    window_nats: tuple[float, ...]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode of every module is restored on exit."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        reshard(model)


def token_nats(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """−log p of each label, (B, T) float64; 0 where the label is −100."""
    nats = F.cross_entropy(
        logits_BTV.float().flatten(0, 1),
        labels_BT.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return nats.double().view(labels_BT.shape)


def batch_sums(
    model: nn.Module, batch: Any, device: torch.device | str, autocast: Autocast
) -> tuple[float, int]:
    """Summed nats and number of scored labels of one batch."""
    labels_BT = batch.labels.to(device)
    with autocast():
        logits_BTV = model(*model_inputs(batch, device))
    return float(token_nats(logits_BTV, labels_BT).sum()), int((batch.labels != IGNORE_INDEX).sum())


def label_bytes(labels: Tensor, token_bytes: np.ndarray) -> int:
    """UTF-8 bytes of the scored labels."""
    kept = labels[labels != IGNORE_INDEX].cpu().numpy()
    return int(np.asarray(token_bytes)[kept].sum(dtype=np.int64))


@require(lambda batches: len(batches) >= 1, "there is at least one held-out batch")
@ensure(lambda result, batches: len(result.batch_nats) == len(batches), "one mean per batch")
def evaluate_batches(
    model: nn.Module,
    batches: Sequence[Any],
    token_bytes: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    autocast: Autocast = nullcontext,
    ranks: Ranks = ONE_PROCESS,
) -> Evaluation:
    """Loss of `model` over batches with `input_ids` and `labels` (B, T) int64, label −100 not
    scored.

    `token_bytes[id]` is the number of UTF-8 bytes of an id. `stderr_nats` is the standard error of
    the mean over batches. The data ranks share the batches. Modes of modules and torch's random
    state are unchanged. Raises DataError if a batch has no valid label.
    """
    with evaluating(model):
        sums = ranks.dealt(batches, lambda b: batch_sums(model, b, device, autocast))
        training = tuple(name for name, m in model.named_modules() if m.training)
    if not all(n for _, n in sums):
        raise DataError(
            "a held-out batch has no valid label",
            next_step="check the label mask",
        )
    return _combine(sums, sum(label_bytes(b.labels, token_bytes) for b in batches), training)


def _combine(
    sums: Sequence[tuple[float, int]], n_bytes: int, training_modules: tuple[str, ...] = ()
) -> Evaluation:
    total_nats, n_tokens = math.fsum(nats for nats, _ in sums), sum(n for _, n in sums)
    means = [nats / n for nats, n in sums]
    stderr = float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else 0.0
    per_byte = bits_per_byte(total_nats, n_bytes) if n_bytes else math.inf
    return Evaluation(
        loss_nats=total_nats / n_tokens,
        total_nats=total_nats,
        n_tokens=n_tokens,
        n_bytes=n_bytes,
        bits_per_byte=per_byte,
        batch_nats=tuple(means),
        stderr_nats=stderr,
        training_modules=training_modules,
    )


# --- texts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Rows of equal length. Labels of symbols scored in other windows, and of padding, are −100."""

    input_ids: Tensor
    labels: Tensor


def windows(ids: Sequence[int] | np.ndarray, *, seq_len: int, stride: int, pad_id: int) -> Window:
    """Overlapping windows over a token stream, so that each token but the first is a label exactly
    once.

        stream   E a b c d e f    seq_len 4, stride 2
        window 0 E a b c          scores a b c d
        window 1     b c d e      scores e f (c d were scored above and are context)

    Returns input_ids and labels, both (windows, seq_len) int64;
    the last window is padded with `pad_id`.
    """
    stream = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    n_labels = len(stream) - 1
    n_windows = 1 + max(0, math.ceil((n_labels - seq_len) / stride))
    input_ids = torch.full((n_windows, seq_len), pad_id, dtype=torch.int64)
    labels = torch.full((n_windows, seq_len), IGNORE_INDEX, dtype=torch.int64)
    scored = 0
    for w in range(n_windows):
        start = w * stride
        stop = min(start + seq_len, n_labels)
        input_ids[w, : stop - start] = stream[start:stop]
        labels[w, scored - start : stop - start] = stream[scored + 1 : stop + 1]
        scored = stop
    return Window(input_ids, labels)


@require(
    lambda seq_len, stride: 1 <= stride <= seq_len,
    "1 ≤ stride ≤ seq_len; a larger stride skips symbols",
)
@require(lambda batch_size: batch_size >= 1, "a batch has at least one row")
def evaluate_tokens(
    model: nn.Module,
    ids: Sequence[int] | np.ndarray,
    token_bytes: np.ndarray,
    *,
    seq_len: int,
    stride: int,
    batch_size: int = 8,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    autocast: Autocast = nullcontext,
) -> Evaluation:
    """Loss over a whole token stream; its first token is context only.
    `batch_nats` holds one mean per window.

    All windows have the same length, so the batch size changes the result only by the rounding of
    float32 matrix products (1e-6 relative). Raises DataError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise DataError(
            "the text has no token to score",
            value=f"{len(ids)} token(s)",
            next_step="give a longer text",
        )
    rows = windows(ids, seq_len=seq_len, stride=stride, pad_id=pad_id)
    sums: list[tuple[float, int]] = []
    with evaluating(model):
        for start, stop in pairwise([*range(0, len(rows.labels), batch_size), len(rows.labels)]):
            part = Window(rows.input_ids[start:stop].to(device), rows.labels[start:stop].to(device))
            with autocast():
                logits_BTV = model(part.input_ids)
            nats_B = token_nats(logits_BTV, part.labels).sum(1)
            sums += zip(nats_B.tolist(), (part.labels != IGNORE_INDEX).sum(1).tolist())
    return _combine(sums, label_bytes(rows.labels, token_bytes))


def evaluate_text(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> TextEvaluation:
    """Score texts, joined by end-of-text tokens and beginning with one.
    Every byte the tokenizer keeps is scored exactly once.

    End-of-text tokens between texts count with their nats and 0 bytes; a single text has none.
    Dropped characters are counted, and excluded from numerator and denominator. `stride` (default:
    half of `seq_len`) is the step between windows; the rest of a window is context. Raises
    DataError if the tokenizer keeps no character.
    """
    stride = max(1, seq_len // 2) if stride is None else stride
    encodings = [tokenizer.encode(text) for text in texts]
    ids = [i for e in encodings for i in (tokenizer.eos_id, *e.ids)]
    dropped_chars = sum(e.dropped_chars for e in encodings)
    result = evaluate_tokens(
        model,
        ids,
        tokenizer.token_bytes,
        seq_len=seq_len,
        stride=stride,
        batch_size=batch_size,
        pad_id=tokenizer.eos_id,
        device=device,
    )
    chars, n_bytes = kept_symbols(texts, result, dropped_chars)
    if not n_bytes:
        raise DataError(
            "no character of the text is in the vocabulary",
            value=f"{dropped_chars} dropped",
            next_step="use a byte or bpe tokenizer",
        )
    return TextEvaluation(
        bits_per_byte=bits_per_byte(result.total_nats, n_bytes),
        bits_per_char=bits_per_byte(result.total_nats, chars),
        loss_nats=result.loss_nats,
        total_nats=result.total_nats,
        bytes=n_bytes,
        chars=chars,
        tokens=result.n_tokens,
        dropped_chars=dropped_chars,
        dropped_bytes=sum(len(t.encode()) for t in texts) - result.n_bytes,
        windows=len(result.batch_nats),
        seq_len=seq_len,
        stride=stride,
        window_nats=result.batch_nats,
    )


def kept_symbols(texts: Sequence[str], result: Evaluation, dropped_chars: int) -> tuple[int, int]:
    """Characters and bytes of the scored symbols, without dropped characters."""
    return sum(len(t) for t in texts) - dropped_chars, result.n_bytes

"""Inputs of the gates of the output head and of the loss scale.
R rows (positions), D features, V vocabulary.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stackproof.kernels import cross_entropy
from stackproof.train import losses

CHUNK_ROWS = 8


def head_ingredients(device: torch.device) -> dict[str, Any]:
    """`head_in_chunks(x_RD, head_VD, labels_R)` is the run's head in float32, forward and backward,
    a few rows at a time: it returns (sum of nats, gradient of x, gradient of the head).
    `head_chunk_rows` is how many rows that is.
    """

    def head_in_chunks(
        x_RD: Tensor, head_VD: Tensor, labels_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_1RD, head_VD = (
            t.to(device, copy=True).requires_grad_(True) for t in (x_RD[None], head_VD)
        )
        with _small_chunks(len(head_VD)):
            nats = losses.linear_cross_entropy_sum(x_1RD, head_VD, labels_R[None].to(device))
            nats.backward()
        return nats.detach(), x_1RD.grad[0], head_VD.grad

    return {"head_in_chunks": head_in_chunks, "head_chunk_rows": CHUNK_ROWS}


@contextmanager
def _small_chunks(vocab_size: int) -> Iterator[None]:
    """Both heads that work in chunks take CHUNK_ROWS rows at a time, so that few rows cross
    borders. Nothing else of them changes.
    """
    knobs = [(cross_entropy, "HEAD_CHUNK_BYTES", 4 * vocab_size * CHUNK_ROWS)]
    if (kernel := sys.modules.get("stackproof.kernels.triton.linear_cross_entropy")) is not None:
        knobs.append((kernel, "MIN_CHUNK", CHUNK_ROWS))
    former = [(owner, name, getattr(owner, name)) for owner, name, _ in knobs]
    try:
        for owner, name, value in knobs:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in former:
            setattr(owner, name, value)

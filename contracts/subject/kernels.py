"""The kernels and the precision of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from stackproof.contracts.subject.capability import capability, value

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    import torch
    from torch import Tensor


class Kernels:
    """The kernels and the compiled graph of a run."""

    @capability
    def observe_calls(self, observe: Callable[[str, str, Callable, tuple, Mapping], None]) -> None:
        """Compute the loss of one micro-batch in the run's own precision. Before each call of an
        operation, call `observe` with the operation, its chosen kernel, the function of this,
        and the positional and the keyword arguments.
        """

    @capability
    def head_loss(self, x_RD: Tensor, head_VD: Tensor, labels_R: Tensor) -> Tensor:
        """The sum of nats that the run's head computes from float32, differentiable."""

    @capability
    def small_head_chunks(self, n_rows: int, vocab_size: int) -> AbstractContextManager[None]:
        """Let heads that work in chunks take about `n_rows` rows at a time, with this vocabulary.
        Nothing else of them changes.
        """

    @capability
    def compiled_step(self, i: int) -> tuple[float, Mapping[str, Tensor]]:
        """(loss in nats, gradient by name) of batch `i` (0 or 1) by the compiled graph, in training
        mode.
        """

    @capability
    def eager_step(self, i: int) -> tuple[float, Mapping[str, Tensor]]:
        """The same without compilation, from the same random state."""

    @capability
    def by_torch(self) -> AbstractContextManager[None]:
        """Compute every operation by torch's own kernel, which torch's counter of operations
        counts.
        """


class HalfPrecision:
    """The norm, the choice of experts and the loss of a run in half precision, as it calls them."""

    @value
    def dtype(self) -> torch.dtype:
        """bfloat16 or float16."""

    @capability
    def norm(self, x_BTD: Tensor, gain_D: Tensor) -> Tensor:
        """The declared norm with these gains and biases of 0."""

    @capability
    def route(self, logits_RE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(experts (R, k), weights (R, k), probabilities (R, E))."""

    @capability
    def loss(self, x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of nats."""

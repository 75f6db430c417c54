"""The model of a run, and its mixture of experts.

B batch, T tokens, D d_model, V vocab, R rows (tokens), E experts, L layers, k experts of a token
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from stackproof.contracts.subject.capability import capability, value

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    from torch import Tensor, nn


class NamedParameters(Protocol):
    """Anything that names its parameters as a module does."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


class Model:
    """The model that is trained, before its first update."""

    @value
    def module(self) -> nn.Module:
        """The run's own model. Leave it as it was."""

    @value
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @value
    def max_length(self) -> int:
        """Longest row, tokens; 0 where unknown."""

    @capability
    def logits(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, labels_BT: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) in the model's present mode, on its device or on the CPU; the same
        random numbers in every call. `mask_BT` is an attention mask, 1 for tokens that may be read.
        """

    @property
    def takes_mask(self) -> bool:
        """Whether `logits` takes an attention mask."""
        return False

    @property
    def takes_labels(self) -> bool:
        """Whether `logits` takes labels."""
        return False

    @capability
    def training(self, mode: bool) -> AbstractContextManager[None]:
        """The whole model in training or evaluation mode; everything is put back."""

    def precision(self) -> AbstractContextManager[None]:
        """The run's own compute precision, for `logits` and `packed_logits`: by default that in
        which they compute anyway.
        """
        return nullcontext()

    @capability
    def packed_logits(self, ids_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """As `logits`, of rows that hold several documents; each change of the id along a row
        begins one. Gradients reach the output of `embedding`.
        """

    @capability
    def fresh(self, *, n_layers: int | None = None, min_dropout: float = 0.0) -> nn.Module:
        """Another model of the run at step 0, on its device: with `n_layers` layers (None: all) and
        at least this dropout.
        """

    @value
    def embedding(self) -> nn.Module:
        """The token embedding."""

    @value
    def head_weight(self) -> Tensor:
        """Weight of the output head (V, D)."""

    @value
    def rotary_tables(self) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine (T, J) up to the longest row; None without rotary positions."""

    @value
    def attention_layers(self) -> Sequence[Callable[[Tensor, Tensor | None], Tensor]]:
        """Attention of each layer: (x_BTD, document_ids_BT or None) to (B, T, D)."""


class ExpertFunctions(Protocol):
    """The functions that a mixture of experts is computed by."""

    def route(
        self, logits_RE: Tensor, top_k: int, bias_E: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(experts (R, k), weights (R, k), probabilities (R, E)); `bias_E` is added to the
        probabilities for the choice alone.
        """

    def dispatch(
        self,
        x_RD: Tensor,
        experts_Rk: Tensor,
        weights_Rk: Tensor,
        experts: nn.ModuleList,
        capacity: int | None,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send tokens through their experts and add up what these return: (y (R, D), tokens that
        each expert took (E,), choices dropped).
        """

    def balance(self, probs_RE: Tensor, experts_Rk: Tensor, /) -> Tensor:
        """The balance loss, shape ()."""

    def update_selection_bias(
        self, model: nn.Module, loads_LE: Sequence[Tensor], rate: float, /
    ) -> None:
        """Move the selection biases after an update."""


class Experts:
    """The parts of a mixture of experts."""

    @value
    def functions(self) -> ExpertFunctions:
        """Routing, dispatch and balance, as a module or an object."""

    @capability
    def layer(self) -> nn.Module:
        """A fresh layer of experts (B, T, D) to (B, T, D), with router, experts and
        selection_bias.
        """

    @capability
    def model(self, balance_weight: float) -> nn.Module:
        """A fresh model of the run whose balance loss has this weight, without dropout and without
        a limit of capacity.
        """

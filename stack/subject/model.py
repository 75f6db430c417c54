"""The model of a run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackproof.contracts.model import in_mode
from stackproof.contracts.subject import Model
from stackproof.model.transformer import Transformer
from stackproof.subject.run import RunParts
from stackproof.train.state import declared_autocast


@dataclass(frozen=True)
class RunModel(RunParts, Model):
    """The run's own model, before its first update."""

    module: Transformer

    def fresh(self, *, n_layers: int | None = None, min_dropout: float = 0.0) -> Transformer:
        declared = self.cfg.model
        dropout = max(declared.dropout, min_dropout)
        return self.fresh_model(n_layers=n_layers or declared.n_layers, dropout=dropout)

    @property
    def max_length(self) -> int:
        return self.cfg.model.max_seq_len

    def logits(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, labels_BT: Tensor | None = None
    ) -> Tensor:
        """The model takes neither a mask nor labels."""
        return self._logits(ids_BT)

    def precision(self) -> AbstractContextManager[None]:
        return declared_autocast(self.cfg, self.device)

    def packed_logits(self, ids_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        return self._logits(ids_BT, None, document_ids_BT.to(self.device))

    def _logits(self, ids_BT: Tensor, *more: Tensor | None) -> Tensor:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.module(ids_BT.to(self.device), *more)

    def training(self, mode: bool) -> AbstractContextManager[None]:
        return in_mode(self.module, mode)

    @property
    def embedding(self) -> nn.Module:
        return self.module.embed

    @property
    def head_weight(self) -> Tensor:
        return self.module.head_weight

    @property
    def rotary_tables(self) -> tuple[Tensor, Tensor] | None:
        return self.module.positions.tables(0, self.max_length)

    @property
    def attention_layers(self) -> Sequence[Callable[[Tensor, Tensor | None], Tensor]]:
        return [self._attend(layer.attention) for layer in self.module.layers]

    def _attend(self, attention: nn.Module) -> Callable[[Tensor, Tensor | None], Tensor]:
        def attend(x_BTD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
            ids_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
            return attention(x_BTD, self.module.forward_context(ids_BT, None, document_ids_BT))

        return attend

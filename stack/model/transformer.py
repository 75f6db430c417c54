"""A pre-norm decoder. B batch, T tokens, D d_model, V vocab, S keys, J rotated pairs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackproof.config import AuxiliaryLoss, BiasBalance, MixtureOfExperts, ModelConfig
from stackproof.kernels import dispatch
from stackproof.model import moe
from stackproof.model.dropout import ATTENTION, FEED_FORWARD, Dropout, Places, drawn_rows
from stackproof.model.forward_context import ExpertLoad, ForwardContext, KVCache, Report
from stackproof.model.init import Embedding, Linear
from stackproof.model.variants import (
    make_attention,
    make_feedforward,
    make_gate,
    make_norm,
    make_positions,
)
from stackproof.spec.errors import UsageError


class Block(nn.Module):
    """Attention, then feed-forward, each normalised at its input and added to the residual."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(cfg)
        self.attention = make_attention(cfg, layer)
        self.ffn_norm = make_norm(cfg)
        self.ffn = make_feedforward(cfg, cfg.ffn)
        self.dropout = Dropout(cfg.dropout, layer)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """The residual stream behind both branches, same shape."""
        a_BTD = self.attention(self.attention_norm(x_BTD), context)
        x_BTD = x_BTD + self.dropout(a_BTD, ATTENTION, context.places)
        f_BTD = self.ffn(self.ffn_norm(x_BTD), context)
        return x_BTD + self.dropout(f_BTD, FEED_FORWARD, context.places)


class GatedBlock(Block):
    """A block behind a gate of depth, which decides for which tokens it runs (arXiv:2404.02258)."""

    def __init__(self, cfg: ModelConfig, layer: int, gate: nn.Module):
        super().__init__(cfg, layer)
        self.depth = gate

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """The residual stream behind the gate, same shape."""
        return self.depth(super().forward, x_BTD, context)


def make_block(cfg: ModelConfig, layer: int) -> Block:
    """Block `layer`, counted from 0, behind its gate if there is one."""
    gate = make_gate(cfg, layer)
    return Block(cfg, layer) if gate is None else GatedBlock(cfg, layer, gate)


def run_block(block: nn.Module, x_BTD: Tensor, *context: Any, checkpointed: bool) -> Tensor:
    """`block(x_BTD, *context)`, with activation checkpointing if `checkpointed` and in training.

    Then only the input is kept, and the backward runs the block a second time, with the same
    dropout, which is computed from places, and under the same autocast: gradients are bit-equal.
    Read the report of a block before the backward, which adds to it again. Source:
    arXiv:1604.06174.
    """
    if checkpointed and block.training and torch.is_grad_enabled():
        return checkpoint(block, x_BTD, *context, use_reentrant=False, preserve_rng_state=False)
    return block(x_BTD, *context)


class Transformer(nn.Module):
    """Token ids to next-token logits. A tied head is the embedding itself: one weight, one name."""

    def __init__(self, cfg: ModelConfig, vocab_size: int):
        super().__init__()
        self.cfg, self.vocab_size, self.activation_checkpointing = cfg, vocab_size, False
        self.embed = Embedding(vocab_size, cfg.d_model)
        self.positions = make_positions(cfg)
        self.layers = nn.ModuleList(make_block(cfg, i) for i in range(cfg.n_layers))
        self.final_norm = make_norm(cfg)
        if not cfg.tied_head:
            self.head = Linear(cfg.d_model, vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits: the embedding itself if tied."""
        return self.embed.weight if self.cfg.tied_head else self.head.weight

    @property
    def balance_weight(self) -> float:
        """Factor of the experts' balance term in the loss; 0 without such a term."""
        match self.cfg.ffn:
            case MixtureOfExperts(balance=AuxiliaryLoss(weight=weight)):
                return weight
        return 0.0

    def after_update(self, loads: Sequence[Sequence[ExpertLoad]]) -> None:
        """Update the selection biases, if any, from the loads of all micro-batches of the step."""
        match self.cfg.ffn:
            case MixtureOfExperts(balance=BiasBalance(rate=rate)):
                moe.update_selection_bias(self, moe.totals(loads), rate)

    def forward(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 (float64 for a float64 model).

        With a cache, the ids continue the positions it holds. `document_ids_BT` (B, T) int64 packs
        several documents into a row: each change of the id begins one, and every document is read
        as if it stood alone, from position 0. A negative id marks padding, which no expert reads.
        Source: arXiv:2404.10830.
        Raises UsageError if the positions exceed max_seq_len, if document ids have another shape
        than the input, or if they come with a cache.
        """
        return self.logits(self.hidden_states(input_ids_BT, cache, document_ids_BT)[0])

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        document_ids_BT: Tensor | None = None,
        row_B4: Tensor | None = None,
    ) -> tuple[Tensor, Report]:
        """Normalised hidden states (B, T, D), the input of the head, and the report of the blocks.

        `row_B4`, of `DropoutStream.of_rows`, are the rows that dropout is computed from; without
        them it is drawn from torch's random state. Other arguments and errors as in `forward`.
        """
        context = self.forward_context(input_ids_BT, cache, document_ids_BT, row_B4)
        x_BTD = self.positions.added(self.embed(input_ids_BT), context.position_BT)
        for block in self.layers:
            x_BTD = run_block(block, x_BTD, context, checkpointed=self.activation_checkpointing)
        if cache is not None:
            cache.advance(input_ids_BT.shape[1])
        return self.final_norm(x_BTD), Report(tuple(context.loads), tuple(context.kept_fracs))

    def forward_context(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        document_ids_BT: Tensor | None = None,
        row_B4: Tensor | None = None,
    ) -> ForwardContext:
        """Positions of the tokens, the masks that keep documents apart, and the places that dropout
        is computed from, for all blocks.
        """
        start = 0 if cache is None else cache.length
        stop, device = start + input_ids_BT.shape[1], input_ids_BT.device
        if stop > self.cfg.max_seq_len:
            raise UsageError(
                "the input exceeds the context",
                value=f"{stop} tokens",
                allowed=f"max_seq_len = {self.cfg.max_seq_len}",
            )
        window, index_1T = self.cfg.attention.window, torch.arange(start, stop, device=device)[None]
        places = self._places(index_1T, len(input_ids_BT), row_B4)
        if document_ids_BT is None:
            narrow = window is not None and stop > window and dispatch.takes_masks(device)
            mask = dispatch.window_mask(start, stop, window, device) if narrow else None
            tables = self.positions.tables(start, stop)
            sizes = window, tables, stop - start
            return ForwardContext(index_1T, None, mask, *sizes, cache=cache, places=places)
        _refuse_unfit(input_ids_BT, cache, document_ids_BT)
        start_BT = document_starts(document_ids_BT)
        first_BT = start_BT if window is None else start_BT.maximum(index_1T - window + 1)
        position_BT = index_1T - start_BT
        mask = dispatch.document_mask(first_BT) if dispatch.takes_masks(device) else None
        tables = self.positions.at(position_BT)
        sizes = window, tables, stop - start, document_ids_BT >= 0
        return ForwardContext(position_BT, start_BT, mask, *sizes, places=places)

    def _places(self, index_1T: Tensor, n_rows: int, row_B4: Tensor | None) -> Places | None:
        """What dropout is computed from; None if no block drops anything."""
        if not any(block.dropout.active for block in self.layers):
            return None
        return Places(drawn_rows(n_rows, index_1T.device) if row_B4 is None else row_B4, index_1T)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Output head on normalised hidden states, (B, T, V), float32 or wider."""
        tied = self.cfg.tied_head
        logits_BTV = dispatch.linear(x_BTD, self.embed.weight) if tied else self.head(x_BTD)
        return logits_BTV if logits_BTV.dtype.itemsize >= 4 else logits_BTV.float()


def _refuse_unfit(input_ids_BT: Tensor, cache: KVCache | None, document_ids_BT: Tensor) -> None:
    if cache is not None:
        raise UsageError(
            "a cache continues one document per row",
            value="cache and document_ids",
            next_step="generate without document_ids",
        )
    if document_ids_BT.shape != input_ids_BT.shape:
        raise UsageError(
            "document_ids do not fit the input",
            value=f"shape {tuple(document_ids_BT.shape)}",
            allowed=f"{tuple(input_ids_BT.shape)}",
        )


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Index of the first token of each token's document, (B, T) int64.

    Each change of the id along a row begins a document.
    """
    index_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    changes_BT = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    begins_BT = F.pad(changes_BT, (1, 0), value=True)
    return (index_T * begins_BT).cummax(1).values

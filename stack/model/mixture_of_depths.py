"""Mixture of depths: which tokens a block changes, and by how much.

B batch, T tokens, D d_model, R tokens that a block reads, S keys
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.config import ModelConfig
from stackproof.model.forward_context import ForwardContext
from stackproof.model.init import Linear

Branches = Callable[[Tensor, ForwardContext], Tensor]  # a block without its gate
NEVER = torch.iinfo(torch.int64).max


class SoftGate(nn.Module):
    """x + σ(w·x + b)·(block(x) − x), token by token."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.router = Linear(cfg.d_model, 1, bias=True)

    def forward(self, block: Branches, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        return x_BTD + self.router(x_BTD).sigmoid() * (block(x_BTD, context) - x_BTD)


class HardCapacity(nn.Module):
    """The block reads a token if its score w·x + b is among the highest share so far.

    Scores of earlier tokens of the same document count; other tokens skip the block. Read tokens
    attend among themselves. No token depends on a later one, so training and generation choose
    alike; the paper chooses the best of a whole row, which depends on later tokens.
    Source of the idea: arXiv:2404.02258.
    """

    def __init__(self, cfg: ModelConfig, layer: int, capacity_frac: float):
        super().__init__()
        self.layer, self.capacity_frac = layer, capacity_frac
        self.router = Linear(cfg.d_model, 1, bias=True)

    def forward(self, block: Branches, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        score_BT = self.router(x_BTD)[..., 0]
        read_BT = self.chosen(self.rank(x_BTD), context)
        context.kept_fracs.append(read_BT.double().mean())
        n_read = int(read_BT.sum(1).max())
        if n_read == 0:
            return x_BTD
        # tokens that are read, in order, then padding that is masked out
        index_BR = (~read_BT).sort(dim=1, stable=True).indices[:, :n_read]
        inside_BR = read_BT.gather(1, index_BR)
        at_BRD = index_BR[..., None].expand(-1, -1, x_BTD.shape[-1])
        x_BRD = x_BTD.gather(1, at_BRD)
        changed_BRD = block(x_BRD, self.among_read(index_BR, inside_BR, context))
        gate_BR1 = score_BT.gather(1, index_BR).sigmoid()[..., None]
        y_BRD = torch.where(inside_BR[..., None], x_BRD + gate_BR1 * (changed_BRD - x_BRD), x_BRD)
        return x_BTD.scatter(1, at_BRD, y_BRD)

    @torch.no_grad()
    def rank(self, x_BTD: Tensor) -> Tensor:
        """Scores to compare, (B, T) float32.

        Summed in float64, so that equal tokens score alike in any shape of batch.
        """
        weight_1D, bias = self.router.weight.double(), self.router.bias.double()
        return F.linear(x_BTD.double(), weight_1D, bias)[..., 0].float()

    def chosen(self, score_BT: Tensor, context: ForwardContext) -> Tensor:
        """Which of these tokens the block reads, (B, T) bool."""
        n_new = score_BT.shape[1]
        if context.cache is not None:
            cache = context.cache.layers[self.layer]
            score_BT = cache.score_BT = (
                score_BT if cache.score_BT is None else torch.cat((cache.score_BT, score_BT), 1)
            )
        index_S = torch.arange(score_BT.shape[1], device=score_BT.device)
        earlier_BTS = index_S < index_S[-n_new:, None]
        if context.start_BT is not None:
            earlier_BTS = earlier_BTS & (index_S >= context.start_BT[:, :, None])
        n_higher_BT = ((score_BT[:, None, :] > score_BT[:, -n_new:, None]) & earlier_BTS).sum(-1)
        return n_higher_BT < (self.capacity_frac * (context.position_BT.double() + 1)).ceil()

    def among_read(
        self, index_BR: Tensor, inside_BR: Tensor, context: ForwardContext
    ) -> ForwardContext:
        """The context of the tokens that are read; their keys are those read so far."""
        position_BT = context.position_BT.expand(len(index_BR), -1)
        position_BR = position_BT.gather(1, index_BR)
        place_BT = position_BT if context.start_BT is None else position_BT + context.start_BT
        query_BR = place_BT.gather(1, index_BR)
        key_BS = query_BR.where(inside_BR, NEVER)
        if context.cache is not None:
            cache = context.cache.layers[self.layer]
            key_BS = cache.position_BS = (
                key_BS if cache.position_BS is None else torch.cat((cache.position_BS, key_BS), 1)
            )
        first_BR = query_BR - position_BR
        if context.window is not None:
            first_BR = first_BR.maximum(query_BR - context.window + 1)
        mask_BRS = (key_BS[:, None] <= query_BR[..., None]) & (
            key_BS[:, None] >= first_BR[..., None]
        )
        rotary = (
            None if context.rotary is None else tuple(_rows(t, index_BR) for t in context.rotary)
        )
        if context.inside_BT is not None:
            inside_BR = inside_BR & context.inside_BT.gather(1, index_BR)
        return replace(
            context,
            position_BT=position_BR,
            mask_B1TS=mask_BRS[:, None],
            rotary=rotary,
            inside_BT=inside_BR,
            places=context.places and context.places.at(index_BR),
        )


def _rows(table: Tensor, index_BR: Tensor) -> Tensor:
    """Rows of a rotary table, (T, J) or (B, 1, T, J), at each read token: (B, 1, R, J)."""
    if table.ndim == 2:
        return table[index_BR][:, None]
    return table.gather(2, index_BR[:, None, :, None].expand(-1, -1, -1, table.shape[-1]))

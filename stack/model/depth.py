"""Which tokens a block changes, and by how much.
B batch, T tokens, D d_model, R tokens a block reads, S keys.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.config import ModelConfig
from stackproof.model.init import Linear
from stackproof.model.reading import Reading

Residual = Callable[[Tensor, Reading], Tensor]
NEVER = torch.iinfo(torch.int64).max


class EveryToken(nn.Module):
    """A plain block."""

    def forward(self, block: Residual, x_BTD: Tensor, reading: Reading) -> Tensor:
        return block(x_BTD, reading)


class SoftGate(nn.Module):
    """x + σ(w·x + b)·(block(x) − x), token by token."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.router = Linear(cfg.d_model, 1, bias=True)

    def forward(self, block: Residual, x_BTD: Tensor, reading: Reading) -> Tensor:
        return x_BTD + self.router(x_BTD).sigmoid() * (block(x_BTD, reading) - x_BTD)


class HardCapacity(nn.Module):
    """The block reads tokens whose score w·x + b is among the highest share of those so far in
    their document; others pass by.

    Read tokens attend among themselves. No token depends on a later one, so training and generation
    choose alike; choosing the best of a whole row instead, as the paper does, lets a token's fate
    depend on what follows it. Source of the idea: arXiv:2404.02258.
    """

    def __init__(self, cfg: ModelConfig, layer: int, capacity_frac: float):
        super().__init__()
        self.layer, self.capacity_frac = layer, capacity_frac
        self.router = Linear(cfg.d_model, 1, bias=True)

    def forward(self, block: Residual, x_BTD: Tensor, reading: Reading) -> Tensor:
        score_BT = self.router(x_BTD)[..., 0]
        read_BT = self.chosen(self.rank(x_BTD), reading)
        reading.kept_fracs.append(read_BT.double().mean())
        n_read = int(read_BT.sum(1).max())
        if n_read == 0:
            return x_BTD
        # the read ones in order, then fillers that nobody sees
        index_BR = (~read_BT).sort(dim=1, stable=True).indices[:, :n_read]
        inside_BR = read_BT.gather(1, index_BR)
        at_BRD = index_BR[..., None].expand(-1, -1, x_BTD.shape[-1])
        x_BRD = x_BTD.gather(1, at_BRD)
        changed_BRD = block(x_BRD, self.among_read(index_BR, inside_BR, reading))
        gate_BR1 = score_BT.gather(1, index_BR).sigmoid()[..., None]
        y_BRD = torch.where(inside_BR[..., None], x_BRD + gate_BR1 * (changed_BRD - x_BRD), x_BRD)
        return x_BTD.scatter(1, at_BRD, y_BRD)

    @torch.no_grad()
    def rank(self, x_BTD: Tensor) -> Tensor:
        """Scores to compare, (B, T) float32: summed in float64, so that equal tokens score
        alike in any shape of batch.
        """
        return F.linear(x_BTD.double(), self.router.weight.double(), self.router.bias.double())[
            ..., 0
        ].float()

    def chosen(self, score_BT: Tensor, reading: Reading) -> Tensor:
        """Which of these tokens the block reads, (B, T) bool."""
        n_new = score_BT.shape[1]
        if reading.cache is not None:
            cache = reading.cache.layers[self.layer]
            score_BT = cache.score_BT = (
                score_BT if cache.score_BT is None else torch.cat((cache.score_BT, score_BT), 1)
            )
        index_S = torch.arange(score_BT.shape[1], device=score_BT.device)
        earlier_BTS = index_S < index_S[-n_new:, None]
        if reading.start_BT is not None:
            earlier_BTS = earlier_BTS & (index_S >= reading.start_BT[:, :, None])
        n_higher_BT = ((score_BT[:, None, :] > score_BT[:, -n_new:, None]) & earlier_BTS).sum(-1)
        return n_higher_BT < (self.capacity_frac * (reading.position_BT.double() + 1)).ceil()

    def among_read(self, index_BR: Tensor, inside_BR: Tensor, reading: Reading) -> Reading:
        """The places of the read tokens: their own positions, and as keys
        only what the block has read.
        """
        position_BT = reading.position_BT.expand(len(index_BR), -1)
        position_BR = position_BT.gather(1, index_BR)
        place_BT = position_BT if reading.start_BT is None else position_BT + reading.start_BT
        query_BR = place_BT.gather(1, index_BR)
        key_BS = query_BR.where(inside_BR, NEVER)
        if reading.cache is not None:
            cache = reading.cache.layers[self.layer]
            key_BS = cache.position_BS = (
                key_BS if cache.position_BS is None else torch.cat((cache.position_BS, key_BS), 1)
            )
        first_BR = query_BR - position_BR
        if reading.window is not None:
            first_BR = first_BR.maximum(query_BR - reading.window + 1)
        mask_BRS = (key_BS[:, None] <= query_BR[..., None]) & (
            key_BS[:, None] >= first_BR[..., None]
        )
        rotary = (
            None if reading.rotary is None else tuple(_rows(t, index_BR) for t in reading.rotary)
        )
        return replace(
            reading,
            position_BT=position_BR,
            mask_B1TS=mask_BRS[:, None],
            rotary=rotary,
            inside_BT=inside_BR,
        )


def _rows(table: Tensor, index_BR: Tensor) -> Tensor:
    """Rows of a rotary table, (T, J) or (B, 1, T, J), at each read token: (B, 1, R, J)."""
    if table.ndim == 2:
        return table[index_BR][:, None]
    return table.gather(2, index_BR[:, None, :, None].expand(-1, -1, -1, table.shape[-1]))

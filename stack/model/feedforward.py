"""Gated feed-forward. B batch, T tokens, D d_model, F d_ff."""

import torch.nn.functional as F
from torch import Tensor, nn

from stack.config import ModelConfig
from stack.model.init import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases. Source: GLU Variants Improve Transformer, arXiv:2002.05202."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up = Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape and dtype as `x_BTD`."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))

"""Dense feed-forwards. B batch, T tokens, D d_model, F d_ff."""

import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.config import Gelu, ModelConfig
from stackproof.kernels import dispatch
from stackproof.model.forward_context import ForwardContext
from stackproof.model.init import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases. Source: arXiv:2002.05202."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up = Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x_BTD: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Same shape and dtype as `x_BTD`."""
        return self.down(dispatch.swiglu(self.gate(x_BTD), self.up(x_BTD)))


class GeluMLP(nn.Module):
    """down(gelu(up(x))). Source: arXiv:1606.08415."""

    def __init__(self, cfg: ModelConfig, gelu: Gelu):
        super().__init__()
        self.approximate = gelu.approximate
        self.up = Linear(cfg.d_model, cfg.d_ff, bias=gelu.bias)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=gelu.bias)

    def forward(self, x_BTD: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Same shape and dtype as `x_BTD`."""
        return self.down(F.gelu(self.up(x_BTD), approximate=self.approximate))

"""Normalisation of features. B batch, T tokens, D features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.kernels import dispatch
from stackproof.model.init import empty_parameter


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis. Source: arXiv:1910.07467.

    Statistics in float32, or float64 for float64 input. Returns shape and dtype of the input.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return dispatch.rms_norm(x_BTD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + eps) · weight + bias over the last axis. Source: arXiv:1607.06450.

    Statistics as in RMSNorm.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = empty_parameter(width), empty_parameter(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
        weight, bias = (p.to(wide.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(wide, (x_BTD.shape[-1],), weight, bias, self.eps).to(x_BTD.dtype)

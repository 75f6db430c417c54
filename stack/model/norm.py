"""Root-mean-square normalisation. B batch, T tokens, D features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis. Statistics in float32, or float64 for float64 input.

    Returns shape and dtype of the input. Source: arXiv:1910.07467.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
        return F.rms_norm(wide, (x_BTD.shape[-1],), self.weight.to(wide.dtype), self.eps).to(x_BTD.dtype)

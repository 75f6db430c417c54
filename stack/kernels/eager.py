"""Element-wise operations in plain torch, with derivatives written out so that few passes over memory are left.

B batch, T tokens, N heads, D features, F inner features, H width that is rotated, J = H/2
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis; statistics in float32, or float64 for float64 input; dtype of the input."""
    wide = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
    return F.rms_norm(wide, (x_BTD.shape[-1],), weight_D.to(wide.dtype), eps).to(x_BTD.dtype)


def rope(x_BNTH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Turn each pair (feature j, feature j + J) by its angle; float32 or wider inside, dtype of the input outside."""
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat((a * cos_TJ - b * sin_TJ, b * cos_TJ + a * sin_TJ), dim=-1).to(x_BNTH.dtype)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate)·up."""
    return F.silu(gate_BTF) * up_BTF

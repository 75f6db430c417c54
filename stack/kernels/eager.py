"""Torch's own way for every operation but attention, with the arguments of the Triton kernels.

B batch, N heads, T tokens, D d_model, F d_ff, H head_dim, J = H/2, R rows (positions), V vocabulary
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spec.errors import UsageError


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float, residual_BTD: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight over the last axis; with a residual, that of x + residual, and this sum as a second result.

    Statistics in float32, or float64 for float64 input; results in the dtype of what is normalised.
    """
    total_BTD = x_BTD if residual_BTD is None else x_BTD + residual_BTD
    wide = total_BTD if total_BTD.dtype == torch.float64 else total_BTD.float()
    y_BTD = F.rms_norm(wide, (x_BTD.shape[-1],), weight_D.to(wide.dtype), eps).to(total_BTD.dtype)
    return y_BTD if residual_BTD is None else (y_BTD, total_BTD)


def rope(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (feature j, feature j + H/2) by tables (T, J) or (B, 1, T, J), in float32 or wider; dtype of the input."""
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BNTH.dtype)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate)·up, element by element."""
    return F.silu(gate_BTF) * up_BTF


def linear_cross_entropy(
    x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignore_index: int = -100, softcap: float | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum of −log p(label) in nats, and z_loss · the sum of log normalisers squared, over labels that are not `ignore_index`; float32, ().

    Holds all logits, in float32.
    """
    logits_RV = F.linear(x_RD, weight_VD)
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    if softcap is not None:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    nats = F.cross_entropy(logits_RV, labels_R, ignore_index=ignore_index, reduction="sum")
    if z_loss == 0:
        return nats, torch.zeros_like(nats)
    return nats, z_loss * (logits_RV.logsumexp(-1).square() * (labels_R != ignore_index)).sum()


def library_linear_cross_entropy(
    x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignore_index: int = -100, softcap: float | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same through `torch.nn.functional.linear_cross_entropy` in chunks (torch 2.13 on), which knows neither softcap nor z-loss."""
    if softcap is not None or z_loss:
        got = f"softcap {softcap}, z_loss {z_loss}"
        raise UsageError("linear_cross_entropy: torch's chunked one has neither", value=got, next_step='choose "torch" or "triton"')
    options = torch.nn.LinearCrossEntropyOptions()
    nats = F.linear_cross_entropy(x_RD, weight_VD, labels_R, reduction="sum", ignore_index=ignore_index, options=options).float()
    return nats, torch.zeros_like(nats)


def clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale `gradients` in place by max_norm / (norm + 1e-6) if that is below 1 and the norm is finite; return their norm, shape ()."""
    if not max_norm > 0:
        raise UsageError("clip: max_norm", value=max_norm, allowed="above 0")
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, torch.where(norm.isfinite(), factor, 1.0))
    return norm


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """p -= lr·(m̂/(√v̂ + eps) + weight_decay·p) in place, by passes over lists of tensors; `step` counts from 1."""
    beta1, beta2 = betas
    torch._foreach_lerp_(first_moments, gradients, 1 - beta1)
    torch._foreach_mul_(second_moments, beta2)
    torch._foreach_addcmul_(second_moments, gradients, gradients, 1 - beta2)
    roots = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(roots, math.sqrt(1 - beta2**step))
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(parameters, first_moments, roots, -lr / (1 - beta1**step))


def why_no_library_linear_cross_entropy() -> str:
    """Empty where torch has the chunked linear cross-entropy."""
    return "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} has no chunked linear_cross_entropy"

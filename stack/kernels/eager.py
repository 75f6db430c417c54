"""Operations in plain torch, element-wise ones with derivatives written out so that few passes over
memory and few saved tensors are left.

A compiler that traces them gets the bare formula instead: it fuses passes itself. Without a
gradient the forward is called without a node for the backward, which costs as much as its
arithmetic on one token.

B batch, T tokens, N heads, D features, F inner features, H width that is rotated, J = H/2
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackproof.spec.errors import UsageError

linear = F.linear


def rms_norm(
    x_BTD: Tensor, weight_D: Tensor, eps: float, residual_BTD: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight over the last axis; with a residual, that of x + residual, and
    this sum as a second result.

    Statistics in float32, or float64 for float64 input; results in the dtype of what is normalised.
    """
    if residual_BTD is not None:
        total_BTD = x_BTD + residual_BTD
        return rms_norm(total_BTD, weight_D, eps), total_BTD
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return F.rms_norm(x_BTD.to(wide), weight_D.shape, weight_D.to(wide), eps).to(x_BTD.dtype)
    if not torch.is_grad_enabled():
        return _normalised(x_BTD.to(wide), weight_D.to(wide), eps)[0].to(x_BTD.dtype)
    return _RMSNorm.apply(x_BTD.to(wide), weight_D.to(wide), eps).to(x_BTD.dtype)


def _normalised(x_BTD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and the root of the mean square, (B, T, 1)."""
    rms_BT1 = (
        torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)
        .square_()
        .div_(x_BTD.shape[-1])
        .add_(eps)
        .sqrt_()
    )
    return (x_BTD / rms_BT1).mul_(weight_D), rms_BT1


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y_BTD, rms_BT1 = _normalised(x_BTD, weight_D, eps)
        ctx.save_for_backward(x_BTD, weight_D, rms_BT1)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_BTD, weight_D, rms_BT1 = ctx.saved_tensors
        unit_BTD = x_BTD / rms_BT1
        scaled_BTD = grad_BTD * weight_D
        along_BT1 = torch.linalg.vecdot(scaled_BTD, unit_BTD).unsqueeze(-1).div_(x_BTD.shape[-1])
        grad_x_BTD = scaled_BTD.addcmul_(unit_BTD, along_BT1, value=-1).div_(rms_BT1)
        grad_weight_D = unit_BTD.mul_(grad_BTD).flatten(0, -2).sum(0)
        return grad_x_BTD, grad_weight_D, None


def rope(x_BNTH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Turn each pair (feature j, feature j + J) by its angle; float32 or wider inside,
    dtype of the input outside.
    """
    wide = torch.promote_types(x_BNTH.dtype, torch.float32)
    if torch.compiler.is_compiling():
        a, b = x_BNTH.to(wide).chunk(2, -1)
        return torch.cat((a * cos_TJ - b * sin_TJ, b * cos_TJ + a * sin_TJ), -1).to(x_BNTH.dtype)
    if not torch.is_grad_enabled():
        return _turn(x_BNTH.to(wide), cos_TJ.to(wide), sin_TJ.to(wide), 1).to(x_BNTH.dtype)
    return _Rope.apply(x_BNTH.to(wide), cos_TJ.to(wide), sin_TJ.to(wide)).to(x_BNTH.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BNTH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TJ, sin_TJ)
        return _turn(x_BNTH, cos_TJ, sin_TJ, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNTH: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad_BNTH, *ctx.saved_tensors, -1), None, None


def _turn(x_BNTH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, direction: int) -> Tensor:
    """Rotate forwards (1) or back (−1) into fresh memory of the same layout."""
    y_BNTH = torch.empty_like(x_BNTH)
    (a, b), (c, d) = x_BNTH.chunk(2, -1), y_BNTH.chunk(2, -1)
    torch.mul(a, cos_TJ, out=c).addcmul_(b, sin_TJ, value=-direction)
    torch.mul(b, cos_TJ, out=d).addcmul_(a, sin_TJ, value=direction)
    return y_BNTH


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate)·up; only its two inputs are kept for the backward."""
    if torch.compiler.is_compiling():
        return F.silu(gate_BTF) * up_BTF
    if not torch.is_grad_enabled():
        return F.silu(gate_BTF).mul_(up_BTF)
    return _SwiGLU.apply(gate_BTF, up_BTF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BTF, up_BTF)
        return F.silu(gate_BTF).mul_(up_BTF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTF: Tensor) -> tuple[Tensor, Tensor]:
        gate_BTF, up_BTF = ctx.saved_tensors
        grad_up_BTF = F.silu(gate_BTF).mul_(grad_BTF)
        return torch.ops.aten.silu_backward(grad_BTF * up_BTF, gate_BTF), grad_up_BTF


def library_linear_cross_entropy(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same through `torch.nn.functional.linear_cross_entropy` in chunks (torch 2.13 on), which
    has neither softcap nor z-loss.
    """
    if softcap is not None or z_loss:
        got = f"softcap {softcap}, z_loss {z_loss}"
        raise UsageError(
            "linear_cross_entropy: torch's chunked one has neither",
            value=got,
            next_step='choose "torch" or "triton"',
        )
    options = torch.nn.LinearCrossEntropyOptions()
    nats = F.linear_cross_entropy(
        x_RD, weight_VD, labels_R, reduction="sum", ignore_index=ignore_index, options=options
    ).float()
    return nats, torch.zeros_like(nats)


def why_no_library_linear_cross_entropy() -> str:
    """Empty where torch has the chunked linear cross-entropy."""
    return (
        ""
        if hasattr(torch.nn, "LinearCrossEntropyOptions")
        else f"torch {torch.__version__} has no chunked linear_cross_entropy"
    )

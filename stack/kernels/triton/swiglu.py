"""silu(gate)·up in one pass: Triton, forward and backward.
The backward computes silu again; only the inputs are saved for it.

B batch, T tokens, F d_ff, R = B·T rows; in kernels E features of a block
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackproof.kernels.triton import launch
from stackproof.spec.errors import UsageError

BLOCK = 1024


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """gate·sigmoid(gate)·up, element by element, computed in float32; shape and dtype of the input,
    any strides.

    Raises UsageError if shapes or dtypes differ. Source: arXiv:2002.05202.
    Oracle: `stackproof.contracts.kernel_reference.swiglu`.
    """
    launch.require("swiglu", {"gate": gate_BTF, "up": up_BTF})
    if gate_BTF.shape != up_BTF.shape or gate_BTF.dtype != up_BTF.dtype:
        got = (
            f"gate {tuple(gate_BTF.shape)} {gate_BTF.dtype}, up {tuple(up_BTF.shape)} "
            f"{up_BTF.dtype}"
        )
        raise UsageError(
            "swiglu: gate and up do not fit", value=got, allowed="one shape and one dtype"
        )
    return SwiGLU.apply(gate_BTF, up_BTF)


class SwiGLU(torch.autograd.Function):
    """The kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx, gate_BTF, up_BTF):
        ctx.save_for_backward(gate_BTF, up_BTF)
        gate_RF, up_RF = rows(gate_BTF, up_BTF)
        out_RF = torch.empty_like(gate_RF, memory_format=torch.contiguous_format)
        strides = (gate_RF.stride(), up_RF.stride())
        launch.run(forward, grid(out_RF), gate_RF, up_RF, out_RF, *strides, out_RF.shape[1], BLOCK)
        return out_RF.view(gate_BTF.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTF):
        gate_RF, up_RF, grad_RF = rows(*ctx.saved_tensors, grad_BTF)
        dgate_RF, dup_RF = (
            torch.empty_like(gate_RF, memory_format=torch.contiguous_format) for _ in range(2)
        )
        tensors = (gate_RF, up_RF, grad_RF, dgate_RF, dup_RF)
        strides = (gate_RF.stride(), up_RF.stride(), grad_RF.stride())
        launch.run(backward, grid(grad_RF), *tensors, *strides, grad_RF.shape[1], BLOCK)
        return dgate_RF.view(grad_BTF.shape), dup_RF.view(grad_BTF.shape)


def rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All as matrices of one shape: rows of one block where all are contiguous, else rows of F,
    copied where strides allow no view.
    """
    flat = tensors[0].numel() % BLOCK == 0 and all(x.is_contiguous() for x in tensors)
    return tuple(x.view(-1, BLOCK) if flat else x.reshape(-1, x.shape[-1]) for x in tensors)


def grid(x_RF: Tensor) -> tuple[int, int]:
    return len(x_RF), triton.cdiv(x_RF.shape[1], BLOCK)


# ---- kernels


@triton.jit
def forward(gate, up, out, gate_stride, up_stride, F, E: tl.constexpr):
    """One block of one row."""
    r, e_E = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1) * E + tl.arange(0, E)
    gate_E = tl.load(gate + r * gate_stride[0] + e_E * gate_stride[1], mask=e_E < F, other=0.0).to(
        tl.float32
    )
    up_E = tl.load(up + r * up_stride[0] + e_E * up_stride[1], mask=e_E < F, other=0.0).to(
        tl.float32
    )
    tl.store(
        out + r * F + e_E,
        (gate_E * tl.sigmoid(gate_E) * up_E).to(out.dtype.element_ty),
        mask=e_E < F,
    )


@triton.jit
def backward(gate, up, grad, dgate, dup, gate_stride, up_stride, grad_stride, F, E: tl.constexpr):
    """One block of one row."""
    r, e_E = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1) * E + tl.arange(0, E)
    gate_E = tl.load(gate + r * gate_stride[0] + e_E * gate_stride[1], mask=e_E < F, other=0.0).to(
        tl.float32
    )
    up_E = tl.load(up + r * up_stride[0] + e_E * up_stride[1], mask=e_E < F, other=0.0).to(
        tl.float32
    )
    grad_E = tl.load(grad + r * grad_stride[0] + e_E * grad_stride[1], mask=e_E < F, other=0.0).to(
        tl.float32
    )
    on_E = tl.sigmoid(gate_E)
    silu_E = gate_E * on_E
    tl.store(dup + r * F + e_E, (grad_E * silu_E).to(dup.dtype.element_ty), mask=e_E < F)
    slope_E = on_E + silu_E * (1.0 - on_E)
    tl.store(
        dgate + r * F + e_E, (grad_E * up_E * slope_E).to(dgate.dtype.element_ty), mask=e_E < F
    )

"""Root-mean-square normalisation, with the residual sum before it if there is one: Triton,
forward and backward.

B batch, T tokens, D features, R = B·T rows; in kernels M rows of a tile,
E features padded to a power of two, P programs
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackproof.kernels.triton import launch
from stackproof.spec.errors import UsageError

MAX_FEATURES = 65536
TILE_NUMBERS = 4096


def rms_norm(
    x_BTD: Tensor, weight_D: Tensor, eps: float, residual_BTD: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight over the last axis; with a residual, that of x + residual, and
    this sum as a second result.

    Statistics and products in float32. Any leading shape and strides; the sum and the result have
    the dtype that x + residual has. Raises UsageError for shapes or dtypes that do not fit. Oracle:
    `stackproof.contracts.kernel_reference.rms_norm`. Source: arXiv:1910.07467.
    """
    launch.require("rms_norm", {"x": x_BTD, "weight": weight_D, "residual": residual_BTD})
    D = x_BTD.shape[-1]
    if weight_D.shape != (D,) or (residual_BTD is not None and residual_BTD.shape != x_BTD.shape):
        got = f"x {tuple(x_BTD.shape)}, weight {tuple(weight_D.shape)}" + (
            "" if residual_BTD is None else f", residual {tuple(residual_BTD.shape)}"
        )
        raise UsageError(
            "rms_norm: shapes do not fit",
            value=got,
            allowed="weight (D,), residual of the shape of x",
        )
    if not 0 < D <= MAX_FEATURES:
        raise UsageError(
            "rms_norm: features",
            value=D,
            allowed=f"1 to {MAX_FEATURES}",
            next_step='train.kernels.rms_norm = "torch"',
        )
    y_BTD, total_BTD = RMSNorm.apply(x_BTD, weight_D, eps, residual_BTD)
    return y_BTD if residual_BTD is None else (y_BTD, total_BTD)


class RMSNorm(torch.autograd.Function):
    """The kernels as one differentiable operation; saves what was normalised,
    the weight and one float32 per row.
    """

    @staticmethod
    def forward(ctx, x_BTD, weight_D, eps, residual_BTD):
        D = x_BTD.shape[-1]
        x_RD = x_BTD.reshape(-1, D)
        residual_RD = None if residual_BTD is None else residual_BTD.reshape(-1, D)
        dtype = x_RD.dtype if residual_RD is None else torch.result_type(x_RD, residual_RD)
        y_RD = torch.empty_like(x_RD, dtype=dtype, memory_format=torch.contiguous_format)
        total_RD = None if residual_RD is None else torch.empty_like(y_RD)
        rstd_R = torch.empty(len(x_RD), dtype=torch.float32, device=x_RD.device)
        M, E, warps = tile(D)
        launch.run(
            forward,
            (triton.cdiv(len(x_RD), M),),
            *(x_RD, residual_RD, weight_D, y_RD, total_RD, rstd_R),
            *(
                x_RD.stride(),
                launch.strides(residual_RD),
                weight_D.stride(0),
                len(x_RD),
                D,
                eps,
                M,
                E,
            ),
            num_warps=warps,
        )
        ctx.save_for_backward(x_RD if total_RD is None else total_RD, weight_D, rstd_R)
        ctx.dtypes = (x_BTD.dtype, None if residual_BTD is None else residual_BTD.dtype)
        return y_RD.view(x_BTD.shape), None if total_RD is None else total_RD.view(x_BTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y_BTD, grad_total_BTD):
        x_RD, weight_D, rstd_R = ctx.saved_tensors
        R, D = x_RD.shape
        x_dtype, residual_dtype = ctx.dtypes
        grad_y_RD = grad_y_BTD.reshape(R, D)
        grad_total_RD = None if residual_dtype is None else grad_total_BTD.reshape(R, D)
        dx_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
        M, E, warps = tile(D)
        P = min(triton.cdiv(R, M), programs(x_RD.device))
        partial_PD = torch.empty(P, D, dtype=torch.float32, device=x_RD.device)
        launch.run(
            backward,
            (P,),
            *(x_RD, weight_D, rstd_R, grad_y_RD, grad_total_RD, dx_RD, partial_PD),
            *(x_RD.stride(), weight_D.stride(0), grad_y_RD.stride(), launch.strides(grad_total_RD)),
            *(R, D, M, E),
            num_warps=warps,
        )
        dx_BTD = dx_RD.view(grad_y_BTD.shape)
        d_residual_BTD = None if residual_dtype is None else dx_BTD.to(residual_dtype)
        return dx_BTD.to(x_dtype), partial_PD.sum(0).to(weight_D.dtype), None, d_residual_BTD


def tile(D: int) -> tuple[int, int, int]:
    """Rows and padded features of a tile, and the warps that share it."""
    E = triton.next_power_of_2(D)
    M = max(1, TILE_NUMBERS // E)
    return M, E, min(16, max(4, M * E // 1024))


def programs(device: torch.device) -> int:
    """How many programs share the rows of a backward: a few per multiprocessor, each with one
    partial sum of the weight's gradient.
    """
    return (
        4 * torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


# ---- kernels


@triton.jit
def forward(
    x, residual, weight, y, total, rstd, x_stride, residual_stride, weight_stride, R, D, eps,
    M: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One tile of rows."""
    e_E = tl.arange(0, E)
    r_M = tl.cast(tl.program_id(0), tl.int64) * M + tl.arange(0, M)
    inside_ME = (r_M < R)[:, None] & (e_E < D)[None, :]
    at_ME = r_M[:, None] * D + e_E[None, :]
    x_ME = tl.load(
        x + r_M[:, None] * x_stride[0] + e_E[None, :] * x_stride[1], mask=inside_ME, other=0.0
    ).to(tl.float32)
    if residual is not None:
        x_ME += tl.load(
            residual + r_M[:, None] * residual_stride[0] + e_E[None, :] * residual_stride[1],
            mask=inside_ME,
            other=0.0,
        ).to(tl.float32)
        # what is normalised is the sum as it is stored
        rounded_ME = x_ME.to(total.dtype.element_ty)
        tl.store(total + at_ME, rounded_ME, mask=inside_ME)
        x_ME = rounded_ME.to(tl.float32)
    rstd_M = 1.0 / tl.sqrt(tl.sum(x_ME * x_ME, 1) / D + eps)
    tl.store(rstd + r_M, rstd_M, mask=r_M < R)
    weight_E = tl.load(weight + e_E * weight_stride, mask=e_E < D, other=0.0).to(tl.float32)
    tl.store(
        y + at_ME,
        (x_ME * rstd_M[:, None] * weight_E[None, :]).to(y.dtype.element_ty),
        mask=inside_ME,
    )


@triton.jit
def backward(
    x, weight, rstd, grad_y, grad_total, dx, partial, x_stride, weight_stride, grad_y_stride,
    grad_total_stride, R, D,
    M: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Every P-th tile of rows: the gradient of what was normalised,
    and this program's part of the weight's.
    """
    e_E = tl.arange(0, E)
    weight_E = tl.load(weight + e_E * weight_stride, mask=e_E < D, other=0.0).to(tl.float32)
    sum_ME = tl.zeros((M, E), tl.float32)
    for r0 in range(tl.program_id(0) * M, R, tl.num_programs(0) * M):
        r_M = tl.cast(r0, tl.int64) + tl.arange(0, M)
        inside_ME = (r_M < R)[:, None] & (e_E < D)[None, :]
        x_ME = tl.load(
            x + r_M[:, None] * x_stride[0] + e_E[None, :] * x_stride[1], mask=inside_ME, other=0.0
        ).to(tl.float32)
        grad_ME = tl.load(
            grad_y + r_M[:, None] * grad_y_stride[0] + e_E[None, :] * grad_y_stride[1],
            mask=inside_ME,
            other=0.0,
        ).to(tl.float32)
        rstd_M = tl.load(rstd + r_M, mask=r_M < R, other=0.0)
        normal_ME = x_ME * rstd_M[:, None]
        sum_ME += grad_ME * normal_ME
        grad_ME *= weight_E[None, :]
        along_M = tl.sum(grad_ME * normal_ME, 1) / D
        dx_ME = (grad_ME - normal_ME * along_M[:, None]) * rstd_M[:, None]
        if grad_total is not None:
            at_ME = (
                grad_total
                + r_M[:, None] * grad_total_stride[0]
                + e_E[None, :] * grad_total_stride[1]
            )
            dx_ME += tl.load(at_ME, mask=inside_ME, other=0.0).to(tl.float32)
        tl.store(
            dx + r_M[:, None] * D + e_E[None, :], dx_ME.to(dx.dtype.element_ty), mask=inside_ME
        )
    tl.store(
        partial + tl.cast(tl.program_id(0), tl.int64) * D + e_E, tl.sum(sum_ME, 0), mask=e_E < D
    )

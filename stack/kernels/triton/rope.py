"""Rotary positions in one pass: Triton, forward and backward.
The backward is the rotation by the opposite angle.

B batch, N heads, T tokens, H head_dim, J = H/2 rotated pairs; in kernels M tokens of a tile, E
pairs padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackproof.kernels.triton import launch
from stackproof.spec.errors import UsageError

TILE_NUMBERS = 2048


def rope(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (feature j, feature j + H/2) by its position's angle;
    the half-split pairing of Llama checkpoints.

    `cos` and `sin` are (T, J), or (B, 1, T, J) where rows have positions of their own; they get no
    gradient. Computed in float32, any strides; returns the dtype of `x_BNTH`, laid out as (B, T, N,
    H). Raises UsageError for shapes or dtypes that do not fit. Oracle:
    `stackproof.contracts.kernel_reference.rope`. Source: RoFormer, arXiv:2104.09864, sec. 3.4.2.
    """
    launch.require("rope", {"x": x_BNTH, "cos": cos, "sin": sin})
    B, _, T, H = x_BNTH.shape
    if cos.shape != sin.shape or tuple(cos.shape) not in ((T, H // 2), (B, 1, T, H // 2)) or H % 2:
        got = f"x {tuple(x_BNTH.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise UsageError(
            "rope: tables do not fit",
            value=got,
            allowed=f"({T}, {H // 2}) or ({B}, 1, {T}, {H // 2}), an even head_dim",
        )
    if cos.requires_grad or sin.requires_grad:
        raise UsageError(
            "rope: the tables require a gradient",
            allowed="tables that follow from the configuration",
        )
    cos_BTJ, sin_BTJ = (table.expand(B, 1, T, H // 2)[:, 0] for table in (cos, sin))
    return Rope.apply(x_BNTH, cos_BTJ, sin_BTJ)


class Rope(torch.autograd.Function):
    """The kernel as one differentiable operation; saves only the tables."""

    @staticmethod
    def forward(ctx, x_BNTH, cos_BTJ, sin_BTJ):
        ctx.save_for_backward(cos_BTJ, sin_BTJ)
        return turned(x_BNTH, cos_BTJ, sin_BTJ, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BNTH):
        return turned(grad_BNTH, *ctx.saved_tensors, -1.0), None, None


def turned(x_BNTH: Tensor, cos_BTJ: Tensor, sin_BTJ: Tensor, sign: float) -> Tensor:
    """The rotation by `sign` times the tables' angle."""
    B, N, T, H = x_BNTH.shape
    out_BNTH = x_BNTH.new_empty(B, T, N, H).transpose(1, 2)
    E = triton.next_power_of_2(max(1, H // 2))
    M = max(1, TILE_NUMBERS // E)
    tensors = (x_BNTH, cos_BTJ, sin_BTJ, out_BNTH)
    strides, sizes = (x.stride() for x in tensors), (N, T, sign, H // 2, M, E)
    launch.run(rotate, (triton.cdiv(T, M) * B * N,), *tensors, *strides, *sizes)
    return out_BNTH


# ---- kernel


@triton.jit
def rotate(
    x, cos, sin, out, x_stride, cos_stride, sin_stride, out_stride, N, T, sign, J: tl.constexpr,
    M: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """One tile of tokens of one head."""
    tiles = tl.cdiv(T, M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, n = tl.cast(head // N, tl.int64), tl.cast(head % N, tl.int64)
    t_M, e_E = tl.cast(tile, tl.int64) * M + tl.arange(0, M), tl.arange(0, E)
    inside_ME = (t_M < T)[:, None] & (e_E < J)[None, :]
    x += b * x_stride[0] + n * x_stride[1]
    out += b * out_stride[0] + n * out_stride[1]
    at_ME = t_M[:, None] * x_stride[2] + e_E[None, :] * x_stride[3]
    a_ME = tl.load(x + at_ME, mask=inside_ME, other=0.0).to(tl.float32)
    b_ME = tl.load(x + at_ME + J * x_stride[3], mask=inside_ME, other=0.0).to(tl.float32)
    cos_at_ME = b * cos_stride[0] + t_M[:, None] * cos_stride[1] + e_E[None, :] * cos_stride[2]
    sin_at_ME = b * sin_stride[0] + t_M[:, None] * sin_stride[1] + e_E[None, :] * sin_stride[2]
    cos_ME = tl.load(cos + cos_at_ME, mask=inside_ME, other=0.0).to(tl.float32)
    sin_ME = tl.load(sin + sin_at_ME, mask=inside_ME, other=0.0).to(tl.float32) * sign
    to_ME = t_M[:, None] * out_stride[2] + e_E[None, :] * out_stride[3]
    tl.store(out + to_ME, (a_ME * cos_ME - b_ME * sin_ME).to(out.dtype.element_ty), mask=inside_ME)
    tl.store(
        out + to_ME + J * out_stride[3],
        (b_ME * cos_ME + a_ME * sin_ME).to(out.dtype.element_ty),
        mask=inside_ME,
    )

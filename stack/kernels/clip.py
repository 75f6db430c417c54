"""Clipping by the global gradient norm in three launches, the norm never leaving the device:
Triton.

Squares are summed block by block over all tensors, then the sums are added and the root is taken,
then every block is scaled. In kernels E numbers of a block, C partial sums. Source: founding note:
nanolm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackproof.kernels import launch, tensor_list
from stackproof.spec.errors import UsageError

EPS = 1e-6


def clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale contiguous float32 `gradients` in place by max_norm / (norm + 1e-6) if that is below 1;
    return their norm, float32, shape ().

    A norm below the limit changes no bit. A norm that is not finite is returned as it is and leaves
    the gradients untouched. The sum has a fixed order. Raises UsageError for other tensors or a
    limit that is not positive. Oracle: `torch.nn.utils.clip_grad_norm_`.
    """
    if not max_norm > 0:
        raise UsageError("clip: max_norm", value=max_norm, allowed="above 0")
    tensor_list.check("clip", gradients=gradients)
    if not gradients:
        return torch.zeros(())
    launch.require(
        "clip", {f"gradients[{i}]": g for i, g in enumerate(gradients)}, (torch.float32,)
    )
    table = tensor_list.blocks(tuple(g.numel() for g in gradients), gradients[0].device)
    where = tensor_list.addresses(gradients)
    partial, norm = (
        torch.zeros(n, dtype=torch.float32, device=gradients[0].device) for n in (table.n, 1)
    )
    if table.n:
        with launch.on(gradients[0]):
            squares[(table.n,)](
                where,
                table.tensor,
                table.first,
                table.count,
                partial,
                tensor_list.BLOCK,
                num_warps=8,
                **launch.OPTIONS,
            )
            root[(1,)](partial, norm, table.n, 1024, **launch.OPTIONS)
            scale[(table.n,)](
                where,
                table.tensor,
                table.first,
                table.count,
                norm,
                max_norm,
                EPS,
                tensor_list.BLOCK,
                num_warps=8,
                **launch.OPTIONS,
            )
    return norm[0]


# ---- kernels


@triton.jit
def squares(where, tensor, first, count, partial, E: tl.constexpr):
    """The sum of squares of one block."""
    block = tl.program_id(0)
    i = tl.load(tensor + block)
    x = tl.load(where + i).to(tl.pointer_type(tl.float32))
    at_E = tl.load(first + block) + tl.arange(0, E)
    x_E = tl.load(x + at_E, mask=at_E < tl.load(count + i), other=0.0)
    tl.store(partial + block, tl.sum(x_E * x_E, 0))


@triton.jit
def root(partial, norm, n, C: tl.constexpr):
    """The root of the sum of all partial sums, added in float64."""
    c_C = tl.arange(0, C)
    sum_C = tl.zeros((C,), tl.float64)
    for c0 in range(0, n, C):
        sum_C += tl.load(partial + c0 + c_C, mask=c0 + c_C < n, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt(tl.sum(sum_C, 0)).to(tl.float32))


@triton.jit
def scale(where, tensor, first, count, norm, max_norm, eps, E: tl.constexpr):
    """Scale one block, if the norm is finite and beyond the limit; else write nothing."""
    total = tl.load(norm)
    factor = max_norm / (total + eps)
    if (factor < 1.0) & (total < float("inf")):
        block = tl.program_id(0)
        i = tl.load(tensor + block)
        x = tl.load(where + i).to(tl.pointer_type(tl.float32))
        at_E = tl.load(first + block) + tl.arange(0, E)
        inside_E = at_E < tl.load(count + i)
        tl.store(x + at_E, tl.load(x + at_E, mask=inside_E, other=0.0) * factor, mask=inside_E)

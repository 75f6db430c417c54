"""Matrix products of oneDNN, the library that comes with torch, for processors on which torch's
default library uses half their width.

R rows (tokens), C rows of a chunk, D inputs, M outputs, V vocabulary. MKL takes a path of 256-bit
instructions on AMD processors that have 512-bit ones; oneDNN decides by what the processor can do.
Every product is one operation to a compiler.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stackproof.kernels.custom_op import custom_op

# Why torch has no such products here; empty if it has.
WHY_NOT = (
    ""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else "this torch has no oneDNN"
)
LEAST_MULTIPLY_ADDS = 6_000_000  # the call of a smaller product costs what it gains


def linear(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias over the last axis, float32.
    What is small, of another type or under autocast is torch's own, and so are errors.

    Has no second derivative. Oracle: `stackproof.contracts.kernel_reference.linear`.
    """
    n_rows = x.numel() // max(1, x.shape[-1])
    if n_rows * weight_MD.numel() < LEAST_MULTIPLY_ADDS or not _fits(x, weight_MD, bias_M):
        return F.linear(x, weight_MD, bias_M)
    return _linear(x, weight_MD, bias_M)


def _fits(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None) -> bool:
    """Whether these are what oneDNN takes for granted: types, widths,
    and a bias whose numbers lie side by side.
    """
    given = (x, weight_MD) if bias_M is None else (x, weight_MD, bias_M)
    plain = all(
        t.dtype == torch.float32 and t.device.type == "cpu" for t in given
    ) and not torch.is_autocast_enabled("cpu")
    dense = bias_M is None or (bias_M.shape == weight_MD.shape[:1] and bias_M.is_contiguous())
    return plain and dense and weight_MD.ndim == 2 and x.shape[-1] == weight_MD.shape[1]


# ---- the products


def outputs(x_RD: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias, (R, M) in fresh memory.
    Any strides but the bias's; rows of x that are not dense are copied.
    """
    return torch.ops.mkldnn._linear_pointwise(x_RD, weight_MD, bias_M, "none", [], "")


def input_gradient(grad_RM: Tensor, weight_MD: Tensor) -> Tensor:
    """grad·weight, (R, D)."""
    return outputs(grad_RM, weight_MD.T)


def weight_gradient(grad_RM: Tensor, x_RD: Tensor) -> Tensor:
    """gradᵀ·x, (M, D). One of the two must be copied with its rows dense: the smaller."""
    if x_RD.shape[1] <= grad_RM.shape[1]:
        return outputs(x_RD.T, grad_RM.T).T.contiguous()
    return outputs(grad_RM.T, x_RD.T)


# ---- a linear layer


def _filled(x: Tensor) -> Tensor:
    """The rows of x (…, D), filled up with zeros to a number whose binary form has at most
    four digits before its zeros.

    A number of rows is a program of its own to oneDNN, written at the first use and kept: experts
    would see a new one at each step.
    """
    x_RD = x.reshape(-1, x.shape[-1])
    missing = -len(x_RD) % (1 << max(0, len(x_RD).bit_length() - 4))
    return F.pad(x_RD, (0, 0, 0, missing)) if missing else x_RD


def _shaped(y_RM: Tensor, lead: torch.Size) -> Tensor:
    """The first rows of y as (…, M): itself and no view of it, because a view that an operation
    returns must not be changed in place.
    """
    return torch.ops.aten._unsafe_view(
        y_RM.resize_(lead.numel(), y_RM.shape[1]), (*lead, y_RM.shape[1])
    )


@custom_op(
    "stackproof::linear",
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)),
    derived=True,
)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _shaped(outputs(_filled(x), weight, bias), x.shape[:-1])


@custom_op(
    "stackproof::linear_input_gradient",
    lambda grad, weight: grad.new_empty(*grad.shape[:-1], weight.shape[1]),
)
def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return _shaped(input_gradient(_filled(grad), weight), grad.shape[:-1])


@custom_op(
    "stackproof::linear_weight_gradient",
    lambda grad, x: grad.new_empty(grad.shape[-1], x.shape[-1]),
)
def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return weight_gradient(_filled(grad), _filled(x))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
    return (
        _input_gradient(grad, weight) if wanted[0] else None,
        _weight_gradient(grad, x) if wanted[1] else None,
        grad.flatten(0, -2).sum(0) if wanted[2] else None,
    )


_linear.derive(_gradients, _save)


# ---- the products of a head in chunks, see `stackproof.kernels.cross_entropy.Products`


def head_input_gradient(grad_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """grad·weight into `out_CD`."""
    out_CD.copy_(input_gradient(grad_CV, weight_VD))


def add_head_gradient(sum_DV: Tensor | None, grad_CV: Tensor, x_CD: Tensor) -> Tensor:
    """The sum with xᵀ·grad in it: the head's gradient lies transposed,
    so that the gradient of the logits never is.
    """
    part_DV = outputs(x_CD.T, grad_CV.T)
    return part_DV if sum_DV is None else sum_DV.add_(part_DV)


def head_gradient(sum_DV: Tensor) -> Tensor:
    """The head's gradient, (V, D)."""
    return sum_DV.T.contiguous()

"""Cross-entropy of a linear head without ever holding all logits.
R rows (tokens), D features, V vocab, C rows of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackproof.kernels import HEAD_CHUNK_BYTES, onednn
from stackproof.spec.errors import UsageError

_workspace: dict[tuple, Tensor] = {}


def linear_cross_entropy(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    by_onednn: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of −log p(label) in nats, and z_loss · the sum of log normalisers squared, over labels
    that are not `ignore_index`.

    Both are float32 (float64 for float64), shape (). Rows go through one buffer, a chunk at a time.
    It holds logits, then probabilities, then the gradient; both gradients are therefore complete
    when the forward ends. Products run in the autocast type, with `by_onednn` those in
    float32 on the CPU by oneDNN; the rest runs in float32.
    Idea: github.com/linkedin/Liger-Kernel. Raises UsageError for a label outside the vocabulary, on
    the CPU. Oracle: `stackproof.contracts.kernel_reference.linear_cross_entropy`.
    """
    if not labels_R.is_cuda:
        check_labels(labels_R, len(weight_VD), ignore_index)
    return _LinearCrossEntropy.apply(
        x_RD, weight_VD, labels_R, _Rule(ignore_index, softcap, z_loss, by_onednn)
    )


def by_onednn(
    x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, its products in float32 on the CPU by oneDNN."""
    return linear_cross_entropy(x_RD, weight_VD, labels_R, **options, by_onednn=True)


def check_labels(labels_R: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise UsageError for a label outside the vocabulary."""
    unknown = labels_R[(labels_R != ignore_index) & ((labels_R < 0) | (labels_R >= vocab_size))]
    if len(unknown):
        raise UsageError(
            "linear_cross_entropy: a label is not in the vocabulary",
            value=int(unknown[0]),
            allowed=f"0 to {vocab_size - 1}, or {ignore_index} for a position without label",
        )


@dataclass(frozen=True)
class _Rule:
    ignore_index: int
    softcap: float | None
    z_loss: float
    by_onednn: bool


@dataclass(frozen=True)
class Products:
    """How the head multiplies: a chunk's logits; its part of the gradient of x, into given memory;
    its part of the head's gradient, added to a sum (None: it begins one); and the head's gradient
    (V, D), which that sum stands for. Of the buffer it uses one part in `share`.
    """

    logits: Callable[[Tensor, Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Tensor], None]
    add_head_gradient: Callable[[Tensor | None, Tensor, Tensor], Tensor]
    head_gradient: Callable[[Tensor], Tensor]
    share: int


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, rule: _Rule
    ) -> tuple[Tensor, Tensor]:
        kind = x_RD.device.type
        ctx.dtype = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_RD.dtype
        )
        ctx.rule, ctx.wanted = rule, ctx.needs_input_grad[:2]
        sums, ctx.gradients = _run(x_RD, weight_VD, labels_R, rule, ctx.dtype, ctx.wanted)
        ctx.save_for_backward(*((x_RD, weight_VD, labels_R) if rule.z_loss else ()))
        ctx.dtypes = (x_RD.dtype, weight_VD.dtype)
        return sums[0], sums[1]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, scale: Tensor, z_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were already taken; run the forward again"
            )
        if ctx.rule.z_loss and not torch.equal(scale, z_scale):
            gradients = _run(
                *ctx.saved_tensors, ctx.rule, ctx.dtype, ctx.wanted, float(scale), float(z_scale)
            )[1]
            scale = torch.ones_like(scale)
        grads = [
            None if g is None else _scaled(g, scale).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes)
        ]
        return grads[0], grads[1], None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Times a number that is not rounded to the gradient's type first,
    as `mul_` on a GPU rounds it.
    """
    return gradient.mul_(scale) if gradient.dtype.itemsize >= 4 else gradient.float().mul_(scale)


def _run(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    rule: _Rule,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    scale: float = 1.0,
    z_scale: float = 1.0,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Both sums (2,), and the gradients of scale·nats + z_scale·z with respect to
    features and head, each if its entry of `wanted` is true.
    """
    kept_R = labels_R != rule.ignore_index
    target_R, wide = labels_R.where(kept_R, 0), torch.promote_types(dtype, torch.float32)
    with torch.autocast(x_RD.device.type, enabled=False), torch.no_grad():
        x_RD, weight_VD = x_RD.to(dtype), weight_VD.to(dtype)
        grad_x = (
            torch.empty_like(x_RD, memory_format=torch.contiguous_format) if wanted[0] else None
        )
        products = (
            ONEDNN
            if rule.by_onednn and x_RD.device.type == "cpu" and dtype == torch.float32
            else TORCH
        )
        head_sum = None
        sums = torch.zeros(2, dtype=wide, device=x_RD.device)
        for rows in chunks(len(x_RD), products.share * len(weight_VD)):
            logits_CV = products.logits(x_RD[rows], weight_VD)
            slope_CV = None if rule.softcap is None else _cap(logits_CV, rule.softcap)
            nats_C, norm_C = _to_probabilities(logits_CV, target_R[rows])
            kept_C = kept_R[rows]
            sums[0] += nats_C.masked_fill(~kept_C, 0).sum()
            sums[1] += rule.z_loss * norm_C.masked_fill(~kept_C, 0).square().sum()
            if any(wanted):
                z_factor_C = 2 * rule.z_loss * z_scale * norm_C if rule.z_loss else None
                _to_gradient(logits_CV, target_R[rows], kept_C, z_factor_C, scale, slope_CV)
                grad_CV = logits_CV.to(dtype)
                if wanted[0]:
                    products.input_gradient(grad_CV, weight_VD, grad_x[rows])
                if wanted[1]:
                    head_sum = products.add_head_gradient(head_sum, grad_CV, x_RD[rows])
    if head_sum is not None:
        return sums, (grad_x, products.head_gradient(head_sum))
    return sums, (
        grad_x,
        torch.zeros(weight_VD.shape, dtype=wide, device=x_RD.device) if wanted[1] else None,
    )


def chunks(n_rows: int, vocab_size: int) -> list[slice]:
    """Consecutive rows whose logits fit into the buffer, as even as can be."""
    n_chunks = max(1, -(-n_rows // max(1, HEAD_CHUNK_BYTES // (4 * vocab_size))))
    size = max(1, -(-n_rows // n_chunks))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _logits(x_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits (C, V) in float32 or wider, in the reused buffer."""
    wide = torch.promote_types(x_CD.dtype, torch.float32)
    n_entries, key = len(x_CD) * len(weight_VD), (x_CD.device, wide)
    if key not in _workspace or _workspace[key].numel() < n_entries:
        _workspace[key] = torch.empty(n_entries, dtype=wide, device=x_CD.device)
    logits_CV = _workspace[key][:n_entries].view(len(x_CD), len(weight_VD))
    if x_CD.dtype == wide:
        return torch.mm(x_CD, weight_VD.T, out=logits_CV)
    return logits_CV.copy_(x_CD @ weight_VD.T)


def _cap(logits_CV: Tensor, softcap: float) -> Tensor:
    """Bend logits to within ±softcap in place; returns the slope of that."""
    logits_CV.div_(softcap).tanh_()
    slope_CV = 1 - logits_CV.square()
    logits_CV.mul_(softcap)
    return slope_CV


def _to_probabilities(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities in place; returns −log p of the targets, exact also where p
    underflows, and log normalisers, (C,).
    """
    chosen_C = logits_CV.gather(1, target_C[:, None])[:, 0]
    top_C = logits_CV.amax(1)
    torch.ops.aten._softmax.out(logits_CV, 1, False, out=logits_CV)
    norm_C = top_C - logits_CV.amax(1).log()
    return norm_C - chosen_C, norm_C


def _to_gradient(
    probs_CV: Tensor,
    target_C: Tensor,
    kept_C: Tensor,
    z_factor_C: Tensor | None,
    scale: float,
    slope_CV: Tensor | None,
) -> None:
    """Turn probabilities into the gradient of scale·nats + z with respect to the logits,
    in place.
    """
    if z_factor_C is not None:
        probs_CV.mul_((scale + z_factor_C)[:, None])
    probs_CV.scatter_add_(1, target_C[:, None], probs_CV.new_full((len(target_C), 1), -scale))
    if slope_CV is not None:
        probs_CV.mul_(slope_CV)
    if probs_CV.is_cuda or not bool(kept_C.all()):
        probs_CV.mul_(kept_C[:, None])


def _input_gradient(grad_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    torch.mm(grad_CV, weight_VD, out=out_CD)


def _add_head_gradient(sum_VD: Tensor | None, grad_CV: Tensor, x_CD: Tensor) -> Tensor:
    """Sums over chunks are float32 or wider."""
    wide = torch.promote_types(grad_CV.dtype, torch.float32)
    if sum_VD is None:
        sum_VD = torch.zeros(grad_CV.shape[1], x_CD.shape[1], dtype=wide, device=x_CD.device)
    return (
        sum_VD.addmm_(grad_CV.T, x_CD) if grad_CV.dtype == wide else sum_VD.add_(grad_CV.T @ x_CD)
    )


TORCH = Products(_logits, _input_gradient, _add_head_gradient, lambda sum_VD: sum_VD, 1)
# few rows do
ONEDNN = Products(
    onednn.outputs, onednn.head_input_gradient, onednn.add_head_gradient, onednn.head_gradient, 2
)

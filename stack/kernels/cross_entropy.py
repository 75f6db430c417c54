"""Cross-entropy of a linear head without ever holding all logits. R rows (tokens), D features, V vocab, C rows of a chunk."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 128 * 2**20  # of float32 logits at a time; larger chunks gain nothing, smaller ones starve the matrix products
_workspace: dict[tuple, Tensor] = {}


def linear_cross_entropy(x_RD: Tensor, head_VD: Tensor, labels_R: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Sum of −log softmax(x·headᵀ)[label] in nats over labels that are not `ignore_index`, float32 (float64 for float64), shape ().

    Rows go through one reused buffer, which holds logits, then probabilities, then the gradient; both gradients are therefore complete
    when the forward ends. Products run in the autocast type, the rest in float32. Idea: github.com/linkedin/Liger-Kernel.
    Oracle: `stack.kernels.reference.linear_cross_entropy`. Raises IndexError for a label outside the vocabulary.
    """
    return _LinearCrossEntropy.apply(x_RD, head_VD, labels_R, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, head_VD: Tensor, labels_R: Tensor, ignore_index: int) -> Tensor:
        kept_R = labels_R != ignore_index
        target_R = labels_R.where(kept_R, 0)
        kind = x_RD.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_RD.dtype
        with torch.autocast(kind, enabled=False):
            x_p, head_p = x_RD.to(product), head_VD.to(product)
            wants = ctx.needs_input_grad[:2]
            grad_x = torch.empty_like(x_p) if wants[0] else None
            grad_head = torch.zeros_like(head_p, dtype=torch.promote_types(product, torch.float32)) if wants[1] else None
            nats = torch.zeros((), dtype=torch.promote_types(product, torch.float32), device=x_RD.device)
            for rows in chunks(len(x_RD), len(head_VD)):
                logits_CV = _logits(x_p[rows], head_p)
                nats_C = _to_probabilities(logits_CV, target_R[rows])
                nats += nats_C.masked_fill(~kept_R[rows], 0).sum()
                if any(wants):
                    _to_gradient(logits_CV, target_R[rows], kept_R[rows])
                    _multiply(logits_CV.to(product), x_p[rows], head_p, grad_x[rows] if wants[0] else None, grad_head)
        ctx.gradients = (grad_x, grad_head)
        ctx.dtypes = (x_RD.dtype, head_VD.dtype)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss were already taken; run the forward again")
        grads = [None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes)]
        return grads[0], grads[1], None, None


def chunks(n_rows: int, vocab_size: int) -> list[slice]:
    """Consecutive rows whose logits fit into the buffer."""
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _logits(x_CD: Tensor, head_VD: Tensor) -> Tensor:
    """Logits (C, V) in float32 or wider, in the reused buffer."""
    wide = torch.promote_types(x_CD.dtype, torch.float32)
    n_entries, key = len(x_CD) * len(head_VD), (x_CD.device, wide)
    if key not in _workspace or _workspace[key].numel() < n_entries:
        _workspace[key] = torch.empty(n_entries, dtype=wide, device=x_CD.device)
    logits_CV = _workspace[key][:n_entries].view(len(x_CD), len(head_VD))
    if x_CD.dtype == wide:
        return torch.mm(x_CD, head_VD.T, out=logits_CV)
    return logits_CV.copy_(x_CD @ head_VD.T)


def _to_probabilities(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Turn logits into probabilities in place; returns −log p of the targets, (C,), exact also where p underflows."""
    chosen_C = logits_CV.gather(1, target_C[:, None])[:, 0]
    top_C = logits_CV.amax(1)
    torch.ops.aten._softmax.out(logits_CV, 1, False, out=logits_CV)
    return (top_C - logits_CV.amax(1).log()) - chosen_C


def _to_gradient(probs_CV: Tensor, target_C: Tensor, kept_C: Tensor) -> None:
    """Turn probabilities into the gradient of the summed loss with respect to the logits, in place."""
    probs_CV.scatter_add_(1, target_C[:, None], probs_CV.new_full((len(target_C), 1), -1.0))
    if not bool(kept_C.all()):
        probs_CV.mul_(kept_C[:, None])


def _multiply(grad_CV: Tensor, x_CD: Tensor, head_VD: Tensor, grad_x_CD: Tensor | None, grad_head_VD: Tensor | None) -> None:
    """Carry the gradient through the product, adding to the head's."""
    if grad_x_CD is not None:
        torch.mm(grad_CV, head_VD, out=grad_x_CD)
    if grad_head_VD is None:
        return
    if grad_head_VD.dtype == grad_CV.dtype:
        grad_head_VD.addmm_(grad_CV.T, x_CD)
    else:
        grad_head_VD += grad_CV.T @ x_CD

"""Cross-entropy of a head whose vocabulary is divided among the ranks of a tensor group: no rank
ever holds all logits. R rows (tokens), D features, V vocab, C rows of a chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stackproof.kernels.cross_entropy import check_labels, chunks


def linear_cross_entropy(
    x_RD: Tensor, weight_VD: DTensor, labels_R: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Sum of −log p(label) in nats over labels that are not `ignore_index`, shape (), float32
    (float64 for float64), on every rank of the group; `weight_VD` is divided along V.

    Normaliser and label's logit are summed over the group for each chunk of rows, the gradient of
    x once. Every rank gives the same `x_RD` and gets its whole gradient.
    Source: arXiv:1909.08053, sec. 3. Raises UsageError for a label outside the vocabulary, on the
    CPU.
    """
    if not labels_R.is_cuda:
        check_labels(labels_R, len(weight_VD), ignore_index)
    mesh, n_vocab = weight_VD.device_mesh, len(weight_VD)
    _, (first, _) = compute_local_shape_and_global_offset(
        weight_VD.shape, mesh, weight_VD.placements
    )
    group = mesh.get_group()
    return _LinearCrossEntropy.apply(
        x_RD, weight_VD.to_local(), labels_R, first, n_vocab, group, ignore_index
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        first: int,
        n_vocab: int,
        group: dist.ProcessGroup,
        ignore_index: int,
    ) -> Tensor:
        kind = x_RD.device.type
        half = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else x_RD.dtype
        wide = torch.promote_types(dtype, torch.float32)
        ctx.dtypes = x_RD.dtype, weight_VD.dtype
        with torch.autocast(kind, enabled=False):
            x_RD, weight_VD = x_RD.to(dtype), weight_VD.to(dtype)
            grad_x = torch.zeros(x_RD.shape, dtype=wide, device=x_RD.device)
            grad_weight = torch.zeros(weight_VD.shape, dtype=wide, device=x_RD.device)
            total = torch.zeros((), dtype=wide, device=x_RD.device)
            for rows in chunks(len(x_RD), n_vocab):
                logits_CV = (x_RD[rows] @ weight_VD.T).to(wide)
                kept_C = labels_R[rows] != ignore_index
                nats_C = _to_gradient(logits_CV, labels_R[rows] - first, kept_C, group)
                total += nats_C.sum()
                slope_CV = logits_CV.to(dtype)
                grad_x[rows] = (slope_CV @ weight_VD).to(wide)
                grad_weight += (slope_CV.T @ x_RD[rows]).to(wide)
            dist.all_reduce(grad_x, group=group)
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        of_x, of_weight = ctx.dtypes
        return (grad_x * scale).to(of_x), (grad_weight * scale).to(of_weight), *(None,) * 5


def _to_gradient(
    logits_CV: Tensor, label_C: Tensor, kept_C: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Turn this rank's logits into their gradient, in place. Returns −log p of the labels (C,), 0
    where none is kept. `label_C` counts from this rank's first entry of the vocabulary.
    """
    n_own = logits_CV.shape[1]
    own_C = kept_C & (label_C >= 0) & (label_C < n_own)
    index_C1 = label_C.where(own_C, 0)[:, None]
    top_C = logits_CV.amax(1) if n_own else logits_CV.new_full((len(logits_CV),), -torch.inf)
    dist.all_reduce(top_C, dist.ReduceOp.MAX, group=group)
    logits_CV.sub_(top_C[:, None])
    chosen_C = logits_CV.gather(1, index_C1)[:, 0] if n_own else torch.zeros_like(top_C)
    logits_CV.exp_()
    sums_2C = torch.stack((logits_CV.sum(1), chosen_C.where(own_C, 0)))
    dist.all_reduce(sums_2C, group=group)
    norm_C, chosen_C = sums_2C
    logits_CV.div_(norm_C[:, None])
    if n_own:
        logits_CV.scatter_add_(1, index_C1, -own_C.to(logits_CV)[:, None])
    logits_CV.mul_(kept_C[:, None])
    return (norm_C.log() - chosen_C).where(kept_C, 0)

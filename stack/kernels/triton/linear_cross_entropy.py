"""Cross-entropy of a linear layer's logits that never holds them all: chunks of rows,
each through one reused buffer.

R rows (positions), D d_model, V vocabulary, C rows of a chunk; in kernels E logits of a block

A chunk's logits are written by a matrix product, read by one kernel that leaves their gradient in
their place, and read again by the products that give the gradients of inputs and weights. All of it
happens in the forward, so the backward only scales. Sources: Liger Kernel, arXiv:2410.10989;
z-loss: arXiv:2204.02311, sec. 5; softcap: arXiv:2408.00118.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackproof.kernels.cross_entropy import check_labels
from stackproof.kernels.triton import launch
from stackproof.spec.errors import UsageError

IGNORE_INDEX = -100
MIN_CHUNK = 1024
BLOCK = 4096


def linear_cross_entropy(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum of −log p(label) in nats over labels that are not `ignore_index`, and z_loss · the sum of
    log normalisers squared there.

    Logits are x·weightᵀ, with a softcap softcap · tanh(logit / softcap). Both results are float32,
    shape (). Products in the dtype of the inputs (under autocast in its dtype); softmax, sums and
    the weights' gradient over chunks in float32. Raises UsageError for inputs that do not fit and
    for labels out of range; on a GPU these end in a device-side assertion, as waiting for the
    answer would stop the queue.
    Oracle: `stackproof.contracts.kernel_reference.linear_cross_entropy`.
    """
    launch.require("linear_cross_entropy", {"x": x_RD, "weight": weight_VD, "labels": labels_R})
    check(x_RD, weight_VD, labels_R, ignore_index, softcap, z_loss)
    kind = x_RD.device.type
    if torch.is_autocast_enabled(kind):
        x_RD, weight_VD = (y.to(torch.get_autocast_dtype(kind)) for y in (x_RD, weight_VD))
    if x_RD.dtype != weight_VD.dtype:
        raise UsageError(
            "linear_cross_entropy: dtypes differ",
            value=f"{x_RD.dtype}, {weight_VD.dtype}",
            allowed="one dtype, or autocast",
        )
    return LinearCrossEntropy.apply(x_RD, weight_VD, labels_R, ignore_index, softcap, z_loss)


def check(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
) -> None:
    """Raise UsageError for inputs that do not fit."""
    fits = (
        x_RD.ndim == weight_VD.ndim == 2
        and x_RD.shape[1] == weight_VD.shape[1]
        and labels_R.shape == x_RD.shape[:1]
    )
    if not fits or labels_R.dtype != torch.int64:
        got = (
            f"x {tuple(x_RD.shape)}, weight {tuple(weight_VD.shape)}, labels "
            f"{tuple(labels_R.shape)} {labels_R.dtype}"
        )
        raise UsageError(
            "linear_cross_entropy: inputs do not fit",
            value=got,
            allowed="x (R, D), weight (V, D), labels (R,) torch.int64",
        )
    if (softcap is not None and softcap <= 0) or z_loss < 0:
        raise UsageError(
            "linear_cross_entropy: softcap or z_loss",
            value=f"{softcap}, {z_loss}",
            allowed="softcap above 0, z_loss at least 0",
        )
    V = len(weight_VD)
    if labels_R.is_cuda:
        known_R = (labels_R == ignore_index) | ((labels_R >= 0) & (labels_R < V))
        torch._assert_async(known_R.all(), "linear_cross_entropy: a label is not in the vocabulary")
    else:
        check_labels(labels_R, V, ignore_index)


class LinearCrossEntropy(torch.autograd.Function):
    """Both sums as one differentiable operation; keeps the gradients that the forward found."""

    @staticmethod
    def forward(ctx, x_RD, weight_VD, labels_R, ignore_index, softcap, z_loss):
        ctx.call = (ignore_index, softcap, z_loss)
        ctx.wanted = ctx.needs_input_grad[:2]
        ones = torch.ones(2, dtype=torch.float32, device=x_RD.device)
        losses, dx_RD, dweight_VD = chunked(x_RD, weight_VD, labels_R, *ctx.call, ones, ctx.wanted)
        ctx.save_for_backward(dx_RD, dweight_VD, *((x_RD, weight_VD, labels_R) if z_loss else ()))
        return losses[0], losses[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nats, grad_z):
        dx_RD, dweight_VD, *inputs = ctx.saved_tensors
        if inputs and not same(grad_nats, grad_z):
            factors = torch.stack((grad_nats, grad_z)).float()
            _, dx_RD, dweight_VD = chunked(*inputs, *ctx.call, factors, ctx.wanted)
            return dx_RD, dweight_VD, None, None, None, None
        gradients = (None if g is None else scaled(g, grad_nats) for g in (dx_RD, dweight_VD))
        return *gradients, None, None, None, None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether both sums have one weight, as in nats + z. Two tensors are compared on the device,
    and waited for.
    """
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def chunked(
    x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, ignore_index: int, softcap: float | None,
    z_loss: float, factors: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Sums of nats and z-loss as (2,) float32, and the gradients of `factors` · sums for inputs
    and weights, each if its entry of `wanted` is true.
    """
    (R, D), V = x_RD.shape, len(weight_VD)
    C = chunk_rows(R, D, V)
    buffer_CV = x_RD.new_empty(min(C, R), V)
    per_row_2R = torch.zeros(2, R, dtype=torch.float32, device=x_RD.device)
    dx_RD = torch.zeros_like(x_RD, memory_format=torch.contiguous_format) if wanted[0] else None
    dweight_VD = torch.zeros(V, D, dtype=torch.float32, device=x_RD.device) if wanted[1] else None
    for start in range(0, R, C):
        rows = slice(start, start + C)
        logits_CV = buffer_CV[: len(x_RD[rows])]
        torch.mm(x_RD[rows], weight_VD.T, out=logits_CV)
        launch.run(
            softmax_gradient,
            (len(logits_CV),),
            *(logits_CV, labels_R[rows], *per_row_2R[:, rows], factors, labels_R.stride(0)),
            *(V, ignore_index, softcap, z_loss, any(wanted)),
            min(BLOCK, triton.next_power_of_2(V)),
            num_warps=8,
        )
        if dx_RD is not None:
            torch.mm(logits_CV, weight_VD, out=dx_RD[rows])
        if dweight_VD is not None:
            dweight_VD += logits_CV.T @ x_RD[rows]
    return per_row_2R.sum(1), dx_RD, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype)


def scaled(x_RD: Tensor, factor: Tensor) -> Tensor:
    """x · factor in the dtype of x. The factor, often one over a count, is not rounded to that
    dtype first, as torch's product would.
    """
    out_RD, n = torch.empty_like(x_RD), x_RD.numel()
    launch.run(scale, (triton.cdiv(n, BLOCK),), x_RD, factor, out_RD, n, BLOCK)
    return out_RD


def chunk_rows(R: int, D: int, V: int) -> int:
    """So many that the buffer is no larger than the inputs are,
    but enough to keep a matrix product busy.
    """
    return max(MIN_CHUNK, triton.next_power_of_2(max(1, R * D // V)))


# ---- kernels


@triton.jit
def _capped(logit_E, softcap):
    """softcap · tanh(logit / softcap), by a form that does not overflow;
    as it is without a softcap.
    """
    if softcap is not None:
        logit_E = softcap * (2.0 * tl.sigmoid(2.0 * logit_E / softcap) - 1.0)
    return logit_E


@triton.jit
def softmax_gradient(
    logits, labels, nats, z, factors, label_stride, V, ignore_index, softcap, z_loss,
    GRADIENT: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """One row: its loss and z-loss; with GRADIENT, that of factors · (loss, z-loss) takes the place
    of its logits.
    """
    r, e_E = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, E)
    logits += r * V
    label = tl.load(labels + r * label_stride)
    counted = label != ignore_index
    if counted:
        # a label out of range reads nothing and makes the loss NaN
        known = (label >= 0) & (label < V)
        at_label = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
        top, total = float("-inf"), 0.0
        for v0 in range(0, V, E):
            logit_E = _capped(
                tl.load(logits + v0 + e_E, mask=v0 + e_E < V, other=0.0).to(tl.float32), softcap
            )
            logit_E = tl.where(v0 + e_E < V, logit_E, float("-inf"))
            new = tl.maximum(top, tl.max(logit_E, 0))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(logit_E - new), 0)
            top = new
        norm = top + tl.log(total)
        tl.store(nats + r, norm - _capped(at_label, softcap))
        tl.store(z + r, z_loss * norm * norm)
        if GRADIENT:
            tl.debug_barrier()  # every warp has read the logit of the label before one writes there
            of_nats, of_z = tl.load(factors), tl.load(factors + 1) * 2.0 * z_loss * norm
            for v0 in range(0, V, E):
                inside_E = v0 + e_E < V
                logit_E = _capped(
                    tl.load(logits + v0 + e_E, mask=inside_E, other=0.0).to(tl.float32), softcap
                )
                slope_E = tl.exp(logit_E - norm) * (of_nats + of_z) - tl.where(
                    v0 + e_E == label, of_nats, 0.0
                )
                if softcap is not None:
                    slope_E *= 1.0 - (logit_E / softcap) * (logit_E / softcap)
                tl.store(logits + v0 + e_E, slope_E.to(logits.dtype.element_ty), mask=inside_E)
    elif GRADIENT:
        for v0 in range(0, V, E):
            tl.store(logits + v0 + e_E, tl.zeros((E,), logits.dtype.element_ty), mask=v0 + e_E < V)


@triton.jit
def scale(x, factor, out, n, E: tl.constexpr):
    """One block of a contiguous tensor times one float32."""
    at_E = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)
    x_E = tl.load(x + at_E, mask=at_E < n, other=0.0).to(tl.float32)
    tl.store(out + at_E, (x_E * tl.load(factor)).to(out.dtype.element_ty), mask=at_E < n)

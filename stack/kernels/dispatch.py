"""Which kernel runs on which device, and why. The model calls kernels only through here.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim, D features, F inner features
"""

import torch
from torch import Tensor

from stack.kernels import attention as sdpa
from stack.kernels import cross_entropy, eager


def attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, mask_B1TS: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The attention kernel of this device; same arguments as `stack.kernels.attention.attention`."""
    return sdpa.attention(q_BNTH, k_BKSH, v_BKSH, mask_B1TS=mask_B1TS, scale=scale)


def document_mask(first_BT: Tensor) -> Tensor:
    """The mask of packed rows; same arguments as `stack.kernels.reference.document_mask`."""
    return sdpa.document_mask(first_BT)


def window_mask(start: int, stop: int, window: int, device: torch.device | str) -> Tensor:
    """The mask of a sliding window; same arguments as `stack.kernels.attention.window_mask`."""
    return sdpa.window_mask(start, stop, window, device)


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation; same arguments as `stack.kernels.reference.rms_norm`."""
    return eager.rms_norm(x_BTD, weight_D, eps)


def rope(x_BNTH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Rotation of feature pairs by position."""
    return eager.rope(x_BNTH, cos_TJ, sin_TJ)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """The gated product; same arguments as `stack.kernels.reference.swiglu`."""
    return eager.swiglu(gate_BTF, up_BTF)


def linear_cross_entropy(x_RD: Tensor, head_VD: Tensor, labels_R: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Sum of −log softmax(x·headᵀ)[label] over labels that are not `ignore_index`, float32, shape ()."""
    return cross_entropy.linear_cross_entropy(x_RD, head_VD, labels_R, ignore_index=ignore_index)


def choices(device: torch.device | str) -> dict[str, str]:
    """Kernel chosen per operation on `device` with the reason, JSON-ready, for the record."""
    kind = torch.device(device).type
    reason = {
        "cpu": "torch's fused CPU attention, the only fused one there",
        "cuda": "torch chooses flash, efficient or cuDNN attention by shape and dtype",
    }.get(kind, f"no kernel of our own for {kind}")
    return {
        "attention": "torch.scaled_dot_product_attention",
        "attention_reason": reason,
        "document_attention": "torch.scaled_dot_product_attention, boolean mask",
        "document_attention_reason": "one mask per forward keeps packed documents apart on every device",
    }

"""Which kernel runs on which device, and why. The model calls kernels only through here.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim
"""

import torch
from torch import Tensor

from stack.kernels import attention


def causal_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """The attention kernel of this device; same arguments as `stack.kernels.reference.causal_attention`."""
    return attention.causal_attention(q_BNTH, k_BKSH, v_BKSH)


def document_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, mask_B1TT: Tensor) -> Tensor:
    """The attention kernel for packed rows; same arguments as `stack.kernels.reference.document_attention`."""
    return attention.document_attention(q_BNTH, k_BKTH, v_BKTH, mask_B1TT)


def document_mask(start_BT: Tensor) -> Tensor:
    """The mask of packed rows; same arguments as `stack.kernels.reference.document_mask`."""
    return attention.document_mask(start_BT)


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

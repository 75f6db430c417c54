"""Which kernel runs on which device, and why. The model calls kernels only through here.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim
"""

import torch
from torch import Tensor

from stack.kernels import attention


def causal_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """The attention kernel of this device; same arguments as `stack.kernels.reference.causal_attention`."""
    return attention.causal_attention(q_BNTH, k_BKSH, v_BKSH)


def choices(device: torch.device | str) -> dict[str, str]:
    """Kernel chosen per operation on `device` with the reason, JSON-ready, for the record."""
    kind = torch.device(device).type
    reason = {
        "cpu": "torch's fused CPU attention, the only fused one there",
        "cuda": "torch chooses flash, efficient or cuDNN attention by shape and dtype",
    }.get(kind, f"no kernel of our own for {kind}")
    return {"attention": "torch.scaled_dot_product_attention", "attention_reason": reason}

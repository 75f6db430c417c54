"""Causal attention through torch's fused scaled_dot_product_attention.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """softmax(q·k/√H + causal mask)·v. The T queries are the last T of S positions; query head n reads key/value head n // (N/K).

    Returns shape (B, N, T, H), dtype of the input. Oracle: `stack.kernels.reference.causal_attention`.
    """
    if q_BNTH.shape[2] == k_BKSH.shape[2]:
        return whole(q_BNTH, k_BKSH, v_BKSH)
    return continued(q_BNTH, k_BKSH, v_BKSH)


def whole(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """Queries for every position: training, and the first part of a generation."""
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=grouped(q_BNTH, k_BKSH))


def continued(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """Queries for the last T positions only; the earlier keys and values come from a cache."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    mask_TS = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_TS, enable_gqa=grouped(q_BNTH, k_BKSH))


def grouped(q_BNTH: Tensor, k_BKSH: Tensor) -> bool:
    """Whether several query heads share a key/value head."""
    return q_BNTH.shape[1] != k_BKSH.shape[1]

"""Causal attention, of whole rows and of documents packed into rows, through torch's fused scaled_dot_product_attention.

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


def document_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, mask_B1TT: Tensor) -> Tensor:
    """softmax(q·k/√H)·v over the keys that `mask_B1TT` (bool, query by key) allows; query head n reads key/value head n // (N/K).

    Returns shape (B, N, T, H), dtype of the input. Oracle: `stack.kernels.reference.document_attention`.
    """
    return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, attn_mask=mask_B1TT, enable_gqa=grouped(q_BNTH, k_BKTH))


def document_mask(start_BT: Tensor) -> Tensor:
    """Which keys each query may see, (B, 1, T, T) bool: its own and those back to `start_BT`, the first index of its document."""
    index_T = torch.arange(start_BT.shape[1], device=start_BT.device)
    return ((index_T <= index_T[:, None]) & (index_T >= start_BT[:, :, None]))[:, None]


def grouped(q_BNTH: Tensor, k_BKSH: Tensor) -> bool:
    """Whether several query heads share a key/value head."""
    return q_BNTH.shape[1] != k_BKSH.shape[1]

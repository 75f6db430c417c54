"""Causal attention, of whole rows and of packed or windowed ones, through torch's fused scaled_dot_product_attention.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, mask_B1TS: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q·k·scale)·v over the keys each query may see: those that `mask_B1TS` allows, or all up to its own position.

    The T queries are the last T of S positions; query head n reads key/value head n // (N/K); `scale` is 1/√H unless given.
    Returns shape (B, N, T, H), dtype of the input. Oracle: `stack.kernels.reference.attention`.
    """
    if mask_B1TS is not None:
        return document_attention(q_BNTH, k_BKSH, v_BKSH, mask_B1TS, scale=scale)
    if q_BNTH.shape[2] == k_BKSH.shape[2]:
        return whole(q_BNTH, k_BKSH, v_BKSH, scale=scale)
    return continued(q_BNTH, k_BKSH, v_BKSH, scale=scale)


def whole(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, scale: float | None = None) -> Tensor:
    """Queries for every position: training, and the first part of a generation."""
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, scale=scale, enable_gqa=grouped(q_BNTH, k_BKSH))


def continued(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, scale: float | None = None) -> Tensor:
    """Queries for the last T positions only; the earlier keys and values come from a cache."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    mask_TS = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_TS, scale=scale, enable_gqa=grouped(q_BNTH, k_BKSH))


def document_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_B1TS: Tensor, *, scale: float | None = None) -> Tensor:
    """Queries that see the keys `mask_B1TS` (bool, query by key) allows: packed documents, windows, blocks that skip tokens."""
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_B1TS, scale=scale, enable_gqa=grouped(q_BNTH, k_BKSH))


def document_mask(first_BT: Tensor) -> Tensor:
    """Which keys each query may see, (B, 1, T, T) bool: its own and those back to `first_BT`, where its document or window begins."""
    index_T = torch.arange(first_BT.shape[1], device=first_BT.device)
    return ((index_T <= index_T[:, None]) & (index_T >= first_BT[:, :, None]))[:, None]


def window_mask(start: int, stop: int, window: int, device: torch.device | str) -> Tensor:
    """Which of `stop` keys the queries `start … stop−1` may see, (1, 1, T, S) bool: `window` of them, the query's own included."""
    index_S, index_T = torch.arange(stop, device=device), torch.arange(start, stop, device=device)[:, None]
    return ((index_S <= index_T) & (index_S > index_T - window))[None, None]


def grouped(q_BNTH: Tensor, k_BKSH: Tensor) -> bool:
    """Whether several query heads share a key/value head."""
    return q_BNTH.shape[1] != k_BKSH.shape[1]

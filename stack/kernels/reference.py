"""Slow and plain: what the fast kernels must equal. Written from the definition, in whatever dtype comes in.

B batch, N query heads, K key/value heads, G = N/K query heads per key/value head, T queries, S keys, H head_dim
"""

import math

import torch
from torch import Tensor


def attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, start_BS: Tensor | None = None, window: int | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale·q·k)·v, one query at a time over the keys it may see; arguments as in `stack.kernels.attention.attention`.

    Query head n reads key/value head n // G. Returns (B, N, T, H), dtype of the input; exact to float64 rounding for float64 input.
    Source: arXiv:1706.03762, eq. 1; grouped heads: arXiv:2305.13245.
    """
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1], k_BKSH.shape[2]
    rows = []
    for b in range(B):
        for n in range(N):
            for p in range(S - T, S):
                low = max(0 if window is None else p - window + 1, 0 if start_BS is None else int(start_BS[b, p]), 0)
                k_SH, v_SH = k_BKSH[b, n // (N // K), low : p + 1], v_BKSH[b, n // (N // K), low : p + 1]
                scores_S = k_SH @ q_BNTH[b, n, p - S + T] * (1 / math.sqrt(H) if scale is None else scale)
                weights_S = (scores_S - scores_S.max()).exp()
                rows.append((weights_S / weights_S.sum()) @ v_SH)
    return torch.stack(rows).view(B, N, T, H)


def causal_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """softmax(q·k/√H + causal mask)·v. The T queries are the last T of S positions; query head n reads key/value head n // G.

    Returns shape (B, N, T, H), dtype of the input; exact to float64 rounding for float64 input.
    Source: Attention Is All You Need, arXiv:1706.03762, eq. 1; grouped heads: arXiv:2305.13245.
    """
    N, T, H = q_BNTH.shape[1:]
    K, S = k_BKSH.shape[1], k_BKSH.shape[2]
    out = torch.empty_like(q_BNTH)
    for n in range(N):
        k_BSH, v_BSH = k_BKSH[:, n // (N // K)], v_BKSH[:, n // (N // K)]
        for t in range(T):
            seen = S - T + t + 1
            scores_BS = torch.einsum("bh,bsh->bs", q_BNTH[:, n, t], k_BSH[:, :seen]) / math.sqrt(H)
            weights_BS = (scores_BS - scores_BS.amax(-1, keepdim=True)).exp()
            weights_BS = weights_BS / weights_BS.sum(-1, keepdim=True)
            out[:, n, t] = torch.einsum("bs,bsh->bh", weights_BS, v_BSH[:, :seen])
    return out


def document_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, mask_B1TT: Tensor) -> Tensor:
    """softmax(q·k/√H)·v over the keys that `mask_B1TT` (bool, query by key) allows; query head n reads key/value head n // G.

    Returns shape (B, N, T, H), dtype of the input; exact to float64 rounding for float64 input. One query at a time.
    """
    B, N, T, H = q_BNTH.shape
    G = N // k_BKTH.shape[1]
    out = torch.empty_like(q_BNTH)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                seen = mask_B1TT[b, 0, t].nonzero()[:, 0]
                scores_S = k_BKTH[b, n // G, seen] @ q_BNTH[b, n, t] / math.sqrt(H)
                weights_S = (scores_S - scores_S.max()).exp()
                out[b, n, t] = (weights_S / weights_S.sum()) @ v_BKTH[b, n // G, seen]
    return out


def document_mask(start_BT: Tensor) -> Tensor:
    """Which keys each query may see, (B, 1, T, T) bool: its own and those back to `start_BT`, the first index of its document."""
    B, T = start_BT.shape
    mask_B1TT = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            mask_B1TT[b, 0, t, int(start_BT[b, t]) : t + 1] = True
    return mask_B1TT


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """gate·sigmoid(gate)·up, element by element. Source: arXiv:2002.05202."""
    return gate_BTF / (1 + torch.exp(-gate_BTF)) * up_BTF


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis, in the dtype of the input. Source: arXiv:1910.07467."""
    return x_BTD / torch.sqrt((x_BTD * x_BTD).mean(-1, keepdim=True) + eps) * weight_D

"""Slow and plain: what the fast kernels must equal. Written from the definition, in whatever dtype comes in.

B batch, N query heads, K key/value heads, G = N/K query heads per key/value head, T queries, S keys, H head_dim
"""

import math

import torch
from torch import Tensor


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


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """gate·sigmoid(gate)·up, element by element. Source: arXiv:2002.05202."""
    return gate_BTF / (1 + torch.exp(-gate_BTF)) * up_BTF


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis, in the dtype of the input. Source: arXiv:1910.07467."""
    return x_BTD / torch.sqrt((x_BTD * x_BTD).mean(-1, keepdim=True) + eps) * weight_D

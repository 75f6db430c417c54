"""Slow and plain: what the fast kernels must equal.
Written from the definition, in whatever dtype comes in.

B batch, N query heads, K key/value heads, G = N/K query heads per key/value head, T queries,
S keys, H head_dim
"""

import math

import torch
from torch import Tensor


def attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    start_BS: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale·q·k)·v, one query at a time over the keys it may see; arguments as in
    `stackproof.kernels.attention.attention`.

    Query head n reads key/value head n // G. Returns (B, N, T, H), dtype of the input; exact to
    float64 rounding for float64 input. Source: arXiv:1706.03762, eq. 1; grouped heads:
    arXiv:2305.13245.
    """
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1], k_BKSH.shape[2]
    rows = []
    for b in range(B):
        for n in range(N):
            for p in range(S - T, S):
                low = max(
                    0 if window is None else p - window + 1,
                    0 if start_BS is None else int(start_BS[b, p]),
                    0,
                )
                k_SH, v_SH = (
                    k_BKSH[b, n // (N // K), low : p + 1],
                    v_BKSH[b, n // (N // K), low : p + 1],
                )
                scores_S = (
                    k_SH @ q_BNTH[b, n, p - S + T] * (1 / math.sqrt(H) if scale is None else scale)
                )
                weights_S = (scores_S - scores_S.max()).exp()
                rows.append((weights_S / weights_S.sum()) @ v_SH)
    return torch.stack(rows).view(B, N, T, H)


def causal_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """softmax(q·k/√H + causal mask)·v.
    The T queries are the last T of S positions; query head n reads key/value head n // G.

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
    """softmax(q·k/√H)·v over the keys that `mask_B1TT` (bool, query by key) allows; query head n
    reads key/value head n // G.

    Returns shape (B, N, T, H), dtype of the input; exact to float64 rounding for float64 input.
    One query at a time.
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
    """Which keys each query may see, (B, 1, T, T) bool: its own and those back to `start_BT`, the
    first index of its document.
    """
    B, T = start_BT.shape
    mask_B1TT = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            mask_B1TT[b, 0, t, int(start_BT[b, t]) : t + 1] = True
    return mask_B1TT


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """gate·sigmoid(gate)·up, element by element. Source: arXiv:2002.05202."""
    return gate_BTF / (1 + torch.exp(-gate_BTF)) * up_BTF


def linear(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias over the last axis, multiplied and summed in float64,
    rounded once to the dtype of the input.
    """
    y = x.double() @ weight_MD.double().T
    return (y if bias_M is None else y + bias_M.double()).to(x.dtype)


def rms_norm(
    x_BTD: Tensor, weight_D: Tensor, eps: float, residual_BTD: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight over the last axis, in the dtype of the input.
    Source: arXiv:1910.07467.

    With a residual, that of x + residual, and this sum as a second result.
    """
    total_BTD = x_BTD if residual_BTD is None else x_BTD + residual_BTD
    y_BTD = total_BTD / torch.sqrt((total_BTD * total_BTD).mean(-1, keepdim=True) + eps) * weight_D
    return y_BTD if residual_BTD is None else (y_BTD, total_BTD)


def rope(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (feature j, feature j + H/2) times a complex number of length one, by tables (T,
    H/2) or (B, 1, T, H/2).

    Source: RoFormer, arXiv:2104.09864, eq. 34.
    """
    J = x_BNTH.shape[-1] // 2
    turned_BNTJ = torch.complex(x_BNTH[..., :J], x_BNTH[..., J:]) * torch.complex(
        cos.to(x_BNTH.dtype), sin.to(x_BNTH.dtype)
    )
    return torch.cat((turned_BNTJ.real, turned_BNTJ.imag), -1)


def linear_cross_entropy(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Σ −log p(label) over labels that are not `ignore_index`, and z_loss · Σ (log normaliser)²,
    row by row, in the dtype of the input.
    """
    nats = z = x_RD.sum() * 0 + weight_VD.sum() * 0
    for x_D, label in zip(x_RD, labels_R.tolist()):
        if label == ignore_index:
            continue
        logits_V = weight_VD @ x_D
        if softcap is not None:
            logits_V = softcap * torch.tanh(logits_V / softcap)
        top = logits_V.max().detach()
        norm = top + (logits_V - top).exp().sum().log()
        nats, z = nats + norm - logits_V[label], z + z_loss * norm * norm
    return nats, z


def clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale `gradients` in place so that their norm is at most `max_norm`; return the norm.
    Source: arXiv:1211.5063, algorithm 1.
    """
    norm = torch.sqrt(sum((g * g).sum() for g in gradients))
    factor = max_norm / (norm + 1e-6)
    if factor < 1 and norm.isfinite():
        for g in gradients:
            g.copy_(g * factor)
    return norm


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """p -= lr·(m̂/(√v̂ + eps) + weight_decay·p) in place, `step` from 1.
    Source: arXiv:1711.05101, algorithm 2.
    """
    for p, g, m, v in zip(parameters, gradients, first_moments, second_moments):
        m.copy_(betas[0] * m + (1 - betas[0]) * g)
        v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
        m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        p.copy_(p - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p))

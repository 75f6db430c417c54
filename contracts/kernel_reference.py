"""Slow, simple references for the fast kernels, written from the definitions, in the dtype of the
input.

B batch, N query heads, K key/value heads, G = N/K query heads per key/value head, T queries, S
keys, H head_dim
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
    mask_B1TS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale·q·k)·v over the visible keys of each query; arguments as in
    `stackproof.kernels.attention.attention`.

    Query head n reads key/value head n // G. A query without a visible key gives zeros. Returns
    (B, N, T, H), dtype of the input. Source: arXiv:1706.03762, eq. 1; grouped heads:
    arXiv:2305.13245.
    """
    N, T, H = q_BNTH.shape[1:]
    K, S = k_BKSH.shape[1:3]
    k_BNSH, v_BNSH = (x.repeat_interleave(N // K, 1) for x in (k_BKSH, v_BKSH))
    scores_BNTS = q_BNTH @ k_BNSH.mT * (1 / math.sqrt(H) if scale is None else scale)
    seen = visible(T, S, start_BS, window, q_BNTH.device) if mask_B1TS is None else mask_B1TS
    blind = ~seen.any(-1, keepdim=True)  # softmax over no keys is undefined
    scores_BNTS = scores_BNTS.masked_fill(~(seen | blind), -math.inf)
    weights_BNTS = torch.exp(scores_BNTS - scores_BNTS.detach().amax(-1, keepdim=True))
    weights_BNTS = weights_BNTS / weights_BNTS.sum(-1, keepdim=True)
    return weights_BNTS.masked_fill(blind, 0) @ v_BNSH


def visible(
    T: int, S: int, start_BS: Tensor | None, window: int | None, device: torch.device | str = "cpu"
) -> Tensor:
    """Which of S keys are visible to each of the last T positions: bool, (T, S), or (B, 1, T, S)
    with documents.
    """
    s_S, p_T1 = torch.arange(S, device=device), torch.arange(S - T, S, device=device)[:, None]
    seen = s_S <= p_T1
    if window is not None:
        seen = seen & (s_S > p_T1 - window)
    return seen if start_BS is None else seen & (s_S >= start_BS[:, None, S - T :, None])


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """gate·sigmoid(gate)·up, element by element. Source: arXiv:2002.05202."""
    return gate_BTF / (1 + torch.exp(-gate_BTF)) * up_BTF


def linear(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias over the last axis, computed in float64 and rounded once to the dtype of the
    input.
    """
    bias_M = None if bias_M is None else bias_M.double()
    return biased(x.double() @ weight_MD.double().T, bias_M).to(x.dtype)


def biased(y: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """A product of a linear layer, with its bias."""
    return y if bias_M is None else y + bias_M


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
    """`cross_entropy` of the logits x·weightᵀ."""
    logits_RV = x_RD @ weight_VD.T
    return cross_entropy(
        logits_RV, labels_R, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss
    )


def cross_entropy(
    logits_RV: Tensor,
    labels_R: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Σ −log p(label) over labels that are not `ignore_index`, and z_loss · Σ (log normaliser)²,
    in the dtype of the logits.
    """
    kept_R = labels_R != ignore_index
    logits_RV = logits_RV[kept_R]
    if softcap is not None:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    norm_R = logits_RV.logsumexp(-1)
    at_label_R = logits_RV.gather(1, labels_R[kept_R][:, None])[:, 0]
    return (norm_R - at_label_R).sum(), z_loss * (norm_R * norm_R).sum()


REFERENCES = {
    function.__name__: function
    for function in (attention, swiglu, linear, rms_norm, rope, linear_cross_entropy)
}
# Those of operations that begin with the product x·weightᵀ, as functions of it.
AFTER_PRODUCT = {"linear": biased, "linear_cross_entropy": cross_entropy}

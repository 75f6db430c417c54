"""Causal attention, of whole rows and of documents packed into rows: by torch's fused kernel,
or on the CPU in chunks.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stackproof.kernels import chunked_attention
from stackproof.spec.errors import UsageError


def attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    start_BS: Tensor | None = None,
    window: int | None = None,
    mask_B1TS: Tensor | None = None,
    scale: float | None = None,
    chunks: bool = False,
) -> Tensor:
    """softmax(scale·q·k + mask)·v for the last T of S positions;
    query head n reads key/value head n // (N/K).

    The query at position p attends to keys s with max(start[p], p - window + 1) <= s <= p, where
    `start_BS` (int64, start[p] <= p) is the first index of each position's document. `mask_B1TS`
    (bool, query by key) takes the place of start and window where one mask was made for all layers.
    `scale` is 1/√H unless given. `chunks`: long rows by `chunked_attention`. Returns (B, N, T, H)
    in the dtype of the input. Raises UsageError for shapes that do not fit. Oracle:
    `stackproof.contracts.kernel_reference.attention`.
    """
    if mask_B1TS is not None:
        return document_attention(q_BNTH, k_BKSH, v_BKSH, mask_B1TS, scale=scale, chunks=chunks)
    check_shapes(q_BNTH, k_BKSH, v_BKSH, start_BS, window)
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    scaled = {} if scale is None else {"scale": scale}
    if start_BS is None and (window is None or window >= S):
        return (
            whole(q_BNTH, k_BKSH, v_BKSH, chunks=chunks, **scaled)
            if T == S
            else continued(q_BNTH, k_BKSH, v_BKSH, **scaled)
        )
    mask = document_mask(
        torch.zeros(1, S, dtype=torch.int64, device=q_BNTH.device) if start_BS is None else start_BS
    )
    if window is not None:
        index_S = torch.arange(S, device=q_BNTH.device)
        mask = mask & (index_S > index_S[:, None] - window)
    return document_attention(q_BNTH, k_BKSH, v_BKSH, mask[:, :, S - T :], chunks=chunks, **scaled)


def in_chunks(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, **options: Any) -> Tensor:
    """`attention`, long rows by `chunked_attention`."""
    return attention(q_BNTH, k_BKSH, v_BKSH, **options, chunks=True)


def check_shapes(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    start_BS: Tensor | None,
    window: int | None,
    *,
    max_head_dim: int | None = None,
) -> None:
    """Refuse shapes that are not those of one causal attention."""
    shapes = f"q {tuple(q_BNTH.shape)}, k {tuple(k_BKSH.shape)}, v {tuple(v_BKSH.shape)}"
    if not q_BNTH.ndim == k_BKSH.ndim == 4 or k_BKSH.shape != v_BKSH.shape:
        raise UsageError(
            "attention: shapes do not fit",
            value=shapes,
            allowed="q (B, N, T, H); k and v (B, K, S, H)",
        )
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    if (k_BKSH.shape[0], k_BKSH.shape[3]) != (B, H) or T > S or K == 0 or N % K:
        raise UsageError(
            "attention: shapes do not fit",
            value=shapes,
            allowed="same B and H, T at most S, K a divisor of N",
        )
    if not q_BNTH.dtype == k_BKSH.dtype == v_BKSH.dtype:
        raise UsageError(
            "attention: q, k and v differ in dtype",
            value=f"{q_BNTH.dtype}, {k_BKSH.dtype}, {v_BKSH.dtype}",
            allowed="one dtype",
        )
    if start_BS is not None and (start_BS.shape != (B, S) or start_BS.dtype != torch.int64):
        got = f"{tuple(start_BS.shape)} {start_BS.dtype}"
        raise UsageError(
            "attention: start does not fit",
            value=got,
            allowed=f"({B}, {S}) torch.int64, one number per position",
        )
    if window is not None and window < 1:
        raise UsageError(
            "attention: window", value=window, allowed="at least 1, the position itself"
        )
    if max_head_dim is not None and max_head_dim < H:
        raise UsageError(
            "attention: head_dim",
            value=H,
            allowed=f"at most {max_head_dim}",
            next_step='train.kernels.attention = "torch"',
        )


def whole(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    scale: float | None = None,
    chunks: bool = False,
) -> Tensor:
    """Queries for every position: training, and the first part of a generation."""
    return _attend(q_BNTH, k_BKSH, v_BKSH, None, scale, chunks)


def continued(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, scale: float | None = None
) -> Tensor:
    """Queries for the last T positions only; the earlier keys and values come from a cache."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    mask_TS = (
        None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
    )
    return _fused(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_TS, scale=scale)


def document_attention(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    mask_B1TT: Tensor,
    *,
    scale: float | None = None,
    chunks: bool = False,
) -> Tensor:
    """softmax(scale·q·k)·v over the keys that `mask_B1TT` (bool, query by key) allows; query head n
    reads key/value head n // (N/K).

    Returns shape (B, N, T, H), dtype of the input.
    Oracle: `stackproof.contracts.kernel_reference.attention`.
    """
    return _attend(q_BNTH, k_BKTH, v_BKTH, mask_B1TT, scale, chunks)


def document_mask(start_BT: Tensor) -> Tensor:
    """Which keys each query may see, (B, 1, T, T) bool: its own and those back to `start_BT`, the
    first index of its document.
    """
    index_T = torch.arange(start_BT.shape[1], device=start_BT.device)
    return ((index_T <= index_T[:, None]) & (index_T >= start_BT[:, :, None]))[:, None]


def window_mask(start: int, stop: int, window: int, device: torch.device | str) -> Tensor:
    """Which of `stop` keys the queries `start … stop−1` may see, (1, 1, T, S) bool: `window` of
    them, the query's own included.
    """
    index_S, index_T = (
        torch.arange(stop, device=device),
        torch.arange(start, stop, device=device)[:, None],
    )
    return ((index_S <= index_T) & (index_S > index_T - window))[None, None]


def _attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask_B1TS: Tensor | None,
    scale: float | None,
    chunks: bool,
) -> Tensor:
    """With `chunks` by `chunked_attention` where the shapes suit it, else by torch; without a mask,
    each query attends to all keys up to its own.
    """
    if chunks and chunked_attention.suits(q_BNTH, k_BKSH):
        return chunked_attention.attention(q_BNTH, k_BKSH, v_BKSH, mask_B1TS, scale)
    return _fused(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_B1TS, is_causal=mask_B1TS is None, scale=scale
    )


def _fused(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    attn_mask: Tensor | None = None,
    **options: object,
) -> Tensor:
    """torch's own. On CUDA only flash attention, which takes neither masks nor float32, shares
    heads without holding all scores.
    """
    shared = q_BNTH.shape[1] // max(1, k_BKSH.shape[1])
    if shared > 1 and q_BNTH.is_cuda and (attn_mask is not None or q_BNTH.dtype == torch.float32):
        k_BKSH, v_BKSH = (
            x[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (k_BKSH, v_BKSH)
        )
        shared = 1
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=attn_mask, enable_gqa=shared > 1, **options
    )

"""Statistics of attention scores, computed from the arguments of the attention function,
a few queries at a time.

B batch, T queries, S keys, N query heads, K key/value heads, H head_dim, Z = B·K,
R queries of one key head
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stackproof.kernels import attention
from stackproof.trace.scratch import BufferPool

CHUNK = 2**19  # scores in memory at once: fewer fit a smaller cache but start more operations
HIDDEN = -1e30  # a masked score: finite, so that its product with a weight of 0 is 0


@dataclass(frozen=True)
class Call:
    """One call of attention. `mask` is bool, or a number to add, broadcast to (B, N, T, S).

    If `causal`, keys up to t + offset are visible to query t.
    """

    q_BNTH: Tensor
    k_BKSH: Tensor
    scale: float
    mask: Tensor | None
    causal: bool
    offset: int = 0


def call_of(name: str, q: Tensor, k: Tensor, rest: tuple, options: dict[str, Any]) -> Call:
    """The arguments of `stackproof.kernels.dispatch.attention` or torch's
    scaled_dot_product_attention as a Call.
    """
    offset = 0  # torch aligns its causal mask at the first key
    if name == "attention":
        mask, window, start_BS = (options.get(k) for k in ("mask_B1TS", "window", "start_BS"))
        T, S = q.shape[2], k.shape[2]
        narrow = window is not None and window < S
        if mask is None and (start_BS is not None or narrow):
            if start_BS is None:
                start_BS = torch.zeros(1, S, dtype=torch.int64, device=q.device)
            mask = attention.document_mask(start_BS)[:, :, S - T :]
            if narrow:
                mask = mask & attention.window_mask(S - T, S, window, q.device)
        causal, offset = mask is None, S - T
        scale = options.get("scale")
    else:
        given = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale"), rest)) | options
        mask, causal, scale = (given.get(k) for k in ("attn_mask", "is_causal", "scale"))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Call(q, k, scale, mask, bool(causal), offset)


def figures(call: Call, pool: BufferPool) -> tuple[Tensor, Tensor]:
    """The largest score of each query and head, and the entropy of its weights in nats: two (B, T,
    N), at least float32.

    At most CHUNK scores are in memory at once. Both are 0 for a query without visible keys.
    """
    q_BNTH, k_BKSH = call.q_BNTH, call.k_BKSH
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    wide = torch.promote_types(q_BNTH.dtype, torch.float32)
    k_ZHS = k_BKSH.to(wide).transpose(-1, -2).flatten(0, 1)
    top_BNT, entropy_BNT = (
        torch.empty(B, N, T, dtype=wide, device=q_BNTH.device) for _ in range(2)
    )
    step = max(1, CHUNK // max(1, B * N * S))
    halves = pool.take(2 * B * N * min(T, step) * S, wide, q_BNTH.device).chunk(2)
    for first in range(0, T, step):
        last = min(T, first + step)
        n_keys = min(S, last + call.offset) if call.causal else S
        q_ZRH = (q_BNTH[:, :, first:last].to(wide) * call.scale).reshape(B * K, -1, H)
        scores, weights = (r[: B * N * (last - first) * n_keys] for r in halves)
        torch.bmm(q_ZRH, k_ZHS[..., :n_keys], out=scores.view(B * K, -1, n_keys))
        scores, weights = (r.view(B, N, last - first, n_keys) for r in (scores, weights))
        _hide(scores, call, first, last)
        top = top_BNT[:, :, first:last] = scores.amax(-1)
        torch.softmax(scores, -1, out=weights)
        # the largest weight is 1 over the sum of exp(score − top)
        normaliser = top - weights.amax(-1).log()
        entropy_BNT[:, :, first:last] = normaliser - scores.mul_(weights).sum(-1)
    blind = top_BNT <= HIDDEN / 2
    top_BNT.masked_fill_(blind, 0.0)
    entropy_BNT.masked_fill_(blind, 0.0)
    return top_BNT.transpose(1, 2), entropy_BNT.transpose(1, 2)


def _hide(scores: Tensor, call: Call, first: int, last: int) -> None:
    """Apply the mask to scores (B, N, queries, keys) in place."""
    n_keys = scores.shape[-1]
    if call.causal:  # earlier keys are visible to all queries of the chunk
        index_S = torch.arange(min(first + call.offset, n_keys), n_keys, device=scores.device)
        later = index_S > torch.arange(first, last, device=scores.device)[:, None] + call.offset
        scores[..., n_keys - len(index_S) :].masked_fill_(later, HIDDEN)
    if call.mask is None:
        return
    mask = (
        call.mask[..., first:last, :n_keys] if call.mask.shape[-2] > 1 else call.mask[..., :n_keys]
    )
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, HIDDEN)
    else:
        scores.add_(mask).clamp_(min=HIDDEN)

"""Attention on the CPU as products over the whole batch, some queries at a time,
forward and backward.

B batch, N query heads, K key/value heads, G = N/K, T queries, S keys, H head_dim, C queries of a
chunk, R = G·C rows of a product

torch's kernel for the CPU takes one head of one row after another, and its backward also computes
what a causal mask hides. Here scores of a chunk stay in the cache, and keys that are masked for
all its queries are left out. Only the inputs are kept for the backward, which computes the weights
again. The products are one operation to a compiler: it cannot fuse into them, and unrolling them
takes it long.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stackproof.kernels.custom_op import custom_op

LEAST_QUERIES = 128  # shorter rows gain nothing
LEAST_ROWS = 4  # B·G: with fewer, the products are too small
QUERIES = 64
SCORES_BYTES = 8 * 2**20


def suits(q_BNTH: Tensor, k_BKSH: Tensor) -> bool:
    """Whether this is the faster way: on the CPU, in full precision without autocast,
    for long rows.
    """
    (B, N, T, _), K = q_BNTH.shape, max(1, k_BKSH.shape[1])
    plain = (
        q_BNTH.device.type == "cpu"
        and q_BNTH.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )
    return plain and T >= LEAST_QUERIES and B * N // K >= LEAST_ROWS


def attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask_B1TS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale·q·k)·v over the keys that the mask allows (bool, query by key), without a mask
    over all up to the query's own place.

    Query head n reads key/value head n // G; a query without a visible key gives zeros. Float32 or
    float64, any strides. Returns (B, N, T, H) in that type, laid out as (B, T, N, H). Has no second
    derivative. Oracle: `stackproof.contracts.kernel_reference.attention`.
    """
    return _forward(
        q_BNTH, k_BKSH, v_BKSH, mask_B1TS, q_BNTH.shape[-1] ** -0.5 if scale is None else scale
    )


def _heads_last(x_BNTH: Tensor) -> Tensor:
    """Fresh memory of this shape, in the order (B, T, N, H). No view, because a view that an
    operation returns must not be changed in place.
    """
    B, N, T, H = x_BNTH.shape
    return x_BNTH.new_empty_strided((B, N, T, H), (T * N * H, H, N * H, 1))


@custom_op(
    "stackproof::chunked_attention", lambda q, k, v, mask, scale: _heads_last(q), derived=True
)
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    (B, K, _, H), G = k.shape, q.shape[1] // k.shape[1]
    (mask, blind), out = _with_sight(mask), _heads_last(q)
    q_BKGTH, out_BKGTH = (x.unflatten(1, (K, G)) for x in (q, out))
    for queries, keys, bias in _chunks(q, k, mask):
        for h in range(K):
            q_BRH = q_BKGTH[:, h, :, queries].flatten(1, 2)
            weights_BRS = _weights(q_BRH, k[:, h, keys], bias, scale)
            out_BKGTH[:, h, :, queries] = torch.bmm(weights_BRS, v[:, h, keys]).view(B, G, -1, H)
    return out if blind is None else out.masked_fill_(blind, 0)


@custom_op(
    "stackproof::chunked_attention_backward",
    lambda grad, *qkv: tuple(_heads_last(x) for x in qkv[:3]),
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (B, K, S, H), G = k.shape, q.shape[1] // k.shape[1]
    # of keys and values one (B, S, H) per head
    (mask, blind), dq, dk, dv = _with_sight(mask), _heads_last(q), [], []
    if blind is not None:
        grad = grad.masked_fill(blind, 0)
    grad_BKGTH, q_BKGTH, dq_BKGTH = (x.unflatten(1, (K, G)) for x in (grad, q, dq))
    chunks = list(_chunks(q, k, mask))[::-1]  # the last queries see most keys
    for h in range(K):
        dk_BSH = dv_BSH = None
        for queries, keys, bias in chunks:
            q_BRH, grad_BRH = (x[:, h, :, queries].flatten(1, 2) for x in (q_BKGTH, grad_BKGTH))
            k_BSH, v_BSH = k[:, h, keys], v[:, h, keys]
            weights_BRS = _weights(q_BRH, k_BSH, bias, scale)
            slope_BRS = torch.bmm(grad_BRH, v_BSH.mT)
            torch.ops.aten._softmax_backward_data.out(
                slope_BRS, weights_BRS, -1, q.dtype, grad_input=slope_BRS
            )
            dq_BKGTH[:, h, :, queries] = _product(slope_BRS, k_BSH, scale).view(B, G, -1, H)
            dk_BSH = _added(dk_BSH, _product(slope_BRS.mT, q_BRH, scale), keys, S)
            dv_BSH = _added(dv_BSH, torch.bmm(weights_BRS.mT, grad_BRH), keys, S)
        dk.append(dk_BSH)
        dv.append(dv_BSH)
    return dq, torch.stack(dk, 2).transpose(1, 2), torch.stack(dv, 2).transpose(1, 2)


def _with_sight(mask_B1TS: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask with queries that see no key seeing all, as there is no softmax over nothing; and
    which they are, (B, 1, T, 1), if any.
    """
    if mask_B1TS is None or bool((seeing_B1T1 := mask_B1TS.any(-1, keepdim=True)).all()):
        return mask_B1TS, None
    return mask_B1TS | ~seeing_B1T1, ~seeing_B1T1


def _added(sum_BSH: Tensor | None, part_BJH: Tensor, keys: slice, S: int) -> Tensor:
    """The sum with this part of the S keys in it; the first part begins it."""
    if sum_BSH is None:
        return F.pad(part_BJH, (0, 0, keys.start, S - keys.stop))
    sum_BSH[:, keys].add_(part_BJH)
    return sum_BSH


def _weights(q_BRH: Tensor, k_BSH: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale·q·k + bias), (B, R, S); the bias is that of the last keys."""
    scores_BRS = _product(q_BRH, k_BSH.mT, scale)
    B, _, S = scores_BRS.shape
    scores_BRS.view(B, -1, bias.shape[-2], S)[..., S - bias.shape[-1] :].add_(bias)
    return torch.ops.aten._softmax.out(scores_BRS, -1, False, out=scores_BRS)


def _product(a_BMX: Tensor, b_BXN: Tensor, scale: float) -> Tensor:
    """scale·a·b in one pass, (B, M, N)."""
    return a_BMX.new_empty(*a_BMX.shape[:2], b_BXN.shape[2]).baddbmm_(
        a_BMX, b_BXN, beta=0, alpha=scale
    )


def _chunks(
    q_BNTH: Tensor, k_BKSH: Tensor, mask_B1TS: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the range of keys visible to any of them, and 0 or −∞ for the last of these: (C, C),
    or all, (B, 1, C, keys).
    """
    (B, N, T, _), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    C = QUERIES
    while C > 16 and B * (N // K) * C * S * q_BNTH.element_size() > SCORES_BYTES:
        C //= 2
    triangle_CC = q_BNTH.new_full((C, C), -torch.inf).triu_(1)
    seen_TS = None if mask_B1TS is None else mask_B1TS.any(0)[0]
    for start in range(0, T, C):
        stop = min(start + C, T)
        if mask_B1TS is None:
            size = stop - start
            yield slice(start, stop), slice(0, S - T + stop), triangle_CC[:size, :size]
            continue
        seen_S = seen_TS[start:stop].any(0).nonzero()
        keys = slice(int(seen_S[0]), int(seen_S[-1]) + 1)
        hidden = ~mask_B1TS[:, :, start:stop, keys]
        yield (
            slice(start, stop),
            keys,
            torch.zeros(hidden.shape, dtype=q_BNTH.dtype).masked_fill_(hidden, -torch.inf),
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_forward.derive(_gradients, _save)

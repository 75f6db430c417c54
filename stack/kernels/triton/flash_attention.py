"""Causal attention in tiles that never holds a row of scores: Triton, forward and backward.

B batch, N query heads, K key/value heads, G = N/K, T queries, S keys, H head_dim,
E head_dim padded to a power of two

The kernels are in `flash_attention_kernels`.
Source: FlashAttention-2, arXiv:2307.08691; grouped heads: arXiv:2305.13245.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackproof.kernels.attention import check_shapes, document_attention
from stackproof.kernels.triton import flash_attention_kernels as kernels
from stackproof.kernels.triton import launch
from stackproof.spec.errors import EnvironmentUnfit


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps that share it, and stages of the pipeline
    that loads the next ones.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# (bytes per number, padded features) -> forward, dq, dk and dv.
# Chosen so that few registers spill on sm_80 and sm_90, not by timings.
TILES = {
    (2, 32): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    (2, 64): (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (2, 128): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    (2, 256): (Tile(128, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (4, 32): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 8, 1)),
    (4, 64): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (4, 128): (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
    (4, 256): (Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


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
    """softmax(scale·q·k + mask)·v for the last T of S positions;
    query head n reads key/value head n // G.

    The query at position p attends to keys s with max(start[p], p - window + 1) <= s <= p, where
    `start_BS` (int64, start[p] <= p) is the first index of each position's document. `scale` is
    1/√H unless given. bfloat16, float16 or float32, any strides, H up to 256. Sums in float32;
    float32 products are not rounded to TF32. Returns (B, N, T, H) in the dtype of the input, laid
    out as (B, T, N, H). Raises UsageError for shapes or dtypes that do not fit, EnvironmentUnfit
    where Triton cannot run. With `mask_B1TS`, whose keys may be no range, it is torch's own.
    Oracle: `stackproof.contracts.kernel_reference.attention`.
    """
    if mask_B1TS is not None:
        return document_attention(q_BNTH, k_BKSH, v_BKSH, mask_B1TS, scale=scale)
    check_shapes(q_BNTH, k_BKSH, v_BKSH, start_BS, window, max_head_dim=256)
    launch.require("attention", {"q": q_BNTH, "k": k_BKSH, "v": v_BKSH, "start": start_BS})
    refuse_broken_dot(q_BNTH)
    scale = q_BNTH.shape[-1] ** -0.5 if scale is None else scale
    return FlashAttention.apply(q_BNTH, k_BKSH, v_BKSH, start_BS, window, scale)


def refuse_broken_dot(x: Tensor) -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16 as if they
    were integers (seen in 3.9).
    """
    if x.dtype != torch.bfloat16 or x.is_cuda:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    if not hasattr(InterpreterBuilder.create_dot, "widens_bfloat16"):
        raise EnvironmentUnfit(
            "Triton's interpreter multiplies bfloat16 wrongly",
            allowed="float16 or float32 in the interpreter, any of the three on a GPU",
        )


class FlashAttention(torch.autograd.Function):
    """The kernels as one differentiable operation; saves q, k, v,
    the output and one float32 per query.
    """

    @staticmethod
    def forward(ctx, q_BNTH, k_BKSH, v_BKSH, start_BS, window, scale):
        B, N, T, _ = q_BNTH.shape
        out_BNTH, lse_BNT = heads_last(q_BNTH), q_BNTH.new_empty(B, N, T, dtype=torch.float32)
        call = Call.of(q_BNTH, k_BKSH, window, scale)
        tile, tensors = call.tiles()[0], (q_BNTH, k_BKSH, v_BKSH, out_BNTH)
        launch.run(
            kernels.forward,
            (triton.cdiv(T, tile.queries) * B * N,),
            *(*tensors, lse_BNT, start_BS),
            *(*(x.stride() for x in tensors), launch.strides(start_BS)),
            *call.sizes(),
            **call.options(tile),
        )
        ctx.save_for_backward(q_BNTH, k_BKSH, v_BKSH, out_BNTH, lse_BNT, start_BS)
        ctx.call = call
        return out_BNTH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BNTH):
        q_BNTH, k_BKSH, v_BKSH, out_BNTH, lse_BNT, start_BS = ctx.saved_tensors
        call = ctx.call
        dq_BNTH, dk_BKSH, dv_BKSH = heads_last(q_BNTH), heads_last(k_BKSH), heads_last(v_BKSH)
        if not q_BNTH.numel():
            return dq_BNTH, dk_BKSH.zero_(), dv_BKSH.zero_(), None, None, None
        B, N, T, _ = q_BNTH.shape
        K, S = k_BKSH.shape[1], k_BKSH.shape[2]
        delta_BNT = torch.empty_like(lse_BNT)
        stop_BS = None if start_BS is None else last_readers(start_BS)
        inputs = (q_BNTH, k_BKSH, v_BKSH, grad_BNTH, lse_BNT, delta_BNT, start_BS, stop_BS)
        strides = (*(x.stride() for x in inputs[:4]), launch.strides(start_BS))
        _, by_query, by_key = call.tiles()
        launch.run(
            kernels.row_delta,
            (triton.cdiv(T, 64) * B * N,),
            *(out_BNTH, grad_BNTH, delta_BNT, out_BNTH.stride(), grad_BNTH.stride(), N, T),
            **{"H": call.H, "E": call.E, "M": 64},
        )
        launch.run(
            kernels.backward_q,
            (triton.cdiv(T, by_query.queries) * B * N,),
            *(*inputs, dq_BNTH, *strides, dq_BNTH.stride(), *call.sizes()),
            **call.options(by_query),
        )
        launch.run(
            kernels.backward_kv,
            (triton.cdiv(S, by_key.keys) * B * K,),
            *(*inputs, dk_BKSH, dv_BKSH, *strides, dk_BKSH.stride(), dv_BKSH.stride()),
            *call.sizes(),
            **call.options(by_key),
        )
        return dq_BNTH, dk_BKSH, dv_BKSH, None, None, None


@dataclass(frozen=True)
class Call:
    """What is the same for all kernels of one attention."""

    N: int
    G: int
    T: int
    S: int
    H: int
    E: int
    itemsize: int
    window: int | None
    scale: float

    @classmethod
    def of(cls, q_BNTH: Tensor, k_BKSH: Tensor, window: int | None, scale: float) -> "Call":
        N, T, H = q_BNTH.shape[1:]
        K, S = k_BKSH.shape[1:3]
        E = max(32, triton.next_power_of_2(H))
        return cls(N, N // K, T, S, H, E, q_BNTH.element_size(), window, scale)

    def tiles(self) -> tuple[Tile, Tile, Tile]:
        return TILES[self.itemsize, self.E]

    def sizes(self) -> tuple:
        """N, G, T, S, window and scale, in the order of the kernels' arguments."""
        return self.N, self.G, self.T, self.S, self.window, self.scale

    def options(self, tile: Tile) -> dict:
        # only read where the inputs are float32
        precision = "ieee" if self.itemsize == 4 else "tf32"
        sizes = {"H": self.H, "E": self.E, "M": tile.queries, "J": tile.keys}
        launched = {"num_warps": tile.warps, "num_stages": tile.stages}
        return sizes | {"PRECISION": precision} | launched


def heads_last(x_BNTH: Tensor) -> Tensor:
    """Empty, same shape, laid out as (B, T, N, H): what the projections around attention read
    and write without a copy.
    """
    B, N, T, H = x_BNTH.shape
    return x_BNTH.new_empty(B, T, N, H).transpose(1, 2)


def last_readers(start_BS: Tensor) -> Tensor:
    """For each key one past the last position whose document begins at or before it, (B, S) int32;
    starts need not be ordered.
    """
    earliest_BS = start_BS.flip(1).cummin(1).values.flip(1).contiguous()
    index_BS = (
        torch.arange(start_BS.shape[1], device=start_BS.device).expand_as(start_BS).contiguous()
    )
    return torch.searchsorted(earliest_BS, index_BS, right=True, out_int32=True)

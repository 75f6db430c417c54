"""Grouped-query attention: softmax and differential.

B batch, T tokens, S keys, D d_model, N query heads, K key/value heads, H head_dim, J rotated pairs
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.config import ModelConfig
from stackproof.kernels import dispatch
from stackproof.model.forward_context import ForwardContext
from stackproof.model.init import Linear, empty_parameter
from stackproof.model.norm import RMSNorm
from stackproof.model.positions import rotate


class Projections(nn.Module):
    """Projections of queries, keys, values and output (arXiv:2305.13245).

    Query head n reads key/value head n // (N/K). Each query and key head has `n_parts` equal parts;
    norm and rotation act on each part.
    """

    n_parts = 1

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        a = cfg.attention
        q_width, kv_width = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.layer, self.head_dim = layer, cfg.head_dim
        self.q = Linear(cfg.d_model, q_width, bias=a.qkv_bias)
        self.k = Linear(cfg.d_model, kv_width, bias=a.qkv_bias)
        self.v = Linear(cfg.d_model, kv_width, bias=a.qkv_bias)
        self.out = Linear(q_width, cfg.d_model, bias=a.out_bias)
        if a.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim // self.n_parts, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim // self.n_parts, cfg.norm_eps)

    def heads(self, x_BTE: Tensor) -> Tensor:
        """Split the last axis into heads: (B, T, heads·H) → (B, heads, T, H)."""
        return x_BTE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def placed(self, x_BTE: Tensor, norm: RMSNorm | None, context: ForwardContext) -> Tensor:
        """Query or key heads (B, heads, T, H): each part normalised if declared, then rotated."""
        x_BPTE = x_BTE.unflatten(-1, (-1, self.head_dim // self.n_parts)).transpose(1, 2)
        if norm is not None:
            x_BPTE = norm(x_BPTE)
        if context.rotary is not None:
            x_BPTE = rotate(x_BPTE, *context.rotary)
        return x_BPTE if self.n_parts == 1 else self.heads(x_BPTE.transpose(1, 2).flatten(2))

    def qkv(self, x_BTD: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, T, H) of these tokens, keys and values (B, K, S, H) of all so far."""
        q_BNTH = self.placed(self.q(x_BTD), getattr(self, "q_norm", None), context)
        k_BKTH = self.placed(self.k(x_BTD), getattr(self, "k_norm", None), context)
        v_BKTH = self.heads(self.v(x_BTD))
        if context.cache is None:
            return q_BNTH, k_BKTH, v_BKTH
        return q_BNTH, *context.cache.layers[self.layer].append(k_BKTH, v_BKTH)


class SoftmaxAttention(Projections):
    """softmax(q·k/√H)·v over the visible keys."""

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """Mix each token with those before it; same shape and dtype as `x_BTD`."""
        mixed_BNTH = dispatch.attention(*self.qkv(x_BTD, context), **context.visible())
        return self.out(mixed_BNTH.transpose(1, 2).flatten(2))


class DifferentialAttention(Projections):
    """The difference of two softmax maps, one from each half of a head (arXiv:2410.05258).

    Both maps come from one kernel call with twice the heads; halves are padded with zeros to the
    width of the values.
    """

    n_parts = 2

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        half = cfg.head_dim // 2
        self.form = cfg.attention.form
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        if self.form == "paper":
            self.lambda_q1, self.lambda_k1 = empty_parameter(half), empty_parameter(half)
            self.lambda_q2, self.lambda_k2 = empty_parameter(half), empty_parameter(half)
            self.head_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        else:
            self.lambda_weight = empty_parameter(1)

    def lambda_(self) -> Tensor:
        """Weight of the second map, float32 or wider, shape () or (1,)."""
        if self.form == "scalar":
            return self.lambda_weight
        first = (self.lambda_q1 * self.lambda_k1).sum()
        second = (self.lambda_q2 * self.lambda_k2).sum()
        return first.exp() - second.exp() + self.lambda_init

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """Mix each token with those before it; same shape and dtype as `x_BTD`."""
        q_BNTH, k_BKSH, v_BKSH = self.qkv(x_BTD, context)
        mixed = dispatch.attention(
            self.parts(q_BNTH),
            self.parts(k_BKSH),
            torch.cat((v_BKSH, v_BKSH), 1),
            **context.visible(),
            scale=(self.head_dim // 2) ** -0.5,
        )
        first_BNTH, second_BNTH = mixed.chunk(2, 1)
        mixed_BNTH = first_BNTH - self.lambda_().to(mixed.dtype) * second_BNTH
        if self.form == "paper":
            mixed_BNTH = self.head_norm(mixed_BNTH) * (1 - self.lambda_init)
        return self.out(mixed_BNTH.transpose(1, 2).flatten(2))

    def parts(self, x_BNTH: Tensor) -> Tensor:
        """First halves of all heads, then second halves, zero-padded: (B, 2·heads, T, H)."""
        return F.pad(torch.cat(x_BNTH.chunk(2, -1), 1), (0, self.head_dim // 2))

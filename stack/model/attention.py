"""Grouped-query attention. B batch, T tokens, S keys, D d_model, N query heads, K key/value heads,
H head_dim, J rotated pairs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.config import ModelConfig
from stackproof.kernels import dispatch
from stackproof.model.init import Linear, Parameter
from stackproof.model.norm import RMSNorm
from stackproof.model.reading import Reading
from stackproof.model.rotary import rotate


class Projections(nn.Module):
    """Queries, keys, values and output; query head n reads key/value head n // (N/K).
    Source: arXiv:2305.13245.

    `n_parts` is into how many equal parts each query and key head falls;
    norm and rotation act on a part.
    """

    n_parts = 1

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        a, q_width, kv_width = (
            cfg.attention,
            cfg.n_heads * cfg.head_dim,
            cfg.n_kv_heads * cfg.head_dim,
        )
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

    def placed(self, x_BTE: Tensor, norm: RMSNorm | None, reading: Reading) -> Tensor:
        """Heads of queries or keys, each part normalised if declared and turned by its position:
        (B, heads, T, H).
        """
        x_BPTE = x_BTE.unflatten(-1, (-1, self.head_dim // self.n_parts)).transpose(1, 2)
        if norm is not None:
            x_BPTE = norm(x_BPTE)
        if reading.rotary is not None:
            x_BPTE = rotate(x_BPTE, *reading.rotary)
        return x_BPTE if self.n_parts == 1 else self.heads(x_BPTE.transpose(1, 2).flatten(2))

    def qkv(self, x_BTD: Tensor, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, T, H) of these tokens, keys and values (B, K, S, H) of all so far."""
        q_BNTH = self.placed(self.q(x_BTD), getattr(self, "q_norm", None), reading)
        k_BKTH = self.placed(self.k(x_BTD), getattr(self, "k_norm", None), reading)
        v_BKTH = self.heads(self.v(x_BTD))
        if reading.cache is None:
            return q_BNTH, k_BKTH, v_BKTH
        return q_BNTH, *reading.cache.layers[self.layer].append(k_BKTH, v_BKTH)


class SoftmaxAttention(Projections):
    """softmax(q·k/√H)·v over the keys a query may see."""

    def forward(self, x_BTD: Tensor, reading: Reading) -> Tensor:
        """Mix each position with those before it; same shape and dtype as `x_BTD`."""
        mixed_BNTH = dispatch.attention(*self.qkv(x_BTD, reading), **reading.visible())
        return self.out(mixed_BNTH.transpose(1, 2).flatten(2))


class DifferentialAttention(Projections):
    """The difference of two softmax maps: each head's first half of features makes one,
    its second half the other.

    Both maps come from one call with twice the heads; parts are padded with zeros to the width of
    the values. Source: arXiv:2410.05258.
    """

    n_parts = 2

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        half = cfg.head_dim // 2
        self.form, self.lambda_init = cfg.attention.form, 0.8 - 0.6 * math.exp(-0.3 * layer)
        if self.form == "paper":
            self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
                Parameter(half) for _ in range(4)
            )
            self.head_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        else:
            self.lambda_weight = Parameter(1)

    def lambda_(self) -> Tensor:
        """Weight of the second map, float32 or wider, shape () or (1,)."""
        if self.form == "scalar":
            return self.lambda_weight
        first, second = (
            (self.lambda_q1 * self.lambda_k1).sum(),
            (self.lambda_q2 * self.lambda_k2).sum(),
        )
        return first.exp() - second.exp() + self.lambda_init

    def forward(self, x_BTD: Tensor, reading: Reading) -> Tensor:
        """Mix each position with those before it; same shape and dtype as `x_BTD`."""
        q_BNTH, k_BKSH, v_BKSH = self.qkv(x_BTD, reading)
        mixed = dispatch.attention(
            self.parts(q_BNTH),
            self.parts(k_BKSH),
            torch.cat((v_BKSH, v_BKSH), 1),
            **reading.visible(),
            scale=(self.head_dim // 2) ** -0.5,
        )
        first_BNTH, second_BNTH = mixed.chunk(2, 1)
        mixed_BNTH = first_BNTH - self.lambda_().to(mixed.dtype) * second_BNTH
        if self.form == "paper":
            mixed_BNTH = self.head_norm(mixed_BNTH) * (1 - self.lambda_init)
        return self.out(mixed_BNTH.transpose(1, 2).flatten(2))

    def parts(self, x_BNTH: Tensor) -> Tensor:
        """First halves of all heads, then second halves, each padded with zeros: (B, 2·heads, T,
        H).
        """
        return F.pad(torch.cat(x_BNTH.chunk(2, -1), 1), (0, self.head_dim // 2))

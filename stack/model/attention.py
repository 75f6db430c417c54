"""Grouped-query attention. B batch, T tokens, D d_model, N query heads, K key/value heads, H head_dim, J = H/2."""

from torch import Tensor, nn

from stack.config import ModelConfig
from stack.kernels import dispatch
from stack.model.cache import KVCache
from stack.model.init import Linear
from stack.model.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention without biases; query head n reads key/value head n // (N/K). Source: arXiv:2305.13245."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, cfg.head_dim
        self.q = Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=False)
        self.k = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.v = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.out = Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None, mask_B1TT: Tensor | None = None
    ) -> Tensor:
        """Mix each position with those before it. `rotary` holds cosine and sine (T, J) of the positions of `x_BTD`.

        In packed rows `rotary` is (B, 1, T, J) and `mask_B1TT` says which earlier positions belong to the same document.
        """
        q_BNTH = rotate(self.heads(self.q(x_BTD)), *rotary)
        k_BKTH = rotate(self.heads(self.k(x_BTD)), *rotary)
        v_BKTH = self.heads(self.v(x_BTD))
        if cache is not None:
            k_BKTH, v_BKTH = cache.append(self.layer, k_BKTH, v_BKTH)
        if mask_B1TT is None:
            mixed_BNTH = dispatch.causal_attention(q_BNTH, k_BKTH, v_BKTH)
        else:
            mixed_BNTH = dispatch.document_attention(q_BNTH, k_BKTH, v_BKTH, mask_B1TT)
        return self.out(mixed_BNTH.transpose(1, 2).flatten(2))

    def heads(self, x_BTE: Tensor) -> Tensor:
        """Split the last axis into heads: (B, T, heads·H) → (B, heads, T, H)."""
        return x_BTE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

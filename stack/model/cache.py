"""Keys and values of the tokens already read.
B batch, K key/value heads, T new tokens, S tokens so far, H head_dim.
"""

import torch
from torch import Tensor

from stackproof.config import ModelConfig
from stackproof.spec.errors import UsageError


class LayerCache:
    """Preallocated keys and values of one layer.
    A layer that skips tokens holds fewer of them, with their positions and all scores.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype):
        self.store = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.filled = 0
        self.score_BT: Tensor | None = None
        self.position_BS: Tensor | None = None

    def append(self, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the filled places; returns all of them, (B, K, S,
        H) each.

        Raises UsageError beyond the context length.
        """
        stop, room = self.filled + k_BKTH.shape[2], self.store.shape[3]
        if stop > room:
            raise UsageError(
                "the cache is full", value=f"{stop} positions", allowed=f"max_seq_len = {room}"
            )
        self.store[0, :, :, self.filled : stop] = k_BKTH
        self.store[1, :, :, self.filled : stop] = v_BKTH
        self.filled = stop
        k_BKSH, v_BKSH = self.store[:, :, :, :stop]
        return k_BKSH, v_BKSH


class KVCache:
    """The caches of all layers, and how many positions have been read."""

    def __init__(
        self,
        cfg: ModelConfig,
        batch_size: int = 1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (batch_size, cfg.n_kv_heads, cfg.max_seq_len, cfg.head_dim)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(cfg.n_layers)]
        self.length = 0

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished forward."""
        self.length += n_tokens

    def bytes(self) -> int:
        """Memory of keys and values, bytes."""
        return sum(c.store.numel() * c.store.element_size() for c in self.layers)

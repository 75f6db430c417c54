"""Keys and values of the positions already read. B batch, K key/value heads, T new tokens, S tokens so far, H head_dim."""

import torch
from torch import Tensor

from spec.errors import UsageError
from stack.config import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer, and how many positions are filled.

    A forward appends in each layer and advances once at its end, so all layers of one forward write the same positions.
    """

    def __init__(self, cfg: ModelConfig, batch_size: int = 1, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        shape = (cfg.n_layers, 2, batch_size, cfg.n_kv_heads, cfg.max_seq_len, cfg.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.length, self.max_seq_len = 0, cfg.max_seq_len

    def append(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write this layer's new keys and values behind the filled positions; returns all of them, (B, K, S, H) each.

        Raises UsageError beyond the context length.
        """
        stop = self.length + k_BKTH.shape[2]
        if stop > self.max_seq_len:
            raise UsageError("the cache is full", value=f"{stop} positions", allowed=f"max_seq_len = {self.max_seq_len}")
        self.store[layer, 0, :, :, self.length : stop] = k_BKTH
        self.store[layer, 1, :, :, self.length : stop] = v_BKTH
        k_BKSH, v_BKSH = self.store[layer, :, :, :, :stop]
        return k_BKSH, v_BKSH

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished forward."""
        self.length += n_tokens

    def bytes(self) -> int:
        """Memory of keys and values, bytes."""
        return self.store.numel() * self.store.element_size()

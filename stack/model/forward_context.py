"""Data that all blocks of one forward share or report: positions, masks, KV cache, expert loads.

B batch, K key/value heads, T new tokens, S keys so far, H head_dim, E experts, J rotated pairs
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stackproof.config import ModelConfig
from stackproof.model.dropout import Places
from stackproof.spec.errors import UsageError


class LayerCache:
    """Keys and values of one layer, in memory that the first of them allocate for all: with tensor
    parallelism a rank has some of the heads.

    A layer with hard capacity holds those of the tokens it read, their positions, and all scores.
    """

    def __init__(self, room: int, device: torch.device | str, dtype: torch.dtype):
        self.room, self.device, self.dtype = room, device, dtype
        self.store: Tensor | None = None
        self.filled = 0
        self.score_BT: Tensor | None = None
        self.position_BS: Tensor | None = None

    def append(self, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them, (B, K, S, H) each.

        Raises UsageError beyond the context length.
        """
        stop = self.filled + k_BKTH.shape[2]
        if stop > self.room:
            raise UsageError(
                "the cache is full", value=f"{stop} positions", allowed=f"max_seq_len = {self.room}"
            )
        if self.store is None:
            n_rows, n_heads, _, width = k_BKTH.shape
            shape = (2, n_rows, n_heads, self.room, width)
            self.store = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self.store[0, :, :, self.filled : stop] = k_BKTH
        self.store[1, :, :, self.filled : stop] = v_BKTH
        self.filled = stop
        k_BKSH, v_BKSH = self.store[:, :, :, :stop]
        return k_BKSH, v_BKSH


class KVCache:
    """The KV caches of all layers, and how many positions they hold."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.layers = [LayerCache(cfg.max_seq_len, device, dtype) for _ in range(cfg.n_layers)]
        self.length = 0

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished forward."""
        self.length += n_tokens

    def bytes(self) -> int:
        """Memory of keys and values, bytes; 0 before the first of them."""
        return sum(c.store.nbytes for c in self.layers if c.store is not None)


@dataclass(frozen=True)
class ExpertLoad:
    """Routing of one layer.

    The balance term summed over tokens (), choices per expert before dropping (E,) int64, and
    dropped choices () int64.
    """

    balance_sum: Tensor
    load_E: Tensor
    dropped: Tensor


@dataclass
class ForwardContext:
    """Metadata of the tokens for all blocks, in addition to the hidden states.

    Positions count from 0 in each document, indices along the row or the cache. `start_BT` is the
    first index of each token's document (None: each row is one document). `mask_B1TS` marks the
    visible keys of each query, where they were computed beforehand (None: all keys before it,
    within document and window). `rotary` holds cosine and sine of the positions. `row_tokens` is
    the length of a whole row; `inside_BT` marks the tokens that are not padding (None: all).
    `places` are those that dropout masks depend on (None: nothing is dropped).
    """

    position_BT: Tensor
    start_BT: Tensor | None
    mask_B1TS: Tensor | None
    window: int | None
    rotary: tuple[Tensor, Tensor] | None
    row_tokens: int
    inside_BT: Tensor | None = None
    places: Places | None = None
    cache: KVCache | None = None
    loads: list[ExpertLoad] = field(default_factory=list)
    kept_fracs: list[Tensor] = field(default_factory=list)

    def visible(self) -> dict[str, Any]:
        """The visible keys, as arguments of the attention kernel."""
        return {"start_BS": self.start_BT, "window": self.window, "mask_B1TS": self.mask_B1TS}


@dataclass(frozen=True)
class Report:
    """Report of the blocks of one forward.

    Expert loads by layer, and the share of tokens read by each block with hard capacity.
    """

    loads: tuple[ExpertLoad, ...]
    kept_fracs: tuple[Tensor, ...]

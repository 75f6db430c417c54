"""What all blocks of one forward share, and what they report.
B batch, T tokens, S keys, L layers, E experts, J = rotated pairs.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stackproof.model.cache import KVCache


@dataclass(frozen=True)
class ExpertLoad:
    """One layer's routing: the balance term summed over tokens (), choices per expert before
    dropping (E,) int64, dropped choices ().
    """

    balance_sum: Tensor
    load_E: Tensor
    dropped: Tensor


@dataclass
class Reading:
    """The tokens' places. Positions count from 0 in each document,
    indices along the row or the cache.

    `start_BT` is the first index of each token's document (None: all rows are one document).
    `mask_B1TS` are the keys each query may see, where they were worked out beforehand (None: all
    before it, within document and window). `rotary` holds cosine and sine of the positions.
    `row_tokens` is the length of a whole row; `inside_BT` says which of the tokens given count
    (None: all of them).
    """

    position_BT: Tensor
    start_BT: Tensor | None
    mask_B1TS: Tensor | None
    window: int | None
    rotary: tuple[Tensor, Tensor] | None
    row_tokens: int
    inside_BT: Tensor | None = None
    cache: KVCache | None = None
    loads: list[ExpertLoad] = field(default_factory=list)
    kept_fracs: list[Tensor] = field(default_factory=list)

    def visible(self) -> dict[str, Any]:
        """What a query may see, as arguments of attention."""
        return {"start_BS": self.start_BT, "window": self.window, "mask_B1TS": self.mask_B1TS}


@dataclass(frozen=True)
class Report:
    """What the blocks of one forward report: expert loads by layer, and of blocks with hard
    capacity the share of tokens read.
    """

    loads: tuple[ExpertLoad, ...]
    kept_fracs: tuple[Tensor, ...]

"""Memory to work in, kept from one use to the next: fresh memory for each tensor costs more than the arithmetic on it."""

import torch
from torch import Tensor


class Room:
    """One stretch of memory for each device and dtype, at least `least` values long."""

    def __init__(self, least: int):
        self.least = least
        self.kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(n,) of whatever lies there. The next call gives the same memory again."""
        have = self.kept.get((device, dtype))
        if have is None or len(have) < n:
            self.kept.pop((device, dtype), None)
            have = self.kept[device, dtype] = torch.empty(max(n, self.least), dtype=dtype, device=device)
        return have[:n]

"""Memory to work in, kept from one use to the next: fresh memory for each tensor costs more
than the arithmetic on it.
"""

import threading

import torch
from torch import Tensor

LEAST = 2**20  # values
_own = threading.local()


class Room:
    """One stretch of memory for each device and dtype, at least LEAST values long."""

    def __init__(self):
        self.kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(n,) of whatever lies there. The next call gives the same memory again."""
        have = self.kept.get((device, dtype))
        if have is None or len(have) < n:
            self.kept.pop((device, dtype), None)
            have = self.kept[device, dtype] = torch.empty(max(n, LEAST), dtype=dtype, device=device)
        return have[:n]


def room_for(what: str) -> Room:
    """The room of this thread for one purpose: what two purposes work
    in at once must not be one.
    """
    rooms: dict[str, Room] = vars(_own).setdefault("rooms", {})
    return rooms.setdefault(what, Room())

"""Reusable scratch buffers: allocating one for each tensor costs more than the arithmetic on it."""

import threading

import torch
from torch import Tensor

LEAST = 2**20  # values
_own = threading.local()


class BufferPool:
    """One buffer for each device and dtype, of at least LEAST values."""

    def __init__(self):
        self.kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(n,) uninitialised values. The next call returns the same memory again."""
        have = self.kept.get((device, dtype))
        if have is None or len(have) < n:
            self.kept.pop((device, dtype), None)
            have = self.kept[device, dtype] = torch.empty(max(n, LEAST), dtype=dtype, device=device)
        return have[:n]


def buffer_pool(purpose: str) -> BufferPool:
    """The pool of this thread for one purpose.
    Two purposes in use at the same time need two pools.
    """
    pools: dict[str, BufferPool] = vars(_own).setdefault("pools", {})
    return pools.setdefault(purpose, BufferPool())

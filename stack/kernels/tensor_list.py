"""Many tensors under one launch: a table of blocks made once per list of sizes,
and the tensors' addresses per call.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from stackproof.spec.errors import UsageError

BLOCK = 4096


@dataclass(frozen=True)
class Blocks:
    """For each block of BLOCK numbers the tensor it lies in and its first number there, and for
    each tensor its count; on the device.
    """

    tensor: Tensor
    first: Tensor
    count: Tensor

    @property
    def n(self) -> int:
        return len(self.tensor)


@lru_cache(maxsize=64)
def blocks(sizes: tuple[int, ...], device: torch.device) -> Blocks:
    """The table of a list of tensors with these numbers of elements."""
    per_tensor = torch.tensor([-(-n // BLOCK) for n in sizes], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), per_tensor)
    first = (torch.arange(len(tensor)) - (per_tensor.cumsum(0) - per_tensor)[tensor]) * BLOCK
    return Blocks(
        tensor.to(device, torch.int32),
        first.to(device),
        torch.tensor(sizes, dtype=torch.int64).to(device),
    )


def addresses(tensors: list[Tensor]) -> Tensor:
    """Where each tensor begins, int64, on their device.
    The tensors must live until the kernels that read them are done.
    """
    host = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
    return (
        host.pin_memory().to(tensors[0].device, non_blocking=True) if tensors[0].is_cuda else host
    )


def check(kernel: str, **lists: list[Tensor]) -> None:
    """Refuse lists that differ in shapes or hold what is not contiguous float32."""
    shapes = {name: [tuple(x.shape) for x in tensors] for name, tensors in lists.items()}
    if len({tuple(s) for s in shapes.values()}) > 1:
        counts = ", ".join(f"{len(s)} {name}" for name, s in shapes.items())
        raise UsageError(
            f"{kernel}: lists differ in their shapes",
            value=counts,
            allowed="one shape per place in all lists",
        )
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if x.dtype != torch.float32 or not x.is_contiguous():
                got = f"{name}[{i}]: {x.dtype}, strides {x.stride()}"
                raise UsageError(
                    f"{kernel}: a tensor the kernel was not written for",
                    value=got,
                    allowed="contiguous float32",
                )

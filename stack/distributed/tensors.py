"""Tensors that are divided among ranks (DTensor), read without importing torch.distributed."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory, without its autograd history.

    `DTensor.to_local` records a node for autograd: 20 µs for each of a model's tensors.
    """
    return getattr(tensor, "_local_tensor", tensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor assembled from the parts of all ranks: for a DTensor a collective operation."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def n_holders(tensor: Tensor) -> int:
    """How many ranks hold the same part of a tensor as this one."""
    if not is_divided(tensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def holders_of_each(tensors: Iterable[Tensor]) -> list[int]:
    """`n_holders` of each tensor, computed once for those that are divided alike."""
    found: dict[Any, int] = {}
    layouts = []
    for tensor in tensors:
        layout = None
        if is_divided(tensor):
            layout = (id(tensor.device_mesh), *(p.is_replicate() for p in tensor.placements))
        if layout not in found:
            found[layout] = n_holders(tensor)
        layouts.append(layout)
    return [found[layout] for layout in layouts]


def part_like(divided: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, which every rank holds, divided as another one is. One that is divided
    already is returned.
    """
    if not is_divided(divided) or is_divided(whole):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = divided.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=divided.placements)


def place_of_part(tensor: Tensor) -> str:
    """Where the part of this rank begins in the whole tensor; empty for a tensor that is whole."""
    if not is_divided(tensor):
        return ""
    return f"{list(offset_of_part(tensor))}+{list(local_part(tensor).shape)}"


def offset_of_part(tensor: Tensor) -> tuple[int, ...]:
    """Where the part of this rank begins in the whole tensor, in each dimension."""
    if not is_divided(tensor):
        return (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes = tensor.shape, tensor.device_mesh, tensor.placements
    return tuple(compute_local_shape_and_global_offset(*sizes)[1])


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward without a backward."""
    if hasattr(model, "reshard"):
        model.reshard()


def inference(model: nn.Module) -> AbstractContextManager:
    """torch's inference mode; only without gradients for a divided model, since FSDP2 moves its
    parameters, and inference mode forbids that.
    """
    return torch.no_grad() if hasattr(model, "reshard") else torch.inference_mode()

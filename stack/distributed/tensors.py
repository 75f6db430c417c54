"""Tensors that are divided among ranks (DTensor), read without importing torch.distributed."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if is_divided(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor assembled from the parts of all ranks: for a DTensor a collective operation."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


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

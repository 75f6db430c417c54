"""A state of training as hashes and checksums of what is in memory,
taken without what checkpoints are made with.
"""

import hashlib
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stackproof.model.foreign import plain_name
from stackproof.train import checkpoint
from stackproof.train.state import TrainState


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes as they are in memory."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def live_sha256(model: nn.Module) -> dict[str, str]:
    """Hash of every parameter and lasting buffer as it is in memory, by plain name; taken without
    what checkpoints are made with.
    """
    return {plain_name(name): tensor_sha256(tensor) for name, tensor in model.state_dict().items()}


def live_crc32(state: TrainState) -> dict[str, int]:
    """Checksum of every tensor a checkpoint must hold, as it is in memory; taken without what
    checkpoints are made with.
    """
    owners = {p: plain_name(n) for n, p in state.model.named_parameters()}
    tensors = {plain_name(n): t for n, t in state.model.state_dict().items()} | {
        "rng.cpu": torch.get_rng_state()
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for parameter, fields in state.optimizer.state.items():
        tensors |= {
            f"optim.{owners[parameter]}.{k}": v for k, v in fields.items() if isinstance(v, Tensor)
        }
    return {n: zlib.crc32(_bytes_of(t)) for n, t in tensors.items()}


def gradient_crc32(model: nn.Module) -> dict[str, int]:
    """Checksum of every gradient that exists, by the plain name of its parameter."""
    return {
        plain_name(n): zlib.crc32(_bytes_of(p.grad))
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def trained_parts(state: TrainState) -> dict[str, Any]:
    """What an evaluation has no business with: weights, moments and random state as checksums, the
    place in the rows, modes, loss scale.
    """
    modes = {f"mode.{n}": m.training for n, m in state.model.named_modules()}
    return (
        live_crc32(state)
        | modes
        | {"cursor": state.reader.cursor, "scaler": state.scaler.state_dict(), "step": state.step}
    )


def digest(state: TrainState) -> dict[str, Any]:
    """Every part of a run's state, as hashes and numbers."""
    parts: dict[str, Any] = {f"weights.{n}": h for n, h in live_sha256(state.model).items()}
    parts |= {n: tensor_sha256(t) for n, t in checkpoint.optimizer_tensors(state).items()}
    parts |= {n: tensor_sha256(t) for n, t in checkpoint.default_rng_state().items()}
    parts |= {"cursor": state.reader.cursor, "step": state.step, "tokens_seen": state.tokens_seen}
    parts |= {
        "ema_loss_nats": state.ema_loss_nats,
        "min_ema_loss_nats": state.min_ema_loss_nats,
        "last_val_nats": state.last_val_nats,
    }
    parts |= {
        "curriculum": state.reader.order.state_dict(),
        "stopper": state.stopper.state_dict(),
        "best": dict(state.best),
    }
    for group in state.optimizer.param_groups:
        parts |= {
            f"optim.{group['name']}.{key}": value
            for key, value in group.items()
            if key not in ("params", "name")
        }
    parts["scaler"] = state.scaler.state_dict()
    parts["samples_per_step"] = state.cfg.train.tokens_per_step // state.cfg.model.max_seq_len
    return parts

"""A training state as hashes of what is in memory, taken without the
code that writes checkpoints.
"""

import hashlib
from typing import Any

from torch import Tensor, nn

from stackproof.model.foreign import plain_name
from stackproof.train import checkpoint
from stackproof.train.state import TrainState, tensor_bytes


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes as they are in memory."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def live_sha256(model: nn.Module) -> dict[str, str]:
    """Hash of every parameter and persistent buffer as it is in memory, by plain name."""
    return {plain_name(name): tensor_sha256(tensor) for name, tensor in model.state_dict().items()}


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

"""Inputs of the gate of the loss scale."""

from collections.abc import Callable
from typing import Any

import torch

from stackproof.config import RunConfig
from stackproof.data.prepare import Dataset
from stackproof.train import step as steps
from stackproof.train.state import build_state


def loss_scale_ingredients(
    cfg: RunConfig, dataset: Dataset, device: torch.device
) -> dict[str, Any]:
    """`scaled_step(scale)` is one train step of `cfg` from its start under a loss scale: gradient
    norms (before, left). Float16 alone.
    """
    if cfg.train.dtype != "float16":
        return {}
    return {"scaled_step": _scaled_step(cfg, dataset, device)}


def _scaled_step(
    cfg: RunConfig, dataset: Dataset, device: torch.device
) -> Callable[[float], tuple[float, float]]:
    def scaled_step(scale: float) -> tuple[float, float]:
        state = build_state(cfg, dataset, device)
        state.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=True)
        report = steps.train_step(state, [state.reader.draw() for _ in range(cfg.accumulation())])
        return report.grad_norm, report.clipped_grad_norm

    return scaled_step

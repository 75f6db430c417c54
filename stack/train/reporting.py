"""What the gate of step reports gets to see: real steps, and what happened in them, measured beside them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stack.config import RunConfig
from stack.data.prepare import Dataset
from stack.train import losses
from stack.train import step as steps
from stack.train.state import TrainState, build_state

LOW_NORM = 1e-2


def reported_steps(cfg: RunConfig, dataset: Dataset, device: torch.device) -> list[tuple[steps.StepReport, Mapping[str, Any]]]:
    """Two steps of a run, the second with its first matrix held still: (report, what was measured beside it) of each.

    The declared maximum of the gradient norm is so low that clipping has something to do.
    """
    clipped = cfg.optim.model_copy(update={"max_grad_norm": min(cfg.optim.max_grad_norm, LOW_NORM)})
    state = build_state(cfg.model_copy(update={"optim": clipped}), dataset, device)
    first = _beside(state)
    next(p for p in state.model.parameters() if p.ndim >= 2).requires_grad_(False)
    return [first, _beside(state)]


def _beside(state: TrainState) -> tuple[steps.StepReport, Mapping[str, Any]]:
    """One step. Each gradient is looked at when autograd has added the last to it, before anybody scales it."""
    squares: dict[int, float] = {}
    trained = [p for p in state.model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: squares.update({id(p): _square(p.grad)})) for p in trained]
    before = [p.detach().clone() for p in state.model.parameters()]
    batches = [state.reader.draw() for _ in range(state.cfg.accumulation())]
    report = steps.train_step(state, batches)
    for hook in hooks:
        hook.remove()
    moved = [not torch.equal(p.detach(), kept) for p, kept in zip(state.model.parameters(), before)]
    return report, {
        "norm_before": sum(squares.values()) ** 0.5 / state.scaler.get_scale(),
        "norm_after": sum(_square(p.grad) for p in trained if p.grad is not None) ** 0.5,
        "group_lrs": {g["name"]: g["lr"] for g in state.optimizer.param_groups},
        "n_valid_tokens": int(sum((b.labels != losses.IGNORE_INDEX).sum() for b in batches)),
        "changed_tensor_frac": sum(moved) / len(moved),
    }


def _square(gradient: Tensor) -> float:
    return float(gradient.detach().double().square().sum())

"""What a trainer trains with, and the settings that its model and optimizer do not show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stackproof.contracts.callbacks.probe import config_of


@dataclass(frozen=True)
class Trained:
    """The objects of one training run. `first_step` counts the steps before it, as after a
    resume. `stated` are settings of the optimizer that the trainer has been given.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    tokenizer: Any = None
    first_step: int = 0
    stated: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a trainer.

    `max_grad_norm` is None where unknown and infinity where nothing is clipped. `ticks_per_update`:
    the schedule ticks once per update; otherwise it may tick more rarely. `loss_scale()` is the
    factor of a loss scaler. `absolute`: the weight of a token can be compared with 1/N, as in one
    process. `mean_of_ranks`: the loss is declared as a mean over ranks of the mean of each, and
    not as one over all tokens. `warmup_steps` are those of the learning rate.
    `held_out_declared`: each evaluation scores the same rows. `updates` and `accumulates` are the
    declared numbers of updates and of micro-batches in each, 0 where unknown.
    """

    pad_id: int | None = None
    eos_id: int | None = None
    smoothing: float = 0.0
    max_grad_norm: float | None = None
    clips_values: bool = False
    ticks_per_update: bool = False
    loss_scale: Callable[[], float] = lambda: 1.0
    absolute: bool = True
    mean_of_ranks: bool = False
    warmup_steps: int = 12
    held_out_declared: bool = False
    updates: int = 0
    accumulates: int = 0

    @classmethod
    def of(cls, trained: Trained, scaler: Any, **settings: Any) -> "TrainerSettings":
        """Special ids from the tokenizer, else from the model's configuration; the loss scale from
        a GradScaler, if there is one.
        """
        config = config_of(trained.model)
        for name in ("pad", "eos"):
            default = getattr(config, f"{name}_token_id", None)
            settings[f"{name}_id"] = getattr(trained.tokenizer, f"{name}_token_id", default)
        if scaler is not None:
            settings["loss_scale"] = scaler.get_scale
        return cls(**settings)

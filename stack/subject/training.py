"""How a run trains: fresh trainees, its loss, clipping and optimizer."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.subject import MicroBatch, Trainee, Training
from stackproof.data.reader import model_inputs
from stackproof.subject.run import RunParts
from stackproof.train import losses
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


class RunTraining(RunParts, Training):
    """TODO"""

    def make_optimizer(self, model: Any) -> torch.optim.Optimizer:
        return opt.make_optimizer(model, self.cfg.optim)

    def trainee_of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainee:
        state = SimpleNamespace(
            features=model.hidden_states,
            optimizer=optimizer,
            device=self.device,
            autocast=nullcontext,
            scaler=torch.amp.GradScaler(self.device.type, enabled=False),
            model=model,
            loads=[],
            cfg=self.cfg,
        )
        return RunTrainee(state)


class RunTrainee(Trainee):
    """TODO"""

    def __init__(self, state: Any):
        self.state = state

    def accumulate(self, batches: Sequence[MicroBatch]) -> float:
        return steps.accumulate(self.state, batches)[0]

    def update(self, batches: Sequence[MicroBatch]) -> float:
        loss_nats, _ = steps.accumulate(self.state, batches)
        grads = opt.gradients(self.state.model)
        steps.apply_gradients(self.state, grads, opt.global_norm(grads))
        return loss_nats

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        model, device = self.state.model, self.state.device
        x_BTD, report = model.hidden_states(*model_inputs(batch, device))
        labels = batch.labels.to(device)
        nats = losses.linear_cross_entropy_sum(x_BTD, model.head_weight, labels)
        return nats + losses.balance_term(report.loads, model.balance_weight)

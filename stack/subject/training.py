"""How a run trains: fresh trainees, its loss, clipping and optimizer."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.subject import MicroBatch, Trainee, Training
from stackproof.data.reader import Batch
from stackproof.subject.dropout import branch_draws
from stackproof.subject.run import RunParts, small_run
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


class RunTraining(RunParts, Training):
    """Trainees, loss, clipping and optimizer of a run."""

    def trainee_of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainee:
        """Activation checkpointing is as in the run."""
        model.activation_checkpointing = self.cfg.train.activation_checkpointing == "blocks"
        return RunTrainee(
            SimpleNamespace(
                cfg=self.cfg,
                device=self.device,
                model=model,
                features=model.hidden_states,
                optimizer=optimizer,
                scaler=torch.amp.GradScaler(self.device.type, enabled=False),
                autocast=nullcontext,
                loads=[],
            )
        )

    def make_optimizer(self, model: Any) -> torch.optim.Optimizer:
        return opt.make_optimizer(model, self.cfg.optim)

    def branch_draws(self) -> Sequence[tuple[tuple[int, str], Tensor, Tensor]]:
        return branch_draws(small_run(self.cfg), self.dataset, self.device)


class RunTrainee(Trainee):
    """A training state that the run's own functions work on: a TrainState, or the fields of one
    that `accumulate` and `apply_gradients` use.
    """

    def __init__(self, state: Any):
        self.state = state

    @property
    def model(self) -> nn.Module:
        return self.state.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.state.optimizer

    def accumulate(self, batches: Sequence[MicroBatch]) -> float:
        return steps.accumulate(self.state, [_reader_batch(b) for b in batches])[0]

    def update(self, batches: Sequence[MicroBatch]) -> float:
        loss_nats = self.accumulate(batches)
        gradients = opt.gradients(self.model)
        steps.apply_gradients(self.state, gradients, opt.global_norm(gradients))
        return loss_nats


def _reader_batch(batch: MicroBatch) -> Batch:
    """A micro-batch as the data loader gives it; its rows have no numbers of windows."""
    n_rows = len(batch.input_ids)
    return Batch(
        batch.input_ids, batch.labels, tuple(range(n_rows)), 0, 0, n_rows, batch.document_ids
    )

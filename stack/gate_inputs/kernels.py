"""Inputs of `kernel.reference`: the calls of kernels that one micro-batch of the run makes."""

from collections.abc import Callable

import torch
from torch import nn

from stackproof.config import RunConfig
from stackproof.data.prepare import Dataset
from stackproof.data.reader import model_inputs
from stackproof.kernels.compare import ChosenCall, seen_calls
from stackproof.train import losses
from stackproof.train.state import declared_autocast, make_reader


def kernel_calls(
    cfg: RunConfig, dataset: Dataset, device: torch.device, build: Callable[[], nn.Module]
) -> Callable[[], list[ChosenCall]]:
    """The calls of operations that one micro-batch of the run makes, loss included, at its own
    shapes and in its own precision.
    """

    def calls() -> list[ChosenCall]:
        wrapping = cfg.model_copy(
            update={"data": cfg.data.model_copy(update={"on_exhausted": "wrap"})}
        )
        model, batch = build().train(), make_reader(wrapping, dataset).draw()
        with torch.no_grad(), declared_autocast(cfg, device), seen_calls() as found:
            x_BTD, _ = model.hidden_states(*model_inputs(batch, device))
            losses.linear_cross_entropy_sum(x_BTD, model.head_weight, batch.labels.to(device))
        return found

    return calls

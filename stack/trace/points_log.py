"""Activation statistics of every point of a model on a training batch, as lines of a log."""

from typing import Any

import torch

from stackproof.data.data_loader import Batch
from stackproof.distributed.tensors import reshard
from stackproof.trace.hooks import hook_points
from stackproof.trace.stats import Gatherer


def points_lines(state: Any, batch: Batch) -> list[dict[str, Any]]:
    """Statistics of every point on the first micro-batch of the next step, with its weights,
    dropout and precision.

    {"point", "layer", "stats", "support"} of each, in execution order, from an uncompiled forward
    without gradients up to the final norm. Random state, weights and gradients are left unchanged.
    `state` is a training state: model, inputs, device, autocast. Of several ranks each has the
    points of its own rows, in a tensor group of its part of them; all call this.
    """
    gatherer, devices = Gatherer(), [state.device] if state.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        state.autocast(),
        hook_points(state.model, None, gatherer.see, scratch=True) as points,
    ):
        state.model.hidden_states(*state.inputs(batch, batch))
    reshard(state.model)
    stats = gatherer.finish()
    return [
        {
            "point": p.name,
            "layer": p.layer,
            "stats": stats[p.name].as_dict(),
            "support": vars(stats[p.name].support),
        }
        for p in points
        if p.name in stats
    ]

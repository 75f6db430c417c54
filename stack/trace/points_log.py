"""Statistics of every point of the model of a run, for its history."""

import math
from typing import Any

import torch

from stackproof.data.reader import Batch, model_inputs
from stackproof.trace.hooks import hook_points
from stackproof.trace.stats import Gatherer

SHARE_MAX = 0.02  # of a run's time that recording is meant to take


def sparse_enough(every: int, recording_s: float, step_s: float) -> int:
    """`every`, or the least interval beyond it at which recordings take at most
    SHARE_MAX of the time of steps.
    """
    return max(every, math.ceil(recording_s / (SHARE_MAX * step_s)))


def points_lines(state: Any, batch: Batch) -> list[dict[str, Any]]:
    """What the points hold while the model reads a micro-batch, with the weights, dropout and
    precision of the step to come.

    {"point", "layer", "stats", "support"} of each, in execution order. A forward of its own,
    uncompiled and without gradients, up to the final norm. Random state, weights and gradients are
    left as they are.
    """
    gatherer, devices = Gatherer(), [state.device] if state.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        state.autocast(),
        hook_points(state.model, None, gatherer.see, scratch=True) as points,
    ):
        state.model.hidden_states(*model_inputs(batch, state.device))
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

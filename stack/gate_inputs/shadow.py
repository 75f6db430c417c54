"""Inputs of the gate of half precision.
B batch, T tokens, D features, R tokens, E experts, V vocab.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stackproof.config import RunConfig
from stackproof.model import moe
from stackproof.model.variants import make_norm
from stackproof.train import losses
from stackproof.train.state import AUTOCAST, declared_autocast


def shadow_ingredients(cfg: RunConfig, device: torch.device) -> dict[str, Any]:
    """The norm, the choice of experts and the loss of a run in half precision, as the run calls
    them: on its device, under its autocast.

    `half_norm(x_BTD, gain_D)` is the declared norm at the width of its input, with these gains and
    biases of 0; `half_route(logits_RE, top_k)` gives (experts (R, k), weights (R, k), probabilities
    (R, E)); `half_loss(x_BTD, head_VD, labels_BT)` the sum of nats. {} in float32.
    """
    if (dtype := AUTOCAST[cfg.train.dtype]) is None:
        return {}

    def as_called(function: Callable) -> Callable:
        def under_autocast(*inputs: Any) -> Any:
            with declared_autocast(cfg, device):
                return function(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))

        return under_autocast

    def norm(x_BTD: Tensor, gain_D: Tensor) -> Tensor:
        layer = make_norm(cfg.model.model_copy(update={"d_model": len(gain_D)})).to(device)
        layer.load_state_dict(
            {
                name: gain_D if name == "weight" else torch.zeros_like(gain_D)
                for name in layer.state_dict()
            }
        )
        return layer(x_BTD)

    return {
        "half_dtype": dtype,
        "half_norm": as_called(norm),
        "half_route": as_called(lambda logits_RE, top_k: moe.route(logits_RE, top_k)),
        "half_loss": as_called(
            lambda x_BTD, head_VD, labels_BT: losses.linear_cross_entropy_sum(
                x_BTD, head_VD, labels_BT
            )
        ),
    }

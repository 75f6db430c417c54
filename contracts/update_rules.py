"""The rule of each optimizer, written out in float64."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MUON_NORM_MIN = 1e-7  # as in torch.optim.Muon: a matrix without a gradient is not turned into noise


@dataclass(frozen=True)
class Rule:
    """An update rule. `settings` are the keys of a declared law that `update` reads. `by_entry`:
    the error of an entry is judged in learning rates; otherwise that of a whole matrix, as a share
    of the way that it went.
    """

    update: Callable[[Tensor, Tensor, dict, Mapping[str, Any], int], Tensor]
    settings: tuple[str, ...]
    by_entry: bool


def adamw(x: Tensor, gradient: Tensor, memory: dict, law: Mapping[str, Any], t: int) -> Tensor:
    """x − lr·(m̂/(√v̂ + eps) + decay·x). Source: arXiv:1711.05101, algorithm 2."""
    b1, b2 = law["betas"]
    m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * gradient
    v = memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * gradient**2
    return x - law["lr"] * (
        (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + law["eps"]) + law["weight_decay"] * x
    )


def muon(x: Tensor, gradient: Tensor, memory: dict, law: Mapping[str, Any], t: int) -> Tensor:
    """x − lr·decay·x − lr·factor·U·p(S)·Vᵀ of the running mean U·S·Vᵀ, divided by its norm or by
    MUON_NORM_MIN: the Newton-Schulz quintic acts on each singular value alone.

    Sources: Keller Jordan's post on Muon, 2024; the factor of update size arXiv:2502.16982, sec.
    2.2.
    """
    m = memory["m"] = law["momentum"] * memory.get("m", 0.0) + (1 - law["momentum"]) * gradient
    ahead = law["momentum"] * m + (1 - law["momentum"]) * gradient if law["nesterov"] else m
    if not bool(ahead.isfinite().all()):
        return torch.full_like(x, math.nan)  # as the quintic would; the decomposition raises
    u, s, v = torch.linalg.svd(ahead, full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=MUON_NORM_MIN)
    for _ in range(law["ns_steps"]):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = x.shape
    factor = {
        "match-rms-adamw": 0.2 * max(rows, columns) ** 0.5,
        "original": max(1.0, rows / columns) ** 0.5,
    }[law["lr_scale"]]
    return x * (1 - law["lr"] * law["weight_decay"]) - law["lr"] * factor * (u * s) @ v


RULES = {
    "adamw": Rule(adamw, ("lr", "weight_decay", "betas", "eps"), by_entry=True),
    "muon": Rule(
        muon,
        ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "lr_scale"),
        by_entry=False,
    ),
}

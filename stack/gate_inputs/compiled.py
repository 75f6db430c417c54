"""Inputs of the gate of the compiled graph."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stackproof.config import RunConfig
from stackproof.data.prepare import Dataset
from stackproof.model.build import building
from stackproof.train import step as steps
from stackproof.train.state import TrainState, build_state

# of float16: enough that gradients do not vanish, and far from an overflow,
# which is no matter of the graph
LOSS_SCALE = 1024.0


def compiled_ingredients(cfg: RunConfig, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """What the gate of the compiled graph looks at, in a run that compiles: the run's own model,
    micro-batch, length, dtype and data.

    `compiled_step(i)` and `eager_step(i)` give (loss in nats, gradient by name) of batch `i` in
    training mode, from the same random state. Raises EnvironmentUnfit when called on a machine that
    cannot build the graph.
    """
    if not cfg.train.compile:
        return {}
    state = build_state(
        cfg.model_copy(update={"data": cfg.data.model_copy(update={"on_exhausted": "wrap"})}),
        dataset,
        device,
    )
    eager = replace(state, features=state.model.hidden_states)
    batches = [state.reader.draw() for _ in range(2)]

    def gradients(bench: TrainState, i: int) -> tuple[float, dict[str, Tensor]]:
        scaler = torch.amp.GradScaler(
            device.type, init_scale=LOSS_SCALE, enabled=cfg.train.dtype == "float16"
        )
        bench = replace(bench, scaler=scaler)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), building():
            torch.manual_seed(i)
            loss_nats, _ = steps.accumulate(bench, [batches[i]])
        return loss_nats, {
            n: p.grad.detach().clone()
            for n, p in bench.model.named_parameters()
            if p.grad is not None
        }

    return {
        "compiled_step": lambda i: gradients(state, i),
        "eager_step": lambda i: gradients(eager, i),
        "half_precision": cfg.train.dtype != "float32",
    }

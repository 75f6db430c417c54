"""A step that is computed twice from one state: a processor that now and then returns a wrong
product shows as a difference.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stackproof.data.reader import Batch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.digest import gradient_crc32
from stackproof.train.state import TrainState


@dataclass(frozen=True)
class Computed:
    """What a step came to: checksums of its clipped gradients by name,
    and the seconds it took to have them once more.
    """

    crc32: dict[str, int]
    seconds: float

    def differing(self, other: dict[str, int]) -> tuple[str, ...]:
        """Names whose checksums are not those of `other`, or are on one side only; sorted."""
        return tuple(
            sorted(n for n in self.crc32.keys() | other.keys() if self.crc32.get(n) != other.get(n))
        )


def recomputed_step(state: TrainState, batches: Sequence[Batch]) -> Computed:
    """The gradients that the next `train_step` will have, computed before it and dropped.

    Random state and loss scale are as before; weights and moments are not touched.
    """
    started = time.perf_counter()
    devices, scaler = (
        ([state.device] if state.device.type == "cuda" else []),
        state.scaler.state_dict(),
    )
    with torch.random.fork_rng(devices=devices):
        found = steps.finite_gradients(state, batches)
    if found.finite:
        opt.clip_gradients(opt.gradients(state.model), found.norm, state.cfg.optim.max_grad_norm)
    state.scaler.update()
    state.scaler.load_state_dict(scaler)
    return Computed(gradient_crc32(state.model), time.perf_counter() - started)

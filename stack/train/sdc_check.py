"""Check for silent data corruption: some steps are computed twice,
and their gradients are compared bit by bit.
"""

import time
from collections.abc import Sequence

import torch

from stackproof.contracts.events import Recomputed
from stackproof.data.data_loader import Batch
from stackproof.train import losses
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.state import TrainState, differing, gradient_crc32
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, Trainer

GATE = "runtime.recomputed-step"


class SdcCheck(Callback):
    """Computes every `train.sdc_check_every`-th step, and the last,
    once before it is taken and compares the gradients.
    """

    def __init__(self) -> None:
        self.expected: dict[str, int] | None = None
        self.seconds = 0.0

    def on_batch(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        step, cfg = trainer.state.step + 1, trainer.cfg.train
        if step % cfg.sdc_check_every == 0 or step == cfg.max_steps:
            started = time.perf_counter()
            self.expected = gradient_checksums(trainer.state, batches)
            self.seconds = time.perf_counter() - started

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.expected is None:
            return
        started = time.perf_counter()
        found = gradient_crc32(trainer.state.model)
        changed, self.expected = differing(self.expected, found), None
        trainer.keeper.charge(GATE, self.seconds + time.perf_counter() - started)
        trainer.keeper.observe(
            Recomputed(step=report.step, n_compared=len(found), differing=changed)
        )


def gradient_checksums(state: TrainState, batches: Sequence[Batch]) -> dict[str, int]:
    """CRC-32 of the clipped gradients that the next `train_step` will have, by name;
    the gradients are dropped.

    Random state and loss scale are restored; weights and moments are not touched.
    """
    devices, scaler = (
        ([state.device] if state.device.type == "cuda" else []),
        state.scaler.state_dict(),
    )
    with torch.random.fork_rng(devices=devices):
        for _ in range(steps.MAX_OVERFLOW_RETRIES):
            loss_nats, _ = steps.accumulate(state, batches)
            grads = opt.gradients(state.model)
            norm = opt.global_norm(grads)
            if not steps.overflowed(state, loss_nats, float(norm)):
                break
            state.scaler.update()
    if losses.is_finite(loss_nats, float(norm)):
        opt.clip_gradients(grads, norm, state.cfg.optim.max_grad_norm)
    # GradScaler requires an update after unscale_; the scale itself is then restored
    state.scaler.update()
    state.scaler.load_state_dict(scaler)
    return gradient_crc32(state.model)

"""Gates around a plain training loop: one import and one `with`, nothing inside the loop."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.probe import unwrapped
from stackproof.contracts.callbacks.record import End, trainer_of
from stackproof.contracts.callbacks.run import GatedRun
from stackproof.contracts.callbacks.session import Mode, Options
from stackproof.contracts.callbacks.settings import Trained, TrainerSettings
from stackproof.contracts.callbacks.watch import Watch


class Gate(GatedRun):
    """The object of a `with gated(…)`. Its methods take what hooks do not show; calling them is
    optional.
    """

    def batch(self, batch: Any, *, epoch: int | None = None) -> None:
        """The batch that comes next: a mapping, or (ids, labels). Needed if the model is not given
        mask and labels, and for resume.
        """
        self._drawn(batch, epoch, self._watch.step)

    def loss(self, loss: Tensor) -> Tensor:
        """The loss of a micro-step; returned unchanged."""
        self._watch.loss.tell(loss)
        return loss

    def state_dict(self) -> dict:
        """To save with weights and optimizer: their hashes, and later the batch that came next.
        JSON-ready.
        """
        return self._saved()

    def load_state_dict(self, state: dict) -> None:
        """Call on resume, after weights, optimizer and schedule are restored. Raises GateFailed if
        they differ from the saved ones.
        """
        self._watch.restored(state["parts"]["step"])
        self._restored(state)

    def reloaded(self, other: nn.Module) -> None:
        """Compare a model that was loaded from a checkpoint with the live one. Raises GateFailed if
        they differ.
        """
        watch = self._watch
        self.session.artifact(digest.reloaded(watch.model, other), watch.step)


@contextmanager
def gated(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: Any = None,
    tokenizer: Any = None,
    max_grad_norm: float | None = None,
    scaler: Any = None,
    settings: Mapping[str, float] = {},
    mode: Mode = "raise",
    **options: Unpack[Options],
) -> Iterator[Gate]:
    """Run the preflight gates on the live model, then judge every step until the block ends.

    The model maps ids (B, T) to logits (B, T, V), alone or with a loss, and is called as a module.
    `max_grad_norm` is the norm that the loop clips to (infinity: no clipping), `scaler` a
    GradScaler, `settings` the `learning_rate`, `weight_decay` and `warmup_steps` that the script
    was given; the other options are `Options`, and no log is written without a path. The
    record is written when the block ends, also on an error. Objects prepared by `accelerate` and
    compiled models are accepted; preflight judges the original model. Raises GateFailed at the
    first red gate that halts; with mode "log" nothing is raised.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    scheduler = getattr(scheduler, "scheduler", scheduler)
    trained = Trained(unwrapped(model), optimizer, scheduler, tokenizer, stated=settings)
    one_process = digest.world_size() == 1
    of_trainer = TrainerSettings.of(
        trained, scaler, max_grad_norm=max_grad_norm, absolute=one_process
    )
    trainer = trainer_of(torch.optim.Optimizer, "torch") | {"name": "a loop written by hand"}
    gate = Gate(mode, **options)
    gate._open()
    gate._open_record(trained, trainer, {"max_grad_norm": max_grad_norm})
    gate._preflight(trained)
    gate._watch = Watch(trained, gate.session, of_trainer)
    error = None
    try:
        yield gate
        gate._watch.ranks.end(gate._watch.step)
    except BaseException as e:
        error = e
        raise
    finally:
        gate._detach()
        gate.session.end(End.of(error))

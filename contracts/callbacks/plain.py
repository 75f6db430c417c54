"""Gates around a plain training loop: one import and one `with`, nothing inside the loop."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.probe import config_of, untouched, unwrapped
from stackproof.contracts.callbacks.record import LOG, RunRecord, how_it_ended, trainer_of
from stackproof.contracts.callbacks.session import Cost, Mode, Session
from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.callbacks.subject import foreign_subject
from stackproof.contracts.callbacks.watch import Watch


class Gate:
    """The object of a `with gated(…)`. Its methods tell it what hooks do not show; calling them is
    optional.
    """

    def __init__(self, session: Session, watch: Watch):
        self._session, self._watch = session, watch
        self._memory = digest.Memory()
        self._epoch = 0

    def batch(self, batch: Any, *, epoch: int = 0) -> None:
        """The batch that comes next: a mapping, or (ids, labels). Needed if the model is not given
        mask and labels, and for resume.
        """
        named = (
            batch
            if hasattr(batch, "keys")
            else dict(zip(("input_ids", "labels"), batch))
            if isinstance(batch, (list, tuple))
            else {}
        )
        self._watch.see_batch(named)
        verdict, _ = self._memory.drawn(batch, epoch, self._watch.step)
        if verdict is not None:
            self._session.observe(verdict)

    def loss(self, loss: Tensor) -> Tensor:
        """The loss of a micro-step; returned unchanged."""
        self._watch.tell_loss(loss.detach())
        return loss

    def state_dict(self) -> dict:
        """To save with weights and optimizer: their hashes, and later the batch that came next.
        JSON-ready.
        """
        return self._memory.saved(self._parts())

    def load_state_dict(self, state: dict) -> None:
        """Call on resume, after weights, optimizer and schedule are restored. Raises GateFailed if
        they differ from the saved ones.
        """
        self._watch.restored(state["parts"]["step"])
        self._session.observe(self._memory.restored(state, self._parts()))

    def reloaded(self, other: nn.Module) -> None:
        """Compare a model that was loaded from a checkpoint with the live one. Raises GateFailed if
        they differ.
        """
        self._session.artifact(digest.reloaded(self._watch.model, other), self._watch.step)

    def verdicts(self) -> dict:
        """Verdict of every gate so far, by id."""
        return self._session.verdicts()

    def first_failures(self) -> dict[str, int | None]:
        """Step of each red gate's first failure."""
        return self._session.first_failures()

    def cost(self) -> Cost:
        """Time spent on gates so far."""
        return self._session.cost()

    def _parts(self) -> dict[str, Any]:
        watch = self._watch
        return digest.of_run(watch.model, watch.optimizer, watch.rates.scheduler, watch.step)


@contextmanager
def gated(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: Any = None,
    tokenizer: Any = None,
    max_grad_norm: float | None = None,
    scaler: Any = None,
    mode: Mode = "raise",
    log_path: str | Path | None = None,
    skip: Iterable[str] = (),
    only: Iterable[str] | None = None,
    record: str | Path | None = None,
    reuses_rows: bool = False,
) -> Iterator[Gate]:
    """Run the preflight gates on the live model, then judge every step until the block ends.

    The model maps ids (B, T) to logits (B, T, V), alone or with a loss, and is called as a module.
    `max_grad_norm` is the norm that the loop clips to (infinity: no clipping), `scaler` a
    GradScaler. Raises GateFailed at the first red gate that halts; with mode "log" nothing.
    `record` names a folder for the record of the run, written when the block ends, also on an
    error. Objects prepared by `accelerate` and compiled models are accepted; preflight judges the
    original model. `reuses_rows`: rows come again in their order, or trained rows are scored, on
    purpose.
    """
    model = unwrapped(model)
    optimizer, scheduler = (
        getattr(optimizer, "optimizer", optimizer),
        getattr(scheduler, "scheduler", scheduler),
    )
    log_path = log_path or (Path(record) / LOG if record else None)
    session = Session(mode, log_path=log_path, skip=skip, only=only, reuses_rows=reuses_rows)
    if record:
        told = {"max_grad_norm": max_grad_norm}
        trainer = trainer_of(torch.optim.Optimizer, "torch") | {"name": "a loop written by hand"}
        RunRecord(
            record,
            session,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            trainer=trainer,
            told=told,
        )
    with untouched(model):
        session.preflight(foreign_subject(model, optimizer, tokenizer))
    config = config_of(model)
    settings = TrainerSettings(
        pad_id=getattr(tokenizer, "pad_token_id", getattr(config, "pad_token_id", None)),
        eos_id=getattr(tokenizer, "eos_token_id", getattr(config, "eos_token_id", None)),
        max_grad_norm=max_grad_norm,
        loss_scale=scaler.get_scale if scaler is not None else lambda: 1.0,
        absolute=not (torch.distributed.is_available() and torch.distributed.is_initialized()),
    )
    watch = Watch(model, optimizer, session, scheduler=scheduler, settings=settings)
    session.on_halt = watch.detach
    try:
        yield Gate(session, watch)
    except BaseException as e:
        session.on_end(*how_it_ended(e))
        raise
    else:
        session.on_end(*how_it_ended(None))
    finally:
        watch.detach()

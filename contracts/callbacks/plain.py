"""Gates around a loop you wrote yourself: one import and one `with`, nothing inside the loop."""

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
    """What a `with gated(…)` gives. The loop may tell it more than it can see;
    nothing has to be told.
    """

    def __init__(self, session: Session, watch: Watch):
        self._session, self._watch = session, watch
        self._memory = digest.Memory()
        self._epoch = 0

    def batch(self, batch: Any, *, epoch: int = 0) -> None:
        """The batch about to be used: a mapping, or (ids, labels).
        Needed where the model is not given mask and labels, and for resume.
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
        """The loss of a micro-step, as it is; given back unchanged."""
        self._watch.tell_loss(loss.detach())
        return loss

    def state_dict(self) -> dict:
        """To be kept in a checkpoint beside weights and optimizer: their hashes, and later what
        batch came next. JSON-ready.
        """
        return self._memory.saved(self._parts())

    def load_state_dict(self, state: dict) -> None:
        """To be called when a run goes on, after weights, optimizer and schedule are restored.
        Raises GateFailed if they are others.
        """
        self._watch.restored(state["parts"]["step"])
        self._session.observe(self._memory.restored(state, self._parts()))

    def reloaded(self, other: nn.Module) -> None:
        """A model made of what was saved: it must be the live one.
        Raises GateFailed if it is another.
        """
        self._session.artifact(digest.reloaded(self._watch.model, other), self._watch.step)

    def verdicts(self) -> dict:
        """Verdict of every gate so far, by id."""
        return self._session.verdicts()

    def first_failures(self) -> dict[str, int | None]:
        """Step of each red gate's first failure."""
        return self._session.first_failures()

    def cost(self) -> Cost:
        """What looking has taken so far."""
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
    """Ask the preflight gates on the live model, then watch every step until the block ends.

    The model maps ids (B, T) to logits (B, T, V), alone or beside a loss, and is called as a
    module. `max_grad_norm` is what the loop clips at (infinity: nothing), `scaler` a GradScaler.
    Raises GateFailed at the first red gate that halts; with mode "log" nothing. `record` names a
    folder for the record of the run, written when the block ends however it ends. What `accelerate`
    has prepared may be given as it is, and so may a model that `torch.compile` has made; before
    step 1 what it was made of is asked. `reuses_rows` says that rows come again in their order, or
    trained rows are scored, on purpose.
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

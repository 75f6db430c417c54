"""One run of another trainer under gates: what all adapters share."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.probe import untouched
from stackproof.contracts.callbacks.record import LOG, Cost, RunRecord
from stackproof.contracts.callbacks.session import Mode, Session, timed
from stackproof.contracts.callbacks.settings import Trained
from stackproof.contracts.callbacks.subject import ForeignTraining, foreign_subject
from stackproof.contracts.callbacks.watch import Watch
from stackproof.contracts.gate import Verdict
from stackproof.contracts.vector_math import select_vector_functions


class GatedRun:
    """Base of the adapters. An adapter finds model, optimizer and batches in its trainer, and calls
    the methods below at the events of that trainer.

    Raises GateFailed at the first red gate that halts; with `mode="log"` nothing is raised.
    Verdicts go to `log_path`, as JSON lines, and to logging. `skip` leaves out gates by id, `only`
    all others. `record` names a folder for the record of the run. `reuses_rows`: rows come again in
    their order, or trained rows are scored, on purpose.
    """

    def __init__(
        self,
        mode: Mode = "raise",
        *,
        log_path: str | Path | None = None,
        skip: Iterable[str] = (),
        only: Iterable[str] | None = None,
        record: str | Path | None = None,
        reuses_rows: bool = False,
    ):
        select_vector_functions()
        options = {"skip": tuple(skip), "only": only, "reuses_rows": reuses_rows}
        self._new_session = partial(Session, mode, **options)
        self._log_path = log_path or (Path(record) / LOG if record else None)
        self._record = record
        self.session: Session | None = None
        self._watch: Watch | None = None
        self._saves = digest.SaveHistory()

    def verdicts(self) -> dict[str, Verdict]:
        """Verdict of every gate so far, by id; empty before training begins."""
        results = self.session.results() if self.session else []
        return {r.id: Verdict(r.verdict, r.message, r.measured) for r in results}

    def first_failures(self) -> dict[str, int | None]:
        """Step of the first red verdict by gate; a preflight gate's is 0."""
        results = self.session.results() if self.session else []
        return {r.id: r.first_failure_step for r in results if r.verdict == "fail"}

    def cost(self) -> Cost | None:
        """Time spent on gates so far; None before training begins."""
        return self.session.cost() if self.session else None

    # --- events of the trainer --------------------------------------------------------------------

    def _open(self, folder: str | Path | None = None) -> None:
        """Training begins: install the gates. `folder` holds the log if no path was given."""
        self._detach()
        self._watch = None
        log_path = self._log_path or (Path(folder) / LOG if folder else None)
        self.session = self._new_session(log_path=log_path, on_halt=self._detach)

    def _open_record(
        self, trained: Trained, trainer: Mapping[str, Any], configured: Mapping[str, Any]
    ) -> None:
        """Open the record of the run, if there is to be one."""
        if folder := self._record:
            session = self.session
            gates = {"mode": session.mode, "left_out": sorted(session.left_out)}
            session.record = RunRecord(folder, session.spec, trained, trainer, configured, gates)

    def _preflight(self, trained: Trained, owner: nn.Module | None = None) -> None:
        """Judge the live model. `owner` is the module that owns the optimizer's parameters, if that
        is more than the model.
        """
        owner = owner or trained.model
        with untouched(owner):
            subject = foreign_subject(trained.model, None, trained.tokenizer)
            training = ForeignTraining(owner, trained.optimizer)
            self.session.preflight(replace(subject, training=training))

    @timed
    def _drawn(self, batch: Any, epoch: int, step: int) -> None:
        """The trainer has drawn a training batch."""
        self._watch.inputs.batch = _by_name(batch)
        if event := self._saves.drawn(batch, epoch, step):
            self.session.observe(event)

    def _saved(self, step: int | None = None, folder: Path | None = None) -> dict:
        """The trainer saves: the document to keep with the checkpoint, written to `folder`."""
        return self._saves.saved(self._parts(step), folder)

    def _restored(self, document: dict) -> None:
        """The trainer has restored the state of a checkpoint with this document."""
        self.session.observe(self._saves.restored(document, self._parts()))

    def _parts(self, step: int | None = None) -> dict[str, Any]:
        watch = self._watch
        return digest.of_run(watch.trained, watch.step if step is None else step)

    def _detach(self) -> None:
        """Remove all hooks. A second call does nothing."""
        if self._watch:
            self._watch.detach()


def _by_name(batch: Any) -> Mapping[str, Any]:
    """The parts of a batch by name: of a mapping, or of (ids, labels)."""
    if isinstance(batch, (list, tuple)):
        return dict(zip(("input_ids", "labels"), batch))
    return dict(batch) if hasattr(batch, "keys") else {}

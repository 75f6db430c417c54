"""One run of another trainer under gates: what all adapters share."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.probe import untouched
from stackproof.contracts.callbacks.ranks import Ranks
from stackproof.contracts.callbacks.record import LOG, Cost, RunRecord
from stackproof.contracts.callbacks.session import Mode, Options, Session, timed
from stackproof.contracts.callbacks.settings import Trained
from stackproof.contracts.callbacks.subject import ForeignTraining, foreign_subject
from stackproof.contracts.callbacks.watch import Watch
from stackproof.contracts.gate import Verdict
from stackproof.contracts.vector_math import select_vector_functions
from stackproof.spec.errors import ConfigError


class GatedRun:
    """Base of the adapters. An adapter finds model, optimizer and batches in its trainer, and calls
    the methods below at the events of that trainer.

    Raises GateFailed at the first red gate that halts; with `mode="log"` nothing is raised.
    Verdicts also go to logging. Raises ConfigError for an unknown option.
    """

    def __init__(self, mode: Mode = "raise", **options: Unpack[Options]):
        if odd := options.keys() - Options.__annotations__:
            raise ConfigError(
                "an option of the gates is unknown",
                value=min(odd),
                allowed=", ".join(Options.__annotations__),
            )
        self._mode, self._record = mode, options.get("record")
        self._options = options | {"skip": tuple(options.get("skip", ()))}
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
        """Training begins: install the gates. `folder` holds the log if no path was given. All
        ranks must call this together.
        """
        select_vector_functions()
        self._detach()
        self._watch = None
        options = self._options
        if (home := self._record or folder) and not options.get("log_path"):
            options = options | {"log_path": Path(home) / LOG}
        self.session = Session(self._mode, options, self._detach, Ranks.joined())

    def _open_record(
        self, trained: Trained, trainer: Mapping[str, Any], configured: Mapping[str, Any]
    ) -> None:
        """Open the record of the run, if there is to be one, on the rank that writes."""
        session = self.session
        session.configured = {**trainer, **configured}
        if (folder := self._record) and session.ranks.is_main:
            gates = {"mode": session.mode, "left_out": sorted(session.left_out)}
            session.record = RunRecord(folder, session.spec, trained, trainer, configured, gates)

    def _preflight(self, trained: Trained, owner: nn.Module | None = None) -> None:
        """Judge the live model. `owner` is the module that owns the optimizer's parameters, if that
        is more than the model.
        """
        owner = owner or trained.model
        with untouched(owner):
            subject = foreign_subject(trained.model, None, trained.tokenizer, trained.stated)
            training = ForeignTraining(owner, trained.optimizer, trained.model)
            self.session.preflight(replace(subject, training=training))
        self.session.exchange()

    @timed
    def _drawn(self, batch: Any, epoch: int | None, step: int) -> None:
        """The trainer has drawn a training batch. `epoch` is None where it does not state it."""
        self._watch.inputs.batch = _by_name(batch)
        self._watch.ranks.epoch = self._watch.inputs.epoch = epoch
        if event := self._saves.drawn(batch, epoch or 0, step):
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
